"""From a policy, models and objectives to the Plan of one pool.

A field with the same name in resource and Plan is filled by `drawn`; what is written out here is
what has another shape or is derived.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from forebay_control.plan import (
    MAX_MODELS,
    MAX_OBJECTIVES,
    BandPlan,
    FairnessName,
    InnerPlan,
    MetricsPlan,
    ModelPlan,
    ObjectivePlan,
    Plan,
    SaturationPlan,
    SelectionPlan,
    SeriesLabelPlan,
    SeriesPlan,
    TargetPlan,
    TenantPlan,
    UnmatchedPlan,
)
from forebay_operator.planning.drawing import drawn
from forebay_operator.planning.membership import means
from forebay_operator.planning.policies import policies_of
from forebay_operator.planning.problem import problem_of
from forebay_operator.resources import (
    AnyPool,
    Band,
    FlowControlPolicy,
    InferenceModel,
    InferenceObjective,
    PolicySpec,
)
from forebay_operator.resources.fields import series
from forebay_operator.resources.policy import (
    BAND,
    AdaptiveLimit,
    ConcurrencyLimit,
)
from forebay_operator.resources.rules import BUILT_IN

if TYPE_CHECKING:
    from forebay_operator.planning.problem import Problem
    from forebay_operator.resources import Resource
    from forebay_operator.resources.policy import (
        FairnessLevel,
        ModelServerMetrics,
        Saturation,
        Selection,
    )

_NO_POLICY = PolicySpec.model_validate(
    {
        "targetRefs": [
            {"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": "none"}
        ]
    }
)


@dataclass(frozen=True, slots=True)
class Topology:
    """A Plan, and the resources that it was made from.

    Attributes:
        plan: not validated.
        policy: the one in force, if any.
        shadow: the one whose plan is the plan's shadow, if any.
        models: those that are in the plan.
        priorities: of the objectives that are in the plan, by name.
    """

    plan: Plan
    policy: FlowControlPolicy | None
    shadow: FlowControlPolicy | None
    models: tuple[InferenceModel, ...]
    priorities: dict[str, int]


def topology_of(pool: AnyPool, resources: list[Resource], problems: list[Problem]) -> Topology:
    """Plan the queues of a pool.

    Args:
        pool: the pool.
        resources: of its namespace, the oldest first.
        problems: takes what has no effect, and why.
    """
    policy, shadow = policies_of(pool, resources, problems)
    topology = _topology(pool, policy, resources, problems)
    if shadow is None:
        return topology
    beside = _topology(pool, shadow, resources, [])  # what is wrong with it is known by now
    plan = replace(topology.plan, shadow=beside.plan)
    return replace(topology, plan=plan, shadow=shadow)


def _topology(
    pool: AnyPool,
    policy: FlowControlPolicy | None,
    resources: list[Resource],
    problems: list[Problem],
) -> Topology:
    """Plan the queues of a pool by one policy, or by the defaults."""
    spec = policy.spec if policy else _NO_POLICY
    bands = _bands(spec)
    models, sources, left_out = _models(pool, spec, resources, problems)
    objectives = _objectives(pool, resources, problems)
    priorities = {name: each.spec.priority or 0 for name, each in objectives.items()}
    ranks = {band.name: band.priority for band in bands}
    plan = drawn(
        Plan,
        spec,
        pool=f"{pool.metadata.namespace}/{pool.metadata.name}",
        bands=bands,
        models=models,
        unmatched=drawn(
            UnmatchedPlan,
            spec.unmatched,
            band=min(
                (spec.unmatched.band, *(model.band for model in left_out)),
                key=ranks.__getitem__,
            ),
        ),
        saturation=_saturation(spec.saturation),
        objectives=tuple(
            drawn(ObjectivePlan, each.spec, name=name, band=_band_at(priorities[name], bands))
            for name, each in objectives.items()
        ),
        trust_objective_header="Objective" in spec.trusted_headers,
        tenant_header=spec.tenants.header if "Tenant" in spec.trusted_headers else "",
        tenants=tuple(drawn(TenantPlan, tenant) for tenant in spec.tenants.weights),
        trust_deadline_headers="Deadline" in spec.trusted_headers,
        selection=_selection(spec.selection),
        metrics=_metrics(spec.model_server_metrics),
    )
    return Topology(plan, policy, None, sources, priorities)


def _bands(spec: PolicySpec) -> tuple[BandPlan, ...]:
    """Return the policy's bands and the built-in ones, the highest priority first."""
    given = {name: Band(name=name) for name in BUILT_IN} | {band.name: band for band in spec.bands}
    bands = (
        drawn(
            BandPlan,
            band.queue,
            band,
            name=band.name,
            priority=BUILT_IN.get(band.name, band.priority),
            **_levels(band),
            ordering=band.ordering.policy,
            flow_max_requests=band.queue.per_flow.max_requests or band.queue.max_requests,
            flow_max_bytes=band.queue.per_flow.max_bytes or band.queue.max_bytes,
        )
        for band in given.values()
    )
    return tuple(sorted(bands, key=lambda band: -band.priority))


def _levels(band: Band) -> dict[str, Any]:
    """Return the levels of fairness as fields of a BandPlan."""
    if not band.fairness:
        return {"fairness": BAND.fairness}
    outer, *inner = band.fairness
    return {
        "between": outer.between,
        "fairness": _fairness(outer),
        "inner": InnerPlan(_fairness(inner[0])) if inner else None,
    }


def _fairness(level: FairnessLevel) -> FairnessName:
    by_tokens = level.weighted_fair is not None and level.weighted_fair.cost == "Tokens"
    return FairnessName.WEIGHTED_FAIR_TOKENS if by_tokens else FairnessName(level.policy)


def _saturation(given: Saturation) -> SaturationPlan:
    adaptive = given.adaptive or AdaptiveLimit()
    concurrency = given.concurrency or ConcurrencyLimit()
    return drawn(
        SaturationPlan,
        adaptive,
        concurrency,
        mode=given.type,
        kv_cache_usage_threshold=adaptive.max_kv_cache_usage_percent / 100,
        max_concurrency=concurrency.max_requests_per_endpoint,
    )


def _selection(given: Selection) -> SelectionPlan | None:
    selection = drawn(SelectionPlan, given)
    return None if selection == SelectionPlan() else selection


def _metrics(given: ModelServerMetrics | None) -> MetricsPlan | None:
    if given is None:
        return None
    return drawn(
        MetricsPlan,
        given,
        running=_series(given.running),
        waiting=_series(given.waiting),
        kv_cache_usage=_series(given.kv_cache_usage),
    )


def _series(text: str | None) -> SeriesPlan | None:
    if text is None:
        return None
    name, labels = series(text)
    return SeriesPlan(name, tuple(SeriesLabelPlan(label, value) for label, value in labels))


def _models(
    pool: AnyPool, spec: PolicySpec, resources: list[Resource], problems: list[Problem]
) -> tuple[tuple[ModelPlan, ...], tuple[InferenceModel, ...], list[ModelPlan]]:
    """Return the models, the resources that count, and the models beyond `MAX_MODELS`.

    The youngest InferenceModels are left out, never what the policy names. To an EPP those are like
    any unmatched model, so all unmatched requests wait in the band of the least critical model that
    is left out: none gains by being one too many.
    """
    mine = [
        model
        for model in resources
        if isinstance(model, InferenceModel)
        and not model.metadata.deletion_timestamp
        and means(model.spec.pool_ref, pool.metadata.name)
    ]
    overrides = {model.name: model for model in spec.models}
    taken: dict[str, InferenceModel] = {}
    for model in mine:
        name = model.spec.model_name
        if name in taken:
            message = f"modelName {name} is that of InferenceModel {taken[name].metadata.name}"
            problems.append(problem_of("InferenceModel", model.metadata, "ModelNameInUse", message))
        else:
            taken[name] = model
    models = {}
    for name, model in taken.items():
        override = overrides.get(name)
        models[name] = drawn(
            ModelPlan,
            override,
            model.spec,
            name=name,
            band=(override and override.band) or model.spec.criticality or "Standard",
            targets=tuple(drawn(TargetPlan, target) for target in model.spec.target_models),
        )
    for name, override in overrides.items():
        if name not in models:
            models[name] = drawn(ModelPlan, override, name=name, band=override.band or "Standard")
    others = [name for name in taken if name not in overrides]
    late = others[MAX_MODELS - len(overrides) :]
    if late:
        message = f"has {len(models)} models; those beyond {MAX_MODELS} are unmatched"
        problems.append(problem_of("InferencePool", pool.metadata, "TooManyModels", message))
        problems.extend(
            problem_of(
                "InferenceModel",
                taken[name].metadata,
                "TooManyModels",
                f"InferencePool {pool.metadata.name} has {MAX_MODELS} other models already: delete "
                "some of them. Until then requests for this one are unmatched, and all unmatched "
                "requests wait in the band of the least critical model that is left out",
                pool.metadata.name,
            )
            for name in late
        )
    left_out = [models.pop(name) for name in late]
    sources = tuple(model for name, model in taken.items() if name in models)
    return tuple(models.values()), sources, left_out


def _objectives(
    pool: AnyPool, resources: list[Resource], problems: list[Problem]
) -> dict[str, InferenceObjective]:
    """Return the objectives by name, in its order."""
    mine: dict[str, InferenceObjective] = {}
    for resource in resources:
        if (
            isinstance(resource, InferenceObjective)
            and not resource.metadata.deletion_timestamp
            and means(resource.spec.pool_ref, pool.metadata.name)
        ):
            # The same name in the groups llm-d.ai and x-k8s.io: the oldest counts.
            mine.setdefault(resource.metadata.name, resource)
    if len(mine) > MAX_OBJECTIVES:
        message = f"has {len(mine)} objectives; those beyond {MAX_OBJECTIVES} have no effect"
        problems.append(problem_of("InferencePool", pool.metadata, "TooManyObjectives", message))
    return {name: mine[name] for name in sorted(mine)[:MAX_OBJECTIVES]}


def _band_at(priority: int, bands: tuple[BandPlan, ...]) -> str:
    """Return the nearest band at or below a priority, or the lowest; the highest comes first."""
    return next((band.name for band in bands if band.priority <= priority), bands[-1].name)
