"""Plans one pool: its Plan, its endpoints, its EPPs, and what is wrong with its resources."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from forebay_control.limits import MAX_PLAN_BYTES
from forebay_control.mapping import plan_to_message
from forebay_control.plan import PlanError
from forebay_control.v1 import control_pb2 as pb
from forebay_operator.planning.endpoints import endpoints_of
from forebay_operator.planning.membership import epps, pools
from forebay_operator.planning.problem import Problem, problem_of
from forebay_operator.planning.topology import topology_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from forebay_control.plan import Plan
    from forebay_operator.planning.topology import Topology
    from forebay_operator.resources import AnyPool, FlowControlPolicy, Metadata, Resource

_NEVER = dt.datetime.max.replace(tzinfo=dt.UTC)


@dataclass(frozen=True, slots=True)
class Planned:
    """The program of the pool's EPPs, and what is wrong with the resources.

    Attributes:
        pool: namespace/name.
        snapshot: what EPPs are sent: the plan and its sources, and the endpoints.
        plan: the one in the snapshot; None where it is left out, so that EPPs keep theirs.
        problems: of all resources, those of other namespaces excepted.
        policy: the one in force, if any.
        shadow: the one that is computed beside it, if any.
        epps: the names of the pods that are to be programmed, by uid.
        held_by: the invalid policy because of which the plan is left out.
        unsent: reason and message where the plan is left out because EPPs would refuse it.
        shared_with: other pools with the same EPP Service.
        priorities: of the InferenceObjectives that are in the plan, by name.
    """

    pool: str
    snapshot: pb.Snapshot
    plan: Plan | None = None
    problems: tuple[Problem, ...] = ()
    policy: FlowControlPolicy | None = None
    epps: dict[str, str] = field(default_factory=dict)
    held_by: str = ""
    unsent: tuple[str, str] | None = None
    shared_with: tuple[str, ...] = ()
    priorities: dict[str, int] = field(default_factory=dict)
    shadow: FlowControlPolicy | None = None


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
    topology = topology_of(pool, everything, problems)
    policy = topology.policy
    snapshot = pb.Snapshot(
        endpoints=endpoints_of(pool, everything, problems), pool_uid=pool.metadata.uid
    )
    oldest = min(unread, key=_age, default=None)
    held_by, unsent = "", None
    if oldest and (policy is None or _age(oldest) < _age(policy.metadata)):
        held_by = oldest.name
    else:
        unsent = _put(topology, snapshot)
        if unsent is not None and topology.shadow is not None:
            alone = replace(topology, plan=replace(topology.plan, shadow=None), shadow=None)
            if _put(alone, snapshot) is None:
                text = f"the policy in force is sent without it: together {unsent[1]}"
                problems.append(
                    problem_of("FlowControlPolicy", topology.shadow.metadata, unsent[0], text)
                )
                topology, unsent = alone, None
    if unsent is not None:
        reason, text = unsent
        unsent = reason, f"{text}; until then EPPs keep the plan they have, and take endpoints"
        problems.append(problem_of("InferencePool", pool.metadata, *unsent))
    return Planned(
        topology.plan.pool,
        snapshot,
        topology.plan if snapshot.HasField("plan") else None,
        tuple(problems),
        policy,
        epps(pool, everything),
        held_by,
        unsent,
        tuple(
            other.metadata.name
            for other in pools(everything)
            if other.metadata.name != pool.metadata.name
            and other.picker_service == pool.picker_service is not None
        ),
        topology.priorities,
        topology.shadow,
    )


def held(planned: Planned) -> Planned:
    """Leave the plan out, so that EPPs keep theirs and take the endpoints."""
    snapshot = pb.Snapshot()
    snapshot.CopyFrom(planned.snapshot)
    snapshot.ClearField("plan")
    snapshot.ClearField("sources")
    return replace(planned, snapshot=snapshot, plan=None)


def _put(topology: Topology, snapshot: pb.Snapshot) -> tuple[str, str] | None:
    """Put the plan into a snapshot, or return the reason and message why EPPs would refuse it."""
    pool = topology.plan.pool.partition("/")[2]
    try:
        message = plan_to_message(topology.plan)
    except PlanError as error:
        return "InvalidPlan", f"the plan of InferencePool {pool} is not valid: {error}"
    if (size_bytes := message.ByteSize()) > MAX_PLAN_BYTES:
        text = (
            f"the plan of InferencePool {pool} has {size_bytes} bytes and EPPs take "
            f"{MAX_PLAN_BYTES}: have fewer InferenceModels, or shorter names"
        )
        return "TooLarge", text
    snapshot.plan.CopyFrom(message)
    sources = [topology.policy, topology.shadow, *topology.models]
    snapshot.sources.extend(_source(resource) for resource in sources if resource is not None)
    return None


def _age(metadata: Metadata) -> tuple[dt.datetime, str, str, str]:
    created = metadata.creation_timestamp or _NEVER
    return created, metadata.namespace, metadata.name, metadata.uid


def _source(resource: Resource) -> pb.Source:
    metadata = resource.metadata
    return pb.Source(
        kind=type(resource).__name__,
        namespace=metadata.namespace,
        name=metadata.name,
        uid=metadata.uid,
        generation=metadata.generation,
    )
