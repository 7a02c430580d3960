"""Which policy is in force for a pool, and which is computed beside it as its shadow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay_control.plan import Mode
from forebay_operator.planning.problem import problem_of
from forebay_operator.resources import SHADOW_LABEL, FlowControlPolicy

if TYPE_CHECKING:
    from forebay_operator.planning.problem import Problem
    from forebay_operator.resources import AnyPool, Resource


def policies_of(
    pool: AnyPool, resources: list[Resource], problems: list[Problem]
) -> tuple[FlowControlPolicy | None, FlowControlPolicy | None]:
    """Return the policy in force and its shadow; of several the oldest.

    A policy whose label `SHADOW_LABEL` names another is never in force.

    Args:
        pool: the pool.
        resources: of its namespace, the oldest first.
        problems: takes why others have no effect.
    """
    mine = [
        policy
        for policy in resources
        if isinstance(policy, FlowControlPolicy)
        and not policy.metadata.deletion_timestamp
        and any(ref.name == pool.metadata.name for ref in policy.spec.target_refs)
    ]
    candidates = [policy for policy in mine if SHADOW_LABEL not in policy.metadata.labels]
    in_force = candidates[0] if candidates else None
    name = pool.metadata.name
    for loser in candidates[1:]:
        message = (
            f"FlowControlPolicy {candidates[0].metadata.name} is older and already for "
            f"InferencePool {name}; delete one of them"
        )
        problems.append(
            problem_of("FlowControlPolicy", loser.metadata, "Conflicted", message, name)
        )
    shadow = None
    for policy in mine:
        if SHADOW_LABEL not in policy.metadata.labels:
            continue
        refused = _refused(policy, in_force, shadow, name)
        if refused is None:
            shadow = policy
        else:
            problems.append(problem_of("FlowControlPolicy", policy.metadata, *refused, name))
    return in_force, shadow


def _refused(
    policy: FlowControlPolicy,
    in_force: FlowControlPolicy | None,
    shadow: FlowControlPolicy | None,
    pool: str,
) -> tuple[str, str] | None:
    """Return reason and message why a policy with the label is no shadow at a pool, if it is not.

    Requests are read as the policy in force says, so both must trust the same headers.
    """
    named = policy.metadata.labels[SHADOW_LABEL]
    if in_force is None or in_force.metadata.name != named:
        actual = "none is" if in_force is None else f"{in_force.metadata.name} is"
        message = (
            f"its label {SHADOW_LABEL} names {named or 'no policy'}, and for InferencePool {pool} "
            f"{actual} in force: name that, or remove the label"
        )
        return "NotInForce", message
    if shadow is not None:
        message = (
            f"FlowControlPolicy {shadow.metadata.name} is older and already the shadow of {named} "
            f"at InferencePool {pool}; delete one of them"
        )
        return "Conflicted", message
    if in_force.spec.mode == Mode.OBSERVE:
        message = (
            f"FlowControlPolicy {named} has mode Observe, and what it would do itself is computed: "
            "set its mode to Enforce, or delete this policy"
        )
        return "InForceObserves", message
    mine, theirs = ({*each.spec.trusted_headers} for each in (policy, in_force))
    tenants = "Tenant" in mine and policy.spec.tenants.header != in_force.spec.tenants.header
    if mine != theirs or tenants:
        message = (
            f"requests are read as FlowControlPolicy {named} says, which is in force: give both "
            "the same trustedHeaders and tenants.header"
        )
        return "HeadersDiffer", message
    return None
