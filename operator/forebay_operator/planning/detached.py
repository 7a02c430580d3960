"""Which resources are for a pool that does not exist."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay_operator.planning.membership import not_a_pool, pools
from forebay_operator.planning.problem import Problem, problem_of
from forebay_operator.resources import (
    POOL_LABEL,
    EndpointSlice,
    FlowControlPolicy,
    InferenceModel,
    InferenceObjective,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from forebay_operator.resources import Resource


def unattached(resources: Iterable[Resource]) -> tuple[Problem, ...]:
    """Return a problem for each resource whose pool does not exist."""
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
                    problems.append(problem_of(kind, resource.metadata, *refused))
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
            problems.append(problem_of(kind, metadata, "TargetNotFound", message, name))
    return tuple(problems)
