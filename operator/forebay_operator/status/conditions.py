"""Turns plans, acknowledgements and stats into the conditions of `.status`. Pure.

Statuses follow the Kubernetes API conventions and GEP-713: observedGeneration on each condition, a
False one says why and what to do, lastTransitionTime moves only when the status flips. Numbers are
quantised, so that a status is written again only when something has changed that a person would
care about; exact values are the EPPs' metrics. When and where a status is written
belongs in reconcile/.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from forebay_operator.status import numbers
from forebay_operator.status.observed import CONTROLLER_NAME, EPPState

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from forebay_control.plan import Plan
    from forebay_operator.status.observed import EPP, Attachment, Subject

NOT_CLAIMED = "PoolNotClaimed"
PLAN_HELD = "PlanHeld"
MAX_NAMED = 5
MAX_MESSAGE = 1024
_GOOD = 2  # rank of a condition that needs nothing done

_Verdict = tuple[str, str, str]  # a condition's status, reason and message


def policy_status(
    subject: Subject,
    attachments: Sequence[Attachment],
    controller_name: str = CONTROLLER_NAME,
    *,
    summary: bool = True,
) -> dict[str, Any]:
    """Return the status of a FlowControlPolicy, its conditions without times.

    Args:
        subject: the policy.
        attachments: its pools, without those of other controllers.
        controller_name: whose status it is.
        summary: whether the parts about all pools together are this controller's to write.
    """
    live = [a for a in attachments if a.epps is not None and a.refused is None]
    epps = [epp for attachment in live for epp in attachment.epps or ()]
    verdicts = [_verdicts(subject, attachment) for attachment in attachments]
    found = _summary(attachments, verdicts) if attachments else _verdicts(subject, None)
    counts = {
        "desired": len(epps),
        "connected": sum(epp.connected for epp in epps),
        "programmed": sum(_programs(subject, epp) for epp in epps),
        "rejected": sum(epp.state is EPPState.REJECTED for epp in epps),
        "stale": sum(epp.state is EPPState.STALE for epp in epps),
    }
    status: dict[str, Any] = {
        "conditions": _observed(subject, found),
        "ancestors": [
            _ancestor(subject, attachment, conditions, controller_name)
            for attachment, conditions in zip(attachments, verdicts, strict=True)
        ],
        "endpointPickers": {**counts, "ready": f"{counts['programmed']}/{counts['desired']}"},
        "pools": [numbers.of_pool(attachment) for attachment in live],
    }
    if attachments:
        status["poolNames"] = ",".join(a.pool for a in attachments)[:MAX_MESSAGE]
    generations = [epp.generations.get(subject.uid, 0) for epp in epps]
    if generations and min(generations) > 0:
        status["programmedGeneration"] = min(generations)
    if live:
        status["queued"] = sum(q["requests"] for pool in status["pools"] for q in pool["queues"])
        status["saturation"] = max((pool["saturation"] for pool in status["pools"]), key=float)
    if not summary:
        return {name: status[name] for name in ("ancestors", "pools")}
    return status


def model_status(subject: Subject, attachment: Attachment) -> dict[str, Any]:
    """Return the status of an InferenceModel, its conditions without times.

    It names and counts no EPPs: a pool has thousands of models, and EPPs come and go.
    """
    accepted = _counted(subject, attachment)
    programmed = _condition("Programmed", *_model_programmed(subject, attachment))
    return {"conditions": _observed(subject, [accepted, programmed])}


def objective_status(
    subject: Subject, attachment: Attachment, plan: Plan | None, band: str | None
) -> dict[str, Any]:
    """Return the status of an InferenceObjective, its conditions without times.

    Args:
        subject: the objective.
        attachment: its pool.
        plan: the pool's plan; None where EPPs keep the one they have.
        band: the one that the objective joins by the plan; None where it is left out.
    """
    accepted = _counted(subject, attachment)
    if accepted["status"] != "True" or plan is None:
        return {"conditions": _observed(subject, [accepted])}
    if band is None:
        message = f"InferencePool {attachment.pool} has too many objectives: delete some"
        accepted = _condition("Accepted", "False", "TooManyObjectives", message)
    elif plan.trust_objective_header:
        message = f"requests that name it join band {band}"
        accepted = _condition("Accepted", "True", "Accepted", message)
    else:
        message = (
            "no request may name it: set trustedHeaders: [Objective] in a FlowControlPolicy of "
            f"InferencePool {attachment.pool}, if only callers that you trust can set the header"
        )
        accepted = _condition("Accepted", "True", "Accepted", message)
    return {"conditions": _observed(subject, [accepted])}


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
            f"no connection from {_listed(stale)}; they keep the last program they had: look at "
            "their logs and at the network between them and the operator"
        )
    return found


# --- conditions


def _counted(subject: Subject, attachment: Attachment) -> dict[str, Any]:
    """Return whether an object of one pool counts there."""
    if subject.problems:
        return _condition("Accepted", "False", "Invalid", _fix(subject))
    if attachment.refused is not None:
        return _condition("Accepted", "False", *attachment.refused)
    if attachment.epps is None:
        message = f"waits for InferencePool {attachment.pool}, which does not exist"
        return _condition("Accepted", "Unknown", "Pending", message)
    return _condition("Accepted", "True", "Accepted", "")


def _condition(kind: str, status: str, reason: str, message: str) -> dict[str, Any]:
    if len(message) > MAX_MESSAGE:
        message = f"{message[: MAX_MESSAGE - 3]}..."
    return {"type": kind, "status": status, "reason": reason, "message": message}


def _fix(subject: Subject) -> str:
    text = "; ".join(f"{path}: {what}" for path, what in subject.problems)
    if subject.valid_generation is None:
        return text
    return f"{text}. Generation {subject.valid_generation}, the last valid one, stays in force"


def _observed(subject: Subject, conditions: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**c, "observedGeneration": subject.generation} for c in conditions]


def _summary(
    attachments: Sequence[Attachment], verdicts: Sequence[list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Return of each type the worst condition, saying at which pools."""
    found = []
    for same in zip(*verdicts, strict=True):
        worst = min(same, key=_rank)
        equals = {
            attachment.pool: c["message"]
            for attachment, c in zip(attachments, same, strict=True)
            if (c["status"], c["reason"]) == (worst["status"], worst["reason"])
        }
        message = worst["message"]
        differ = len(set(equals.values())) > 1
        if len(attachments) > 1 and (differ or _rank(worst) != _GOOD):
            texts: dict[str, list[str]] = {}
            for pool, text in equals.items():
                if text:
                    texts.setdefault(text, []).append(pool)
            message = "; ".join(
                f"InferencePool {_listed(pools)}: {text}"
                for text, pools in list(texts.items())[:MAX_NAMED]
            )
        found.append(_condition(worst["type"], worst["status"], worst["reason"], message))
    return found


def _rank(condition: Mapping[str, Any]) -> int:
    """Order conditions of one type, the worst first."""
    bad = "True" if condition["type"] == "Degraded" else "False"
    return {bad: 0, "Unknown": 1}.get(condition["status"], _GOOD)


def _verdicts(subject: Subject, attachment: Attachment | None) -> list[dict[str, Any]]:
    """Return the four conditions at one pool; None: no pool can be read from the policy."""
    found = {
        "Accepted": _accepted(subject, attachment),
        "ResolvedRefs": _resolved(attachment),
        "Programmed": _programmed(subject, attachment),
        "Degraded": _degraded(subject, attachment),
    }
    return [_condition(kind, *verdict) for kind, verdict in found.items()]


def _accepted(subject: Subject, attachment: Attachment | None) -> _Verdict:
    if subject.problems:
        return "False", "Invalid", _fix(subject)
    if attachment is not None and attachment.refused is not None:
        return "False", *attachment.refused
    if attachment is None or attachment.epps is None:
        return "False", "TargetNotFound", "its pool does not exist: see ResolvedRefs"
    more = len(attachment.advice) - MAX_NAMED
    advice = "; ".join(attachment.advice[:MAX_NAMED]) + (f"; and {more} more" if more > 0 else "")
    return "True", "Accepted", f"look again at this: {advice}" if advice else ""


def _resolved(attachment: Attachment | None) -> _Verdict:
    if attachment is None:
        return "Unknown", "Invalid", "no target is named: see Accepted"
    if attachment.epps is None:
        message = (
            f"there is no InferencePool {attachment.pool} in this namespace; "
            "the policy takes effect as soon as it is created"
        )
        return "False", "TargetNotFound", message
    return "True", "ResolvedRefs", ""


def _programs(subject: Subject, epp: EPP) -> bool:
    """Return whether an EPP runs the latest generation."""
    return epp.generations.get(subject.uid) == subject.generation


def _without_effect(subject: Subject, attachment: Attachment | None) -> _Verdict | None:
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


def _programmed(subject: Subject, attachment: Attachment | None) -> _Verdict:
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
    behind = [epp.name for epp in epps if not _programs(subject, epp)]
    if not behind:
        return "True", "Programmed", "every EPP runs it"
    if attachment.unsent is not None:
        return "False", *attachment.unsent
    return "False", "Pending", f"waits for {_listed(behind)} to acknowledge"


def _model_programmed(subject: Subject, attachment: Attachment) -> _Verdict:
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
        or (epp.unsupported and not _programs(subject, epp))
    ]
    if older:
        text = f"an EPP is {_age_of(older)}"
        return "False", "UnsupportedByEndpointPicker", text
    behind = [epp for epp in serving if not _programs(subject, epp)]
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


def _unsupported(rejected: Sequence[EPP]) -> str:
    """Return the reason of EPPs that refuse: another one where all do not know a field."""
    errors = [epp.error for epp in rejected if epp.state is EPPState.REJECTED]
    if all(error.startswith("Unsupported") for error in errors):
        return "UnsupportedByEndpointPicker"
    return "Rejected"


def _older(epps: Sequence[EPP]) -> str:
    return f"{_listed([epp.name for epp in epps])}: {_age_of(epps)}"


def _age_of(epps: Sequence[EPP]) -> str:
    paths = sorted({path for epp in epps for path in epp.unsupported})
    return (
        f"of an older release, which does not know {_listed(paths)}: update it, or leave that out"
    )


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
            f"InferencePool {_listed(attachment.shared_with)} names Service {attachment.service}, "
            "too, and an EPP serves one pool: give InferencePool "
            f"{attachment.pool} a Service and EPPs of its own"
        )
    return (
        f"no running pod is behind Service {attachment.service}, the endpointPickerRef of "
        f"InferencePool {attachment.pool}: deploy forebay's EPP for it"
    )


def _degraded(subject: Subject, attachment: Attachment | None) -> _Verdict:
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
        message = f"{_listed(stale)} cannot be reached and may run an older program"
        return "True", "EndpointPickersStale", message
    rejected = [p.name for p in attachment.epps if p.state is EPPState.REJECTED]
    if rejected:
        return "True", "EndpointPickersReject", f"{_listed(rejected)} run an older program"
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


def _ancestor(
    subject: Subject,
    attachment: Attachment,
    conditions: list[dict[str, Any]],
    controller_name: str,
) -> dict[str, Any]:
    return {
        "ancestorRef": {
            "group": attachment.group,
            "kind": "InferencePool",
            "namespace": subject.namespace,
            "name": attachment.pool,
        },
        "controllerName": controller_name,
        "conditions": _observed(subject, conditions),
    }


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
