"""Advice about settings that are valid but probably not intended. Pure.

Nothing here changes the plan, and none of it is an error: each setting could be intended. What has
no effect at all is reported by planning.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING

from forebay_operator import planning
from forebay_operator.planning import Problem
from forebay_operator.resources import (
    FlowControlPolicy,
    InferenceModel,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from forebay_control.plan import Plan
    from forebay_operator.planning import Planned
    from forebay_operator.resources import AnyPool, PolicySpec, Resource

WEIGHING = ("WeightedFair", "TokenFair")
MAX_COMPARISONS = 100  # of names that are alike; one takes up to a millisecond


def advice(resources: Iterable[Resource]) -> tuple[Problem, ...]:
    """Return what to look at again, in the order of pools."""
    everything = list(resources)
    found: list[Problem] = []
    for pool in planning.pools(everything):
        found += of_pool(pool, planning.plan(pool, everything), everything)
    return tuple(dict.fromkeys(found))


def of_pool(pool: AnyPool, planned: Planned, resources: Iterable[Resource]) -> list[Problem]:
    """Return what to look at again of one pool and what is for it."""
    mine = [r for r in resources if r.metadata.namespace == pool.metadata.namespace]
    found: list[Problem] = []
    if planned.policy is not None:
        found += _of_policy(planned.policy, planned, mine)
    found += _of_itself(pool, planned, mine)
    found += _of_objectives(pool, planned)
    return found


def _of_policy(
    policy: FlowControlPolicy, planned: Planned, resources: list[Resource]
) -> Iterator[Problem]:
    spec = policy.spec

    def problem(reason: str, message: str) -> Problem:
        name = f"{policy.metadata.namespace}/{policy.metadata.name}"
        return Problem("FlowControlPolicy", name, reason, message)

    for number, band in enumerate(spec.bands):
        where, queue = f"spec.bands[{number}].queue", band.queue
        for path, value, outer, limit in (
            (
                "maxRequests",
                queue.max_requests,
                "spec.limits.maxRequests",
                spec.limits.max_requests,
            ),
            ("maxBytes", queue.max_bytes, "spec.limits.maxBytes", spec.limits.max_bytes),
            (
                "perFlow.maxRequests",
                queue.per_flow.max_requests,
                f"{where}.maxRequests",
                queue.max_requests,
            ),
            ("perFlow.maxBytes", queue.per_flow.max_bytes, f"{where}.maxBytes", queue.max_bytes),
        ):
            if value is not None and value > limit:
                message = f"{where}.{path} is {value:,}, and {outer} lets only {limit:,} wait"
                yield problem("LimitOverLimit", message)
    if spec.limits.max_body_bytes > spec.limits.max_bytes:
        message = (
            f"spec.limits.maxBodyBytes is {spec.limits.max_body_bytes:,}, and "
            f"spec.limits.maxBytes lets only {spec.limits.max_bytes:,} wait"
        )
        yield problem("LimitOverLimit", message)
    yield from _overrides(policy, planned.plan, resources, problem)
    yield from _fairness(spec, problem)
    if spec.model_server_metrics is not None and spec.saturation.type == "Concurrency":
        yield problem(
            "FieldWithoutEffect",
            "spec.modelServerMetrics counts with saturation.type Adaptive only; it is Concurrency",
        )
    if spec.unmatched.action == "Reject" and planned.plan and not planned.plan.models:
        yield problem(
            "EverythingRejected",
            "spec.unmatched.action is Reject and the pool has no InferenceModel: every request is "
            "refused with 404",
        )


def _fairness(spec: PolicySpec, problem: Callable[[str, str], Problem]) -> Iterator[Problem]:
    """Report levels between tenants that no one tells apart, and weights that no level knows."""
    levels = [
        (f"spec.bands[{number}].fairness[{index}]", level)
        for number, band in enumerate(spec.bands)
        for index, level in enumerate(band.fairness)
    ]
    for path, level in levels:
        if level.between == "Tenants" and "Tenant" not in spec.trusted_headers:
            yield problem(
                "FieldWithoutEffect",
                f"{path} is between Tenants, and without Tenant in spec.trustedHeaders all "
                "requests are of one tenant",
            )
    weighing = {level.between for _, level in levels if level.policy in WEIGHING}
    for path, between, weighted in (
        ("spec.models[].weight", "Models", any(model.weight != 1 for model in spec.models)),
        ("spec.tenants.weights", "Tenants", bool(spec.tenants.weights)),
    ):
        if weighted and between not in weighing:
            yield problem(
                "FieldWithoutEffect",
                f"{path} counts where a band is shared between {between} by "
                f"{' or '.join(WEIGHING)} only, and none is",
            )


def _overrides(
    policy: FlowControlPolicy,
    plan: Plan | None,
    resources: list[Resource],
    problem: Callable[[str, str], Problem],
) -> Iterator[Problem]:
    """Report names in `spec.models` that no InferenceModel of the policy's pools has."""
    pools = {ref.name for ref in policy.spec.target_refs}
    names = {
        r.spec.model_name
        for r in resources
        if isinstance(r, InferenceModel)
        and planning.means(r.spec.pool_ref)
        and r.spec.pool_ref.name in pools
    }
    comparisons = MAX_COMPARISONS
    for number, override in enumerate(policy.spec.models):
        if override.name in names:
            continue
        comparisons -= len(names)
        near = (
            difflib.get_close_matches(override.name, sorted(names), n=1) if comparisons >= 0 else []
        )
        message = (
            f"spec.models[{number}].name: no InferenceModel has the modelName {override.name}, so "
            "this makes a model of that name"
        )
        yield problem("NoSuchModel", message + (f"; is {near[0]} meant?" if near else ""))
    models = plan.models if plan else ()
    taken = {target.name: model.name for model in models for target in model.targets}
    for number, override in enumerate(policy.spec.models):
        if override.name in taken and override.name not in names:
            message = (
                f"spec.models[{number}].name: {override.name} is what the servers call "
                f"{taken[override.name]}, which is the name that requests have"
            )
            yield problem("TargetNamed", message)


def _of_itself(pool: AnyPool, planned: Planned, resources: list[Resource]) -> Iterator[Problem]:
    name = f"{pool.metadata.namespace}/{pool.metadata.name}"
    if pool.picker_service is None:
        message = "names no EPP Service: gateways and the operator find no EPP for it"
        yield Problem("InferencePool", name, "NoEndpointPickerRef", message)
    for other in planned.shared_with:
        message = (
            f"InferencePool {other} names Service {pool.picker_service} too, and an "
            "EPP serves one pool: give each a Service and EPPs of its own"
        )
        yield Problem("InferencePool", name, "EndpointPickerShared", message)
    if planned.policy is None and not planned.held_by:
        message = "no FlowControlPolicy is for it: its queue has the defaults"
        yield Problem("InferencePool", name, "NoPolicy", message)
    for model in resources:
        if not isinstance(model, InferenceModel) or not planning.means(
            model.spec.pool_ref, pool.metadata.name
        ):
            continue
        targets = [target.name for target in model.spec.target_models]
        twice = sorted({target for target in targets if targets.count(target) > 1})
        if twice:
            message = f"spec.targetModels names {', '.join(twice)} more than once"
            key = f"{model.metadata.namespace}/{model.metadata.name}"
            yield Problem("InferenceModel", key, "TargetTwice", message)


def _of_objectives(pool: AnyPool, planned: Planned) -> Iterator[Problem]:
    """Report objectives that no header may choose, and those that share a band."""
    plan = planned.plan
    if plan is None or not plan.objectives:
        return
    if not plan.trust_objective_header:
        names = ", ".join(objective.name for objective in plan.objectives[:5])
        message = (
            f"its InferenceObjectives ({names}) have no effect: set trustedHeaders: [Objective] "
            "in a FlowControlPolicy, if only callers that you trust can set the header"
        )
        key = f"{pool.metadata.namespace}/{pool.metadata.name}"
        yield Problem("InferencePool", key, "ObjectivesNotTrusted", message)
    priorities = planned.priorities
    bands: defaultdict[str, list[str]] = defaultdict(list)
    for objective in plan.objectives:
        bands[objective.band].append(objective.name)
    for band, names_of_band in bands.items():
        ordered = sorted(names_of_band, key=lambda name: (-priorities[name], name))
        for higher, lower in pairwise(ordered):
            if priorities[higher] != priorities[lower]:
                message = (
                    f"priorities {priorities[higher]} and {priorities[lower]} ({lower}) both join "
                    f"band {band}, so neither is served before the other: give a policy of the "
                    f"pool a band with the priority {priorities[higher]}, if one is to be"
                )
                key = f"{pool.metadata.namespace}/{higher}"
                yield Problem("InferenceObjective", key, "SameBand", message)
                break
