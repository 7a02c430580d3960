"""Turns the resources of one pool into the program of its EPPs. Pure.

Where resources come from and where programs go does not belong here.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from forebay_control.limits import MAX_ENDPOINTS, MAX_PLAN_BYTES
from forebay_control.v1 import control_pb2 as pb
from forebay_operator.resources import (
    CONTROLLER_LABEL,
    POOL_LABEL,
    AnyPool,
    Band,
    EndpointSlice,
    FlowControlPolicy,
    InferenceModel,
    InferenceObjective,
    InferencePool,
    InferencePoolV1Alpha2,
    Pod,
    PolicySpec,
    Service,
    messages,
)
from forebay_operator.resources.fields import series
from forebay_operator.resources.kubernetes import ACTIVE_PORTS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from google.protobuf.message import Message

    from forebay_operator.resources import Criticality, Metadata, Resource
    from forebay_operator.resources.inference import PoolReference
    from forebay_operator.resources.policy import ModelServerMetrics

PRIORITIES: dict[Criticality, int] = {"Critical": 100, "Standard": 0, "Sheddable": -100}

_NO_POLICY = PolicySpec.model_validate({"targetRefs": [{"name": "none"}]})

MAX_MODELS = 4096  # what an EPP takes
MAX_OBJECTIVES = 1024
POOL_GROUPS = ("inference.networking.k8s.io", "inference.networking.x-k8s.io")
_ORIGINS = ("pool_uid", "sources")  # of a snapshot: what it was made from, not what it does

_NEVER = dt.datetime.max.replace(tzinfo=dt.UTC)


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a resource has no effect, or not the whole one; `pool` says where, if it matters."""

    kind: str
    name: str
    reason: str
    message: str
    pool: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.reason}: {self.message}"


@dataclass(frozen=True, slots=True)
class Planned:
    """The program of the pool's EPPs, and what is wrong with the resources.

    `policy` is the one in force, if any; `pickers` are the pods that are to be programmed, by uid.
    `held_by` is the policy for whose sake the plan is left out, so that pickers keep theirs.
    `too_large` says that it is left out for its size. `shared_with` are other pools with the same
    EPP Service.
    """

    snapshot: pb.Snapshot
    problems: tuple[Problem, ...] = ()
    policy: FlowControlPolicy | None = None
    pickers: dict[str, str] = field(default_factory=dict)
    held_by: str = ""
    too_large: str = ""
    shared_with: tuple[str, ...] = ()


def pools(resources: Iterable[Resource]) -> list[AnyPool]:
    """Return the pools among the resources, by name; of two with one name the v1."""
    found: dict[tuple[str, str], AnyPool] = {}
    for resource in resources:
        name = (resource.metadata.namespace, resource.metadata.name)
        if isinstance(resource, InferencePool) or (
            isinstance(resource, InferencePoolV1Alpha2) and name not in found
        ):
            found[name] = resource
    return [found[name] for name in sorted(found)]


def means(reference: PoolReference, name: str = "") -> bool:
    """Say whether a reference means a pool, or with a name the pool of that name."""
    return (
        reference.kind == "InferencePool"
        and reference.group in POOL_GROUPS
        and name in ("", reference.name)
    )


def not_a_pool(reference: PoolReference) -> tuple[str, str] | None:
    """Return reason and message if a reference cannot mean a pool."""
    if means(reference):
        return None
    message = (
        f"spec.poolRef names a {reference.kind} of group {messages.shown(reference.group)}, and "
        f"only an InferencePool of {' or '.join(POOL_GROUPS)} counts"
    )
    return "InvalidPoolRef", message


def claimant(pool: AnyPool, resources: Iterable[Resource]) -> str:
    """Return the controller whose pool it is: its EPP Service's label says; "" where none does."""
    service = _picker_service(pool, resources)
    return service.metadata.labels.get(CONTROLLER_LABEL, "") if service else ""


class Holdings:
    """What a namespace holds, arranged so that a pool finds its pods without a look at all."""

    def __init__(self, resources: Iterable[Resource]) -> None:
        self._others: list[Resource] = []
        self._pods: list[Pod] = []
        self._by_label: dict[tuple[str, str], list[Pod]] = {}
        for resource in resources:
            if not isinstance(resource, Pod):
                self._others.append(resource)
                continue
            self._pods.append(resource)
            for label in resource.metadata.labels.items():
                self._by_label.setdefault(label, []).append(resource)

    def of(self, pool: AnyPool) -> list[Resource]:
        """Return what matters to a pool: of the pods its servers and EPPs."""
        found = {pod.metadata.uid: pod for pod in self._selected(pool.selector)}
        service = _picker_service(pool, self._others)
        if service is not None and service.spec.selector:
            found.update((p.metadata.uid, p) for p in self._selected(service.spec.selector))
        return [*self._others, *found.values()]

    def _selected(self, selector: dict[str, str]) -> list[Pod]:
        lists = [self._by_label.get(label, []) for label in selector.items()]
        return [pod for pod in min(lists, key=len, default=self._pods) if _selected(pod, selector)]


def plan(pool: AnyPool, resources: Iterable[Resource], unread: Iterable[Metadata] = ()) -> Planned:
    """Plan one pool.

    Policies and models of other namespaces, or about to be deleted, have no effect. Of two policies
    for the pool, and of two models with the same name, the oldest counts (GEP-713): by creation
    time, then by name.
    A reference means the pool by its name alone: a pool that moves from the group x-k8s.io to
    k8s.io takes its models along. Resources of other pools are not looked at.

    Args:
        pool: the pool.
        resources: everything there is.
        unread: policies for the pool that are not valid now, were in force, and whose last valid
            generation this process has not seen. If one of them counts, the plan is left out, so
            that EPPs keep theirs and take the endpoints.
    """
    problems: list[Problem] = []
    # What comes out must not depend on the order in which objects became known.
    everything = sorted(
        (r for r in resources if r.metadata.namespace == pool.metadata.namespace),
        key=lambda r: _age(r.metadata),
    )
    policy = _policy(pool, everything, problems)
    spec = policy.spec if policy else _NO_POLICY
    bands = _bands(spec)
    models, sources, left_out = _models(pool, spec, everything, problems)
    objectives = _objectives(pool, bands, everything, problems)
    origins: list[Resource] = [policy, *sources] if policy else [*sources]
    snapshot = pb.Snapshot(
        plan=pb.Plan(
            pool=f"{pool.metadata.namespace}/{pool.metadata.name}",
            bands=bands,
            models=models,
            limits=pb.Limits(
                max_requests=spec.limits.max_requests,
                max_bytes=spec.limits.max_bytes,
                max_body_bytes=spec.limits.max_body_bytes,
            ),
            saturation=pb.Saturation(
                mode=spec.saturation.mode,
                max_concurrency=spec.saturation.max_concurrency,
                kv_cache_usage_threshold=spec.saturation.kv_cache_usage_threshold,
            ),
            unmatched=pb.Unmatched(
                action=spec.unmatched.action,
                band=min(
                    (spec.unmatched.criticality, *(model.band for model in left_out)),
                    key={band.name: band.priority for band in bands}.__getitem__,
                ),
            ),
            no_endpoints_ttl_seconds=spec.no_endpoints.ttl,
            objectives=objectives,
            trust_objective_header=spec.trust.objective_header,
            metrics=_metrics(spec.model_server_metrics),
        ),
        endpoints=_endpoints(pool, everything, problems),
        pool_uid=pool.metadata.uid,
        sources=[_source(resource) for resource in origins],
    )
    oldest = min(unread, key=_age, default=None)
    held_by = ""
    if oldest and (policy is None or _age(oldest) < _age(policy.metadata)):
        held_by = oldest.name
        snapshot.ClearField("plan")
        snapshot.ClearField("sources")
    too_large = ""
    if (size_bytes := snapshot.plan.ByteSize()) > MAX_PLAN_BYTES:
        too_large = (
            f"the plan of InferencePool {pool.metadata.name} has {size_bytes} bytes and EPPs "
            f"take {MAX_PLAN_BYTES}: have fewer InferenceModels, or shorter names; until "
            "then EPPs keep the plan they have, and take endpoints"
        )
        problems.append(_problem("InferencePool", pool.metadata, "TooLarge", too_large))
        snapshot.ClearField("plan")
        snapshot.ClearField("sources")
    pickers = _pickers(pool, everything)
    shared_with = tuple(
        other.metadata.name
        for other in pools(everything)
        if other.metadata.name != pool.metadata.name
        and other.picker_service == pool.picker_service is not None
    )
    return Planned(snapshot, tuple(problems), policy, pickers, held_by, too_large, shared_with)


def held(planned: Planned) -> Planned:
    """Leave the plan out, so that EPPs keep theirs and take the endpoints."""
    snapshot = pb.Snapshot()
    snapshot.CopyFrom(planned.snapshot)
    snapshot.ClearField("plan")
    snapshot.ClearField("sources")
    return replace(planned, snapshot=snapshot)


def unattached(resources: Iterable[Resource]) -> tuple[Problem, ...]:
    """Tell of the resources that are for a pool which is not there."""
    everything = list(resources)
    names = {(pool.metadata.namespace, pool.metadata.name) for pool in pools(everything)}
    problems: list[Problem] = []
    for resource in everything:
        match resource:
            case FlowControlPolicy():
                wanted = [ref.name for ref in resource.spec.target_refs]
            case InferenceModel() | InferenceObjective():
                if (refused := not_a_pool(resource.spec.pool_ref)) is not None:
                    kind = type(resource).__name__
                    problems.append(_problem(kind, resource.metadata, *refused))
                    continue
                wanted = [resource.spec.pool_ref.name]
            case EndpointSlice():
                wanted = [resource.metadata.labels.get(POOL_LABEL, "")]
            case _:
                continue
        kind, metadata = type(resource).__name__, resource.metadata
        for name in wanted:
            if (metadata.namespace, name) in names:
                continue
            elsewhere = sorted(namespace for namespace, other in names if other == name)
            if not name:
                message = f"no label {POOL_LABEL} names a pool"
            elif elsewhere:
                message = (
                    f"InferencePool {name} is in namespace {elsewhere[0]}, and only resources of "
                    "its own namespace count"
                )
            else:
                message = f"there is no InferencePool {name}"
            problems.append(_problem(kind, metadata, "TargetNotFound", message, name))
    return tuple(problems)


def differences(before: Message, after: Message, path: str = "") -> list[str]:
    """Say in lines what changed from one message to another; parts of a list go by their name."""
    lines: list[str] = []
    for part in before.DESCRIPTOR.fields:
        where = f"{path}{part.json_name}"
        old, new = getattr(before, part.name), getattr(after, part.name)
        if old == new or part.name in _ORIGINS:
            continue
        if part.is_repeated:
            olds, news = ({_key(entry): entry for entry in entries} for entries in (old, new))
            lines.extend(f"{where}[{key}] removed" for key in olds.keys() - news.keys())
            lines.extend(f"{where}[{key}] added" for key in news.keys() - olds.keys())
            for key in olds.keys() & news.keys():
                lines.extend(differences(olds[key], news[key], f"{where}[{key}]."))
        elif part.message_type:
            lines.extend(differences(old, new, f"{where}."))
        else:
            lines.append(f"{where}: {old} -> {new}")
    return sorted(lines)


def _key(part: pb.Band | pb.Model | pb.Target | pb.Objective | pb.Source | pb.Endpoint) -> str:
    return part.address if isinstance(part, pb.Endpoint) else part.name


def _age(metadata: Metadata) -> tuple[dt.datetime, str, str, str]:
    created = metadata.creation_timestamp or _NEVER
    return created, metadata.namespace, metadata.name, metadata.uid


def _policy(
    pool: AnyPool, resources: list[Resource], problems: list[Problem]
) -> FlowControlPolicy | None:
    candidates = [
        policy
        for policy in resources
        if isinstance(policy, FlowControlPolicy)
        and not policy.metadata.deletion_timestamp
        and any(ref.name == pool.metadata.name for ref in policy.spec.target_refs)
    ]
    for loser in candidates[1:]:
        message = (
            f"FlowControlPolicy {candidates[0].metadata.name} is older and already for "
            f"InferencePool {pool.metadata.name}; delete one of them"
        )
        problems.append(
            _problem("FlowControlPolicy", loser.metadata, "Conflicted", message, pool.metadata.name)
        )
    return candidates[0] if candidates else None


def _problem(kind: str, metadata: Metadata, reason: str, message: str, pool: str = "") -> Problem:
    return Problem(kind, f"{metadata.namespace}/{metadata.name}", reason, message, pool)


def _source(resource: Resource) -> pb.Source:
    metadata = resource.metadata
    return pb.Source(
        kind=type(resource).__name__,
        namespace=metadata.namespace,
        name=metadata.name,
        uid=metadata.uid,
        generation=metadata.generation,
    )


def _metrics(given: ModelServerMetrics | None) -> pb.Metrics | None:
    if given is None:
        return None
    return pb.Metrics(
        path=given.path or "",
        port=given.port or 0,
        running=_series(given.running),
        waiting=_series(given.waiting),
        kv_cache_usage=_series(given.kv_cache_usage),
    )


def _series(text: str | None) -> pb.Series | None:
    if text is None:
        return None
    name, labels = series(text)
    return pb.Series(
        name=name, labels=[pb.SeriesLabel(name=label, value=value) for label, value in labels]
    )


def _bands(spec: PolicySpec) -> list[pb.Band]:
    given = {band.criticality: band for band in spec.bands}
    bands = []
    for criticality, priority in PRIORITIES.items():
        band = given.get(criticality) or Band(criticality=criticality)
        queue = band.queue
        bands.append(
            pb.Band(
                name=criticality,
                priority=priority,
                fairness=band.fairness.policy,
                ordering=band.ordering,
                ttl_seconds=queue.ttl,
                max_requests=queue.max_requests,
                max_bytes=queue.max_bytes,
                flow_max_requests=queue.per_flow.max_requests or queue.max_requests,
                flow_max_bytes=queue.per_flow.max_bytes or queue.max_bytes,
            )
        )
    return bands


def _models(
    pool: AnyPool, spec: PolicySpec, resources: list[Resource], problems: list[Problem]
) -> tuple[list[pb.Model], list[InferenceModel], list[pb.Model]]:
    """Return the models, the resources that count, and the models beyond `MAX_MODELS`.

    The youngest InferenceModels are left out, never what the policy names. To an EPP
    those are like any unmatched model, so `plan` has all unmatched requests wait in the band of
    the least critical model left out: none gains by being one too many.
    """
    mine = [
        model
        for model in resources
        if isinstance(model, InferenceModel)
        and not model.metadata.deletion_timestamp
        and means(model.spec.pool_ref, pool.metadata.name)
    ]
    override: dict[str, Criticality] = {model.name: model.criticality for model in spec.models}
    taken: dict[str, InferenceModel] = {}
    for model in mine:
        name = model.spec.model_name
        if name in taken:
            message = f"modelName {name} is that of InferenceModel {taken[name].metadata.name}"
            problems.append(_problem("InferenceModel", model.metadata, "ModelNameInUse", message))
        else:
            taken[name] = model
    models = {
        name: pb.Model(
            name=name,
            band=override.get(name) or model.spec.criticality or "Standard",
            targets=[
                pb.Target(name=target.name, weight=target.weight or 1)
                for target in model.spec.target_models
            ],
        )
        for name, model in taken.items()
    }
    for name, band in override.items():
        models.setdefault(name, pb.Model(name=name, band=band))
    others = [name for name in taken if name not in override]
    late = others[MAX_MODELS - len(override) :]
    if late:
        message = f"has {len(models)} models; those beyond {MAX_MODELS} are unmatched"
        problems.append(_problem("InferencePool", pool.metadata, "TooManyModels", message))
        problems.extend(
            _problem(
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
    return list(models.values()), [taken[name] for name in taken if name in models], left_out


def _objectives(
    pool: AnyPool, bands: list[pb.Band], resources: list[Resource], problems: list[Problem]
) -> list[pb.Objective]:
    """Put each objective into the nearest band at or below its priority, or the lowest one."""
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
        problems.append(_problem("InferencePool", pool.metadata, "TooManyObjectives", message))
    order = sorted(bands, key=lambda band: -band.priority)
    return [
        pb.Objective(
            name=name,
            band=next(
                (band.name for band in order if band.priority <= (mine[name].spec.priority or 0)),
                order[-1].name,
            ),
        )
        for name in sorted(mine)[:MAX_OBJECTIVES]
    ]


def _pickers(pool: AnyPool, resources: list[Resource]) -> dict[str, str]:
    """Return the running pods behind the pool's EPP Service: name by uid."""
    service = _picker_service(pool, resources)
    if service is None or not service.spec.selector:
        return {}
    return {
        resource.metadata.uid: resource.metadata.name
        for resource in resources
        if isinstance(resource, Pod)
        and resource.running
        and _selected(resource, service.spec.selector)
    }


def _picker_service(pool: AnyPool, resources: Iterable[Resource]) -> Service | None:
    return next(
        (
            resource
            for resource in resources
            if isinstance(resource, Service)
            and resource.metadata.name == pool.picker_service
            and resource.metadata.namespace == pool.metadata.namespace
        ),
        None,
    )


def _selected(pod: Pod, selector: dict[str, str]) -> bool:
    labels = pod.metadata.labels
    return all(labels.get(name) == value for name, value in selector.items())


def _endpoints(pool: AnyPool, resources: list[Resource], problems: list[Problem]) -> pb.Endpoints:
    """Take the ready pods, and each ready address of the pool's slices, in the order of addresses.

    A slice's ports count if it has any; else, and for pods, the pool's.
    """
    found: dict[str, pb.Endpoint] = {}
    for resource in resources:
        if isinstance(resource, Pod):
            if resource.ready and _selected(resource, pool.selector):
                _add_pod(pool, resource, found)
        elif (
            isinstance(resource, EndpointSlice)
            and resource.metadata.labels.get(POOL_LABEL) == pool.metadata.name
        ):
            _add_slice(pool, resource, found, problems)
    addresses = sorted(found)
    if len(addresses) > MAX_ENDPOINTS:
        message = f"has {len(addresses)} endpoints; those beyond {MAX_ENDPOINTS} get no requests"
        problems.append(_problem("InferencePool", pool.metadata, "TooManyEndpoints", message))
    return pb.Endpoints(endpoints=[found[address] for address in addresses[:MAX_ENDPOINTS]])


def _add_pod(pool: AnyPool, pod: Pod, found: dict[str, pb.Endpoint]) -> None:
    """Add a pod once per port; an annotation may leave only some of the ports."""
    host = _host(pod.status.pod_ip)
    if host is None:
        return
    active = next(
        (pod.metadata.annotations[key] for key in ACTIVE_PORTS if key in pod.metadata.annotations),
        None,
    )
    allowed = None if active is None else {text.strip() for text in active.split(",")}
    for rank, port in enumerate(pool.ports):
        if allowed is None or str(port) in allowed:
            name = f"{pod.metadata.name}-rank-{rank}" if len(pool.ports) > 1 else pod.metadata.name
            address, uid = f"{host}:{port}", pod.metadata.uid
            found.setdefault(address, pb.Endpoint(address=address, name=name, uid=uid))


def _add_slice(
    pool: AnyPool, part: EndpointSlice, found: dict[str, pb.Endpoint], problems: list[Problem]
) -> None:
    ports = tuple(port.port for port in part.ports if port.port) or pool.ports
    for endpoint in part.endpoints:
        if endpoint.conditions.ready is False:
            continue
        for text in endpoint.addresses:
            host = _host(text)
            if host is None:
                message = f"address {text!r} is not an IP address"
                problems.append(_problem("EndpointSlice", part.metadata, "InvalidAddress", message))
                continue
            for port in ports:
                address = f"{host}:{port}"
                name = endpoint.target_ref.name or address
                uid = endpoint.target_ref.uid
                found.setdefault(address, pb.Endpoint(address=address, name=name, uid=uid))


def _host(text: str) -> str | None:
    """Write an IP address as needed before a colon and a port."""
    try:
        ip = ipaddress.ip_address(text)
    except ValueError:
        return None
    return f"[{ip}]" if ip.version == 6 else str(ip)
