"""From the resources of one pool to what its endpoint pickers are told. Pure.

Where resources come from (sources.py) and where the snapshot goes does not belong here.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from forebay_control.v1 import control_pb2 as pb
from forebay_operator.resources import (
    POOL_LABEL,
    AnyPool,
    Band,
    EndpointSlice,
    FlowControlPolicy,
    InferenceModel,
    InferencePool,
    InferencePoolV1Alpha2,
    PolicySpec,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from forebay_operator.resources import Criticality, Metadata, Resource

PRIORITIES: dict[Criticality, int] = {"Critical": 100, "Standard": 0, "Sheddable": -100}

_NO_POLICY = PolicySpec.model_validate({"targetRefs": [{"name": "none"}]})

_NEVER = dt.datetime.max.replace(tzinfo=dt.UTC)


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a resource has no effect, or not the whole one."""

    kind: str
    name: str
    reason: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.reason}: {self.message}"


@dataclass(frozen=True, slots=True)
class Planned:
    """What the pool's endpoint pickers are told, and what is wrong with the resources."""

    snapshot: pb.Snapshot
    problems: tuple[Problem, ...] = field(default=())


def pools(resources: Iterable[Resource]) -> list[AnyPool]:
    """Return the pools among the resources, by name."""
    found = [r for r in resources if isinstance(r, InferencePool | InferencePoolV1Alpha2)]
    return sorted(found, key=lambda pool: (pool.metadata.namespace, pool.metadata.name))


def plan(pool: AnyPool, resources: Iterable[Resource]) -> Planned:
    """Plan one pool.

    Policies and models of other namespaces have no effect. Of two policies for the pool, and of
    two models with the same name, the oldest counts (GEP-713): by creation time, then by name.
    """
    problems: list[Problem] = []
    everything = list(resources)
    policy = _policy(pool, everything, problems)
    spec = policy.spec if policy else _NO_POLICY
    return Planned(
        pb.Snapshot(
            plan=pb.Plan(
                pool=f"{pool.metadata.namespace}/{pool.metadata.name}",
                bands=_bands(spec),
                models=_models(pool, spec, everything, problems),
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
                    action=spec.unmatched.action, band=spec.unmatched.criticality
                ),
                no_endpoints_ttl_seconds=spec.no_endpoints.ttl,
            ),
            endpoints=_endpoints(pool, everything, problems),
        ),
        tuple(problems),
    )


def _age(metadata: Metadata) -> tuple[dt.datetime, str, str]:
    return metadata.creation_timestamp or _NEVER, metadata.namespace, metadata.name


def _policy(
    pool: AnyPool, resources: list[Resource], problems: list[Problem]
) -> FlowControlPolicy | None:
    candidates = []
    for policy in (r for r in resources if isinstance(r, FlowControlPolicy)):
        if not any(ref.name == pool.metadata.name for ref in policy.spec.target_refs):
            continue
        if policy.metadata.namespace == pool.metadata.namespace:
            candidates.append(policy)
        else:
            message = (
                f"InferencePool {pool.metadata.name} is in namespace {pool.metadata.namespace}; "
                "a policy reaches pools of its own namespace only"
            )
            problems.append(_problem("FlowControlPolicy", policy.metadata, "NoSuchPool", message))
    candidates.sort(key=lambda policy: _age(policy.metadata))
    for loser in candidates[1:]:
        message = (
            f"FlowControlPolicy {candidates[0].metadata.name} is older and already for "
            f"InferencePool {pool.metadata.name}; delete one of them"
        )
        problems.append(_problem("FlowControlPolicy", loser.metadata, "Conflicted", message))
    return candidates[0] if candidates else None


def _problem(kind: str, metadata: Metadata, reason: str, message: str) -> Problem:
    return Problem(kind, f"{metadata.namespace}/{metadata.name}", reason, message)


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
) -> list[pb.Model]:
    mine = [
        model
        for model in resources
        if isinstance(model, InferenceModel)
        and model.metadata.namespace == pool.metadata.namespace
        and model.spec.pool_ref.name == pool.metadata.name
    ]
    mine.sort(key=lambda model: _age(model.metadata))
    override = {model.name: model.criticality for model in spec.models}
    taken: dict[str, InferenceModel] = {}
    for model in mine:
        name = model.spec.model_name
        if name in taken:
            message = f"modelName {name} is that of InferenceModel {taken[name].metadata.name}"
            problems.append(_problem("InferenceModel", model.metadata, "ModelNameInUse", message))
        else:
            taken[name] = model
    models = [
        pb.Model(
            name=name,
            band=override.pop(name, None) or model.spec.criticality or "Standard",
            targets=[
                pb.Target(name=target.name, weight=target.weight or 1)
                for target in model.spec.target_models
            ],
        )
        for name, model in taken.items()
    ]
    models.extend(pb.Model(name=name, band=band) for name, band in override.items())
    return models


def _endpoints(pool: AnyPool, resources: list[Resource], problems: list[Problem]) -> pb.Endpoints:
    found: dict[str, pb.Endpoint] = {}
    for part in resources:
        if (
            not isinstance(part, EndpointSlice)
            or part.metadata.labels.get(POOL_LABEL) != pool.metadata.name
            or part.metadata.namespace != pool.metadata.namespace
        ):
            continue
        ports = tuple(port.port for port in part.ports if port.port) or pool.ports
        for endpoint in part.endpoints:
            if endpoint.conditions.ready is False:
                continue
            for host in endpoint.addresses:
                if not _is_ip(host):
                    message = f"address {host!r} is not an IP address"
                    problems.append(
                        _problem("EndpointSlice", part.metadata, "InvalidAddress", message)
                    )
                    continue
                for port in ports:
                    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
                    name = endpoint.target_ref.name or address
                    found.setdefault(address, pb.Endpoint(address=address, name=name))
    return pb.Endpoints(endpoints=found.values())


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
