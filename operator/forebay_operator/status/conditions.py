"""Builds the statuses of policies, models and objectives from verdicts and numbers. Pure.

Statuses follow the Kubernetes API conventions and GEP-713: observedGeneration on each condition,
lastTransitionTime moves only when the status flips. Numbers are quantised, so that a status is
written again only when something has changed that a person would care about; exact values are the
EPPs' metrics. What is wrong, and why, is judged in verdicts.py; when and where a status is written
belongs in reconcile/.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from forebay_operator.status import numbers, verdicts
from forebay_operator.status.observed import CONTROLLER_NAME, EPPState
from forebay_operator.status.verdicts import MAX_NAMED, listed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from forebay_control.plan import Plan
    from forebay_operator.status.observed import Attachment, Subject

NOT_CLAIMED = "PoolNotClaimed"
MAX_MESSAGE = 1024
_GOOD = 2  # rank of a condition that needs nothing done


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
    at_pools = [_at_pool(subject, attachment) for attachment in attachments]
    found = _summary(attachments, at_pools) if attachments else _at_pool(subject, None)
    counts = {
        "desired": len(epps),
        "connected": sum(epp.connected for epp in epps),
        "programmed": sum(verdicts.programs(subject, epp) for epp in epps),
        "rejected": sum(epp.state is EPPState.REJECTED for epp in epps),
        "stale": sum(epp.state is EPPState.STALE for epp in epps),
    }
    status: dict[str, Any] = {
        "conditions": _observed(subject, found),
        "ancestors": [
            _ancestor(subject, attachment, conditions, controller_name)
            for attachment, conditions in zip(attachments, at_pools, strict=True)
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
    accepted = _condition("Accepted", *verdicts.counted(subject, attachment))
    programmed = _condition("Programmed", *verdicts.model_programmed(subject, attachment))
    return {"conditions": _observed(subject, [accepted, programmed])}


def objective_status(
    subject: Subject, attachment: Attachment, plan: Plan | None, band: str | None
) -> dict[str, Any]:
    """Return the status of an InferenceObjective, its condition without times.

    Plan and band are the pool's, as `verdicts.objective_counted` takes them.
    """
    verdict = verdicts.objective_counted(subject, attachment, plan, band)
    return {"conditions": _observed(subject, [_condition("Accepted", *verdict)])}


def was_reported(status: Mapping[str, Any]) -> bool:
    """Return whether an operator of forebay has written the status of a model or objective."""
    return any(c.get("type") == "Accepted" for c in status.get("conditions") or ())


# --- conditions


def _condition(kind: str, status: str, reason: str, message: str) -> dict[str, Any]:
    if len(message) > MAX_MESSAGE:
        message = f"{message[: MAX_MESSAGE - 3]}..."
    return {"type": kind, "status": status, "reason": reason, "message": message}


def _observed(subject: Subject, conditions: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**c, "observedGeneration": subject.generation} for c in conditions]


def _summary(
    attachments: Sequence[Attachment], at_pools: Sequence[list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Return of each type the worst condition, saying at which pools."""
    found = []
    for same in zip(*at_pools, strict=True):
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
                f"InferencePool {listed(pools)}: {text}"
                for text, pools in list(texts.items())[:MAX_NAMED]
            )
        found.append(_condition(worst["type"], worst["status"], worst["reason"], message))
    return found


def _rank(condition: Mapping[str, Any]) -> int:
    """Order conditions of one type, the worst first."""
    bad = "True" if condition["type"] == "Degraded" else "False"
    return {bad: 0, "Unknown": 1}.get(condition["status"], _GOOD)


def _at_pool(subject: Subject, attachment: Attachment | None) -> list[dict[str, Any]]:
    """Return the four conditions of a policy at one pool."""
    found = verdicts.of_policy(subject, attachment)
    return [_condition(kind, *verdict) for kind, verdict in found.items()]


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
