"""Judges an object at one pool: accepted, resolved, programmed, degraded, and why. Pure.

A condition that is not as it should be says why and what to do. The statuses that are made of
these verdicts belong in conditions.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay_operator.status import numbers
from forebay_operator.status.observed import EPPState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forebay_control.plan import Plan
    from forebay_operator.status.observed import EPP, Attachment, Subject

PLAN_HELD = "PlanHeld"
SHADOW = "Shadow"
MAX_NAMED = 5

Verdict = tuple[str, str, str]  # a condition's status, reason and message


def pool_problems(epps: Sequence[EPP]) -> dict[str, str]:
    """Return what is wrong with a pool's EPPs, whether it has a policy or not: text by reason."""
    found: dict[str, str] = {}
    older = [epp for epp in epps if epp.unsupported]
    if older:
        found["UnsupportedByEndpointPicker"] = _older(older)
    rejected = [epp for epp in epps if epp.state is EPPState.REJECTED]
    if rejected:
        named = "; ".join(f"{epp.name}: {epp.error}" for epp in rejected[:MAX_NAMED])
        found["Rejected"] = f"{len(rejected)} of {len(epps)} EPPs refuse: {named}"
    stale = [epp.name for epp in epps if epp.state is EPPState.STALE]
    if stale:
        found["Stale"] = (
            f"no connection from {listed(stale)}; they keep the last program they had: look at "
            "their logs and at the network between them and the operator"
        )
    return found


def of_policy(subject: Subject, attachment: Attachment | None) -> dict[str, Verdict]:
    """Return the four verdicts on a policy at one pool, by type.

    Args:
        subject: the policy.
        attachment: the pool; None where none can be read from the policy.
    """
    return {
        "Accepted": _accepted(subject, attachment),
        "ResolvedRefs": _resolved(attachment),
        "Programmed": _programmed(subject, attachment),
        "Degraded": _degraded(subject, attachment),
    }


def counted(subject: Subject, attachment: Attachment) -> Verdict:
    """Return whether an object of one pool counts there."""
    if subject.problems:
        return "False", "Invalid", _fix(subject)
    if attachment.refused is not None:
        return "False", *attachment.refused
    if attachment.epps is None:
        message = f"waits for InferencePool {attachment.pool}, which does not exist"
        return "Unknown", "Pending", message
    return "True", "Accepted", ""


def objective_counted(
    subject: Subject, attachment: Attachment, plan: Plan | None, band: str | None
) -> Verdict:
    """Return whether an InferenceObjective counts at its pool, and what requests gain by it.

    Args:
        subject: the objective.
        attachment: its pool.
        plan: the pool's plan; None where EPPs keep the one they have.
        band: the band that the objective joins by the plan; None where it is left out.
    """
    verdict = counted(subject, attachment)
    if verdict[0] != "True" or plan is None:
        return verdict
    if band is None:
        message = f"InferencePool {attachment.pool} has too many objectives: delete some"
        return "False", "TooManyObjectives", message
    if plan.trust_objective_header:
        return "True", "Accepted", f"requests that name it join band {band}"
    message = (
        "no request may name it: set trustedHeaders: [Objective] in a FlowControlPolicy of "
        f"InferencePool {attachment.pool}, if only callers that you trust can set the header"
    )
    return "True", "Accepted", message


def model_programmed(subject: Subject, attachment: Attachment) -> Verdict:
    """Return whether the EPPs that serve run the latest generation of a model.

    An EPP that cannot be reached serves by what it acknowledged last, and one that has acknowledged
    nothing yet is not ready. Neither is news about a model that the others run.
    """
    verdict = _without_effect(subject, attachment)
    if verdict is not None:
        return verdict
    epps = attachment.epps or ()
    serving = [epp for epp in epps if epp.generations] or epps
    older = [
        epp
        for epp in serving
        if any(path.startswith("plan.models") for path in epp.unsupported)
        or (epp.unsupported and not programs(subject, epp))
    ]
    if older:
        text = f"an EPP is {_age_of(older)}"
        return "False", "UnsupportedByEndpointPicker", text
    behind = [epp for epp in serving if not programs(subject, epp)]
    if not behind:
        return "True", "Programmed", "every EPP that serves runs it"
    rejected = [epp for epp in behind if epp.state is EPPState.REJECTED]
    if rejected:
        error = min(epp.error for epp in rejected)
        return "False", _unsupported(rejected), f"an EPP refuses the plan: {error}"
    if any(epp.state is EPPState.STALE for epp in behind):
        return "False", "Stale", "an EPP that runs an older plan cannot be reached"
    if attachment.unsent is not None:
        return "False", *attachment.unsent
    return "False", "Pending", "waits for EPPs to acknowledge"


def programs(subject: Subject, epp: EPP) -> bool:
    """Return whether an EPP runs the latest generation."""
    return epp.generations.get(subject.uid) == subject.generation


def listed(names: Sequence[str]) -> str:
    """Write the first names, and how many more there are."""
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def _accepted(subject: Subject, attachment: Attachment | None) -> Verdict:
    if subject.problems:
        return "False", "Invalid", _fix(subject)
    if attachment is not None and attachment.refused is not None:
        return "False", *attachment.refused
    if attachment is None or attachment.epps is None:
        return "False", "TargetNotFound", "its pool does not exist: see ResolvedRefs"
    if attachment.shadow_of:
        message = (
            f"the shadow of FlowControlPolicy {attachment.shadow_of} at InferencePool "
            f"{attachment.pool}: status.pools[].shadow tells what it would do"
        )
        return "True", "Accepted", message
    more = len(attachment.advice) - MAX_NAMED
    advice = "; ".join(attachment.advice[:MAX_NAMED]) + (f"; and {more} more" if more > 0 else "")
    return "True", "Accepted", f"look again at this: {advice}" if advice else ""


def _resolved(attachment: Attachment | None) -> Verdict:
    if attachment is None:
        return "Unknown", "Invalid", "no target is named: see Accepted"
    if attachment.epps is None:
        message = (
            f"there is no InferencePool {attachment.pool} in this namespace; "
            "the policy takes effect as soon as it is created"
        )
        return "False", "TargetNotFound", message
    return "True", "ResolvedRefs", ""


def _without_effect(subject: Subject, attachment: Attachment | None) -> Verdict | None:
    """Say why an object has no effect at a pool, if that does not depend on the EPPs."""
    if subject.problems:
        return "False", "Invalid", "the latest generation is not valid: see Accepted"
    if attachment is not None and attachment.refused is not None:
        return "False", attachment.refused[0], "has no effect: see Accepted"
    if attachment is None or attachment.epps is None:
        return "False", "TargetNotFound", "has no effect while its pool does not exist"
    if attachment.held_by:
        message = (
            f"FlowControlPolicy {attachment.held_by} is not valid: until it is fixed, "
            "EPPs keep the plan they have, and the operator cannot tell which plan that is"
        )
        return "Unknown", PLAN_HELD, message
    if not attachment.epps:
        return "False", "NoEndpointPickers", _no_epps(attachment)
    return None


def _programmed(subject: Subject, attachment: Attachment | None) -> Verdict:
    """Return whether all EPPs of a pool run the latest generation of its policy."""
    verdict = _without_effect(subject, attachment)
    if verdict is not None or attachment is None:
        return verdict or ("False", "Invalid", "")
    epps = attachment.epps or ()
    problems = pool_problems(epps)
    for reason in ("Rejected", "Stale", "UnsupportedByEndpointPicker"):
        if reason in problems:
            text = problems[reason]
            return "False", _unsupported(epps) if reason == "Rejected" else reason, text
    behind = [epp.name for epp in epps if not programs(subject, epp)]
    if not behind and attachment.shadow_of:
        return "False", SHADOW, "decides nothing; every EPP computes it beside the policy in force"
    if not behind:
        return "True", "Programmed", "every EPP runs it"
    if attachment.unsent is not None:
        return "False", *attachment.unsent
    return "False", "Pending", f"waits for {listed(behind)} to acknowledge"


def _unsupported(rejected: Sequence[EPP]) -> str:
    """Return why EPPs refuse: each of them does not know a field, or any other reason."""
    errors = [epp.error for epp in rejected if epp.state is EPPState.REJECTED]
    if all(error.startswith("Unsupported") for error in errors):
        return "UnsupportedByEndpointPicker"
    return "Rejected"


def _older(epps: Sequence[EPP]) -> str:
    return f"{listed([epp.name for epp in epps])}: {_age_of(epps)}"


def _age_of(epps: Sequence[EPP]) -> str:
    paths = sorted({path for epp in epps for path in epp.unsupported})
    return f"of an older release, which does not know {listed(paths)}: update it, or leave that out"


def _no_epps(attachment: Attachment) -> str:
    if attachment.service == "":
        return "no EPP is connected"
    if attachment.service is None:
        return (
            f"InferencePool {attachment.pool} names no Service as its endpointPickerRef: set it to "
            "the Service of the EPPs"
        )
    if attachment.shared_with:
        return (
            f"InferencePool {listed(attachment.shared_with)} names Service {attachment.service}, "
            "too, and an EPP serves one pool: give InferencePool "
            f"{attachment.pool} a Service and EPPs of its own"
        )
    return (
        f"no running pod is behind Service {attachment.service}, the endpointPickerRef of "
        f"InferencePool {attachment.pool}: deploy forebay's EPP for it"
    )


def _degraded(subject: Subject, attachment: Attachment | None) -> Verdict:
    if attachment is None or attachment.epps is None or attachment.refused is not None:
        return "False", "AsExpected", ""
    if subject.problems and subject.valid_generation is not None:
        message = f"generation {subject.valid_generation} is in force, not the latest"
        return "True", "LastValidInForce", message
    if subject.problems and attachment.held_by:
        message = "EPPs keep the plan they have; the operator knows no valid generation"
        return "True", PLAN_HELD, message
    stale = [p.name for p in attachment.epps if p.state is EPPState.STALE]
    if stale:
        message = f"{listed(stale)} cannot be reached and may run an older program"
        return "True", "EndpointPickersStale", message
    rejected = [p.name for p in attachment.epps if p.state is EPPState.REJECTED]
    if rejected:
        return "True", "EndpointPickersReject", f"{listed(rejected)} run an older program"
    if _failing(attachment.epps):
        message = (
            f"more than half of the endpoints of InferencePool {attachment.pool} get no requests "
            "because they cannot be reached or answer with errors: look at the model servers"
        )
        return "True", "EndpointsFailing", message
    if attachment.notes:
        return "True", "PoolDegraded", "; ".join(attachment.notes[:MAX_NAMED])
    return "False", "AsExpected", ""


def _failing(epps: Sequence[EPP]) -> bool:
    """Return whether over half of a pool's endpoints are out, by all EPPs' reports together."""
    reports = numbers.reports(epps)
    out = sum(min(report.endpoints_out, report.endpoints) for report in reports)
    return 2 * out > sum(report.endpoints for report in reports)


def _fix(subject: Subject) -> str:
    text = "; ".join(f"{path}: {what}" for path, what in subject.problems)
    if subject.valid_generation is None:
        return text
    return f"{text}. Generation {subject.valid_generation}, the last valid one, stays in force"
