"""From plans, acknowledgements and stats to what `.status` says. Pure.

Statuses follow the Kubernetes API conventions and GEP-713: observedGeneration on each condition, a
False one says why and what to do, lastTransitionTime moves only when the status flips. Numbers are
quantised, so that a status is written again only when something has changed that a person would
care about; exact values are the endpoint pickers' metrics. When and where a status is written is
reconcile.py's business.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from forebay_control.v1 import control_pb2 as pb

CONTROLLER_NAME = "forebay.dev/operator"
NOT_CLAIMED = "PoolNotClaimed"
MAX_ANCESTORS = 16  # the schema's
MAX_BANDS = 64  # the schema's
PLAN_HELD = "PlanHeld"
MAX_NAMED = 5
MAX_MESSAGE = 1024
_TOLD_BY_PROGRAMMED = ("EndpointPickersStale", "EndpointPickersReject")
_GOOD = 2  # rank of a condition that needs nothing done

_Verdict = tuple[str, str, str]  # a condition's status, reason and message


class PickerState(StrEnum):
    """Where an endpoint picker stands with the program it should run."""

    PROGRAMMED = "Programmed"
    PENDING = "Pending"
    REJECTED = "Rejected"
    STALE = "Stale"


@dataclass(frozen=True, slots=True)
class Picker:
    """One endpoint picker as the operator sees it.

    Attributes:
        name: its pod.
        connected: whether it has a stream.
        generations: uid -> generation of the objects in the program it has acknowledged.
        error: what it said when it refused, for people; the first word is the code.
        unsupported: what of the plan it is not sent since it does not know it, as field paths.
        stats: what it reported last.
    """

    name: str
    state: PickerState
    connected: bool = False
    generations: Mapping[str, int] = field(default_factory=dict)
    error: str = ""
    unsupported: tuple[str, ...] = ()
    stats: pb.Stats | None = None


@dataclass(frozen=True, slots=True)
class Attachment:
    """One pool a policy or model is for, and how it fares there.

    `refused` is the reason and message why it does not count there, if it does not. `pickers` is
    None where the pool does not exist. `service` is the one behind which they should be; None:
    the pool names none; "": there are no Services. `held_by` is the invalid policy for whose sake
    the pool's endpoint pickers keep the plan they have. `too_large` says so of the plan, which is
    then not sent. `shared_with` are other pools that name the same Service. `advice` is what is
    valid there and surely not meant.
    """

    pool: str
    group: str
    pickers: Sequence[Picker] | None
    refused: tuple[str, str] | None = None
    service: str | None = None
    notes: tuple[str, ...] = ()
    endpoints: int = 0
    held_by: str = ""
    too_large: str = ""
    shared_with: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Subject:
    """The object a status is for. `problems`: its latest generation is not valid."""

    uid: str
    namespace: str
    generation: int
    problems: Sequence[tuple[str, str]] = ()
    valid_generation: int | None = None


@dataclass(frozen=True, slots=True)
class Transition:
    """A condition whose status or reason is new. `before` is the status it had, "" for none."""

    type: str
    status: str
    reason: str
    message: str
    before: str = ""

    @property
    def bad(self) -> bool:
        """Whether somebody has to do something: of Degraded it is True that is bad."""
        return (self.status == "True") == (self.type == "Degraded")


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
    live = [a for a in attachments if a.pickers is not None and a.refused is None]
    pickers = [picker for attachment in live for picker in attachment.pickers or ()]
    verdicts = [_verdicts(subject, attachment) for attachment in attachments]
    found = _summary(attachments, verdicts) if attachments else _verdicts(subject, None)
    counts = {
        "desired": len(pickers),
        "connected": sum(picker.connected for picker in pickers),
        "programmed": sum(_programs(subject, picker) for picker in pickers),
        "rejected": sum(picker.state is PickerState.REJECTED for picker in pickers),
        "stale": sum(picker.state is PickerState.STALE for picker in pickers),
    }
    status: dict[str, Any] = {
        "conditions": _observed(subject, found),
        "ancestors": [
            _ancestor(subject, attachment, conditions, controller_name)
            for attachment, conditions in zip(attachments, verdicts, strict=True)
        ],
        "endpointPickers": {**counts, "ready": f"{counts['programmed']}/{counts['desired']}"},
        "pools": [_pool(attachment) for attachment in live],
    }
    if attachments:
        status["poolNames"] = ",".join(a.pool for a in attachments)[:MAX_MESSAGE]
    generations = [picker.generations.get(subject.uid, 0) for picker in pickers]
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
    if subject.problems:
        accepted = _condition("Accepted", "False", "Invalid", _fix(subject))
    elif attachment.refused is not None:
        accepted = _condition("Accepted", "False", *attachment.refused)
    elif attachment.pickers is None:
        message = f"waits for InferencePool {attachment.pool}, which does not exist"
        accepted = _condition("Accepted", "Unknown", "Pending", message)
    else:
        accepted = _condition("Accepted", "True", "Accepted", "")
    programmed = _condition("Programmed", *_model_programmed(subject, attachment))
    return {"conditions": _observed(subject, [accepted, programmed])}


def pool_problems(pickers: Sequence[Picker]) -> dict[str, str]:
    """Return what is wrong with a pool's EPPs, whether it has a policy or not: text by reason."""
    found: dict[str, str] = {}
    older = [picker for picker in pickers if picker.unsupported]
    if older:
        found["UnsupportedByEndpointPicker"] = _older(older)
    rejected = [picker for picker in pickers if picker.state is PickerState.REJECTED]
    if rejected:
        named = "; ".join(f"{picker.name}: {picker.error}" for picker in rejected[:MAX_NAMED])
        found["Rejected"] = f"{len(rejected)} of {len(pickers)} endpoint pickers refuse: {named}"
    stale = [picker.name for picker in pickers if picker.state is PickerState.STALE]
    if stale:
        found["Stale"] = (
            f"no connection from {_listed(stale)}; they keep the last program they had: look at "
            "their logs and at the network between them and the operator"
        )
    return found


def was_in_force(status: Mapping[str, Any]) -> bool:
    """Say whether a policy's status shows that endpoint pickers have run some generation of it."""
    return bool(status.get("programmedGeneration")) or any(
        condition.get("reason") == PLAN_HELD for condition in status.get("conditions") or ()
    )


def with_times(
    status: dict[str, Any],
    before: Mapping[str, Any],
    now: str,
    controller_name: str = CONTROLLER_NAME,
) -> dict[str, Any]:
    """Give each condition its lastTransitionTime: `now` only where its status has flipped.

    The list of ancestors is written as a whole, so those of other controllers are kept in it.
    """
    times = _times(before.get("conditions"))
    old_ancestors = {
        _key(ancestor): _times(ancestor.get("conditions"))
        for ancestor in before.get("ancestors") or ()
        if isinstance(ancestor, dict)
    }
    stamped = dict(status)
    if "conditions" in status:
        stamped["conditions"] = _stamped(status["conditions"], times, now)
    if "ancestors" in status:
        stamped["ancestors"] = [
            {
                **ancestor,
                "conditions": _stamped(
                    ancestor["conditions"], old_ancestors.get(_key(ancestor), {}), now
                ),
            }
            for ancestor in status["ancestors"]
        ]
        others = [
            ancestor
            for ancestor in before.get("ancestors") or ()
            if isinstance(ancestor, dict) and ancestor.get("controllerName") != controller_name
        ]
        stamped["ancestors"] = [*stamped["ancestors"], *others][:MAX_ANCESTORS]
    return stamped


def differs(
    desired: Mapping[str, Any],
    observed: Mapping[str, Any],
    controller_name: str = CONTROLLER_NAME,
) -> str:
    """Compare, times aside: "" the same, "numbers" only live numbers moved, "meaning" more.

    Only what we write is looked at: what other writers add is theirs.
    """
    if _meaning(desired, desired, controller_name) != _meaning(observed, desired, controller_name):
        return "meaning"
    mine = {pool["name"] for pool in desired.get("pools") or ()}
    pools = [pool for pool in observed.get("pools") or () if pool.get("name") in mine]
    if pools != (desired.get("pools") or []):
        return "numbers"
    numbers = ("queued", "saturation")
    if "conditions" in desired and any(desired.get(n) != observed.get(n) for n in numbers):
        return "numbers"
    return ""


def transitions(desired: Mapping[str, Any], observed: Mapping[str, Any]) -> list[Transition]:
    """Return what has become of each condition whose status or reason is new.

    One that only repeats what another says is left out.
    """
    before = {
        condition.get("type"): (condition.get("status"), condition.get("reason"))
        for condition in observed.get("conditions") or ()
    }
    refused = {
        c["reason"]
        for c in desired.get("conditions") or ()
        if c["type"] == "Accepted" and c["status"] == "False"
    }
    return [
        Transition(
            c["type"], c["status"], c["reason"], c["message"], before.get(c["type"], ("",))[0] or ""
        )
        for c in desired.get("conditions") or ()
        if before.get(c["type"]) != (c["status"], c["reason"])
        and (c["type"] == "Accepted" or c["reason"] not in refused)
        and c["reason"] not in _TOLD_BY_PROGRAMMED
    ]


def unsettled(status: Mapping[str, Any]) -> bool:
    """Say whether the status is one that acknowledgements are about to change."""
    return any(
        condition["type"] == "Programmed" and condition["reason"] == "Pending"
        for condition in status.get("conditions") or ()
    )


# --- conditions


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
    if attachment is None or attachment.pickers is None:
        return "False", "TargetNotFound", "its pool does not exist: see ResolvedRefs"
    more = len(attachment.advice) - MAX_NAMED
    advice = "; ".join(attachment.advice[:MAX_NAMED]) + (f"; and {more} more" if more > 0 else "")
    return "True", "Accepted", f"look again at this: {advice}" if advice else ""


def _resolved(attachment: Attachment | None) -> _Verdict:
    if attachment is None:
        return "Unknown", "Invalid", "no target is named: see Accepted"
    if attachment.pickers is None:
        message = (
            f"there is no InferencePool {attachment.pool} in this namespace; "
            "it counts as soon as it is created"
        )
        return "False", "TargetNotFound", message
    return "True", "ResolvedRefs", ""


def _programs(subject: Subject, picker: Picker) -> bool:
    """Say whether a picker runs the latest generation."""
    return picker.generations.get(subject.uid) == subject.generation


def _without_effect(subject: Subject, attachment: Attachment | None) -> _Verdict | None:
    """Say why an object has no effect at a pool, if that does not depend on the EPPs."""
    if subject.problems:
        return "False", "Invalid", "the latest generation is not valid: see Accepted"
    if attachment is not None and attachment.refused is not None:
        return "False", attachment.refused[0], "has no effect: see Accepted"
    if attachment is None or attachment.pickers is None:
        return "False", "TargetNotFound", "has no effect while its pool does not exist"
    if attachment.held_by:
        message = (
            f"FlowControlPolicy {attachment.held_by} is not valid: until it is mended, endpoint "
            "pickers keep the plan they have, and the operator does not know which that is"
        )
        return "Unknown", PLAN_HELD, message
    if not attachment.pickers:
        return "False", "NoEndpointPickers", _no_pickers(attachment)
    return None


def _programmed(subject: Subject, attachment: Attachment | None) -> _Verdict:
    """Say whether all EPPs of a pool run the latest generation of its policy."""
    verdict = _without_effect(subject, attachment)
    if verdict is not None or attachment is None:
        return verdict or ("False", "Invalid", "")
    pickers = attachment.pickers or ()
    problems = pool_problems(pickers)
    for reason in ("Rejected", "Stale", "UnsupportedByEndpointPicker"):
        if reason in problems:
            text = problems[reason]
            return "False", _unsupported(pickers) if reason == "Rejected" else reason, text
    behind = [picker.name for picker in pickers if not _programs(subject, picker)]
    if not behind:
        return "True", "Programmed", "every endpoint picker runs it"
    if attachment.too_large:
        return "False", "TooLarge", attachment.too_large
    return "False", "Pending", f"waits for {_listed(behind)} to acknowledge"


def _model_programmed(subject: Subject, attachment: Attachment) -> _Verdict:
    """Say whether the EPPs that serve run the latest generation of a model.

    An EPP that cannot be reached serves by what it acknowledged last, and one that has acknowledged
    nothing yet is not ready. Neither is news about a model that the others run.
    """
    verdict = _without_effect(subject, attachment)
    if verdict is not None:
        return verdict
    pickers = attachment.pickers or ()
    serving = [picker for picker in pickers if picker.generations] or pickers
    older = [
        picker
        for picker in serving
        if any(path.startswith("plan.models") for path in picker.unsupported)
        or (picker.unsupported and not _programs(subject, picker))
    ]
    if older:
        text = f"an endpoint picker is {_age_of(older)}"
        return "False", "UnsupportedByEndpointPicker", text
    behind = [picker for picker in serving if not _programs(subject, picker)]
    if not behind:
        return "True", "Programmed", "every endpoint picker that serves runs it"
    rejected = [picker for picker in behind if picker.state is PickerState.REJECTED]
    if rejected:
        error = min(picker.error for picker in rejected)
        return "False", _unsupported(rejected), f"an endpoint picker refuses the plan: {error}"
    if any(picker.state is PickerState.STALE for picker in behind):
        return "False", "Stale", "an endpoint picker that runs an older plan cannot be reached"
    if attachment.too_large:
        return "False", "TooLarge", attachment.too_large
    return "False", "Pending", "waits for endpoint pickers to acknowledge"


def _unsupported(rejected: Sequence[Picker]) -> str:
    """Return the reason of EPPs that refuse: another one where all do not know a field."""
    errors = [picker.error for picker in rejected if picker.state is PickerState.REJECTED]
    if all(error.startswith("Unsupported") for error in errors):
        return "UnsupportedByEndpointPicker"
    return "Rejected"


def _older(pickers: Sequence[Picker]) -> str:
    return f"{_listed([picker.name for picker in pickers])}: {_age_of(pickers)}"


def _age_of(pickers: Sequence[Picker]) -> str:
    paths = sorted({path for picker in pickers for path in picker.unsupported})
    return (
        f"of an older release, which does not know {_listed(paths)}: update it, or leave that out"
    )


def _no_pickers(attachment: Attachment) -> str:
    if attachment.service == "":
        return "no endpoint picker is connected"
    if attachment.service is None:
        return (
            f"InferencePool {attachment.pool} names no Service as its endpointPickerRef: set it to "
            "the Service of the endpoint pickers"
        )
    if attachment.shared_with:
        return (
            f"InferencePool {_listed(attachment.shared_with)} names Service {attachment.service}, "
            "too, and an endpoint picker serves one pool: give InferencePool "
            f"{attachment.pool} a Service and endpoint pickers of its own"
        )
    return (
        f"no running pod is behind Service {attachment.service}, the endpointPickerRef of "
        f"InferencePool {attachment.pool}: deploy forebay's endpoint picker for it"
    )


def _degraded(subject: Subject, attachment: Attachment | None) -> _Verdict:
    if attachment is None or attachment.pickers is None or attachment.refused is not None:
        return "False", "AsExpected", ""
    if subject.problems and subject.valid_generation is not None:
        message = f"generation {subject.valid_generation} is in force, not the latest"
        return "True", "LastValidInForce", message
    if subject.problems and attachment.held_by:
        message = "endpoint pickers keep the plan they have; the operator knows no valid generation"
        return "True", PLAN_HELD, message
    stale = [p.name for p in attachment.pickers if p.state is PickerState.STALE]
    if stale:
        message = f"{_listed(stale)} cannot be reached and may run an older program"
        return "True", "EndpointPickersStale", message
    rejected = [p.name for p in attachment.pickers if p.state is PickerState.REJECTED]
    if rejected:
        return "True", "EndpointPickersReject", f"{_listed(rejected)} run an older program"
    if _failing(attachment.pickers):
        message = (
            f"more than half of the endpoints of InferencePool {attachment.pool} get no requests "
            "since they cannot be reached or answer with errors: look at the model servers"
        )
        return "True", "EndpointsFailing", message
    if attachment.notes:
        return "True", "PoolDegraded", "; ".join(attachment.notes[:MAX_NAMED])
    return "False", "AsExpected", ""


def _failing(pickers: Sequence[Picker]) -> bool:
    """Say whether more than half of a pool's endpoints are out, by all EPPs' reports together."""
    reports = _reports(pickers)
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


# --- numbers


def _pool(attachment: Attachment) -> dict[str, Any]:
    """Add up what the pool's endpoint pickers report.

    A band that few report gives way where there are more than the schema takes.
    """
    reports = _reports(attachment.pickers or ())
    bands: dict[str, dict[str, Any]] = {}
    for report in reports:
        for band in report.bands:
            sums = bands.setdefault(
                band.band,
                {
                    "band": band.band,
                    "requests": 0,
                    "bytes": 0,
                    "oldestSeconds": 0.0,
                    "dispatched": 0,
                    "rejected": 0,
                    "evicted": 0,
                },
            )
            for name in ("requests", "bytes", "dispatched", "rejected", "evicted"):
                sums[name] += getattr(band, name)
            sums["oldestSeconds"] = max(sums["oldestSeconds"], band.oldest_seconds)
    named = Counter(band.band for report in reports for band in report.bands)
    kept = sorted(bands, key=lambda name: (-named[name], name))[:MAX_BANDS]
    for sums in bands.values():
        for name in ("requests", "bytes", "dispatched", "rejected", "evicted"):
            sums[name] = quantised(sums[name])
        sums["oldestSeconds"] = quantised(round(sums["oldestSeconds"]))
    saturation = max((report.saturation for report in reports), default=0.0)
    return {
        "name": attachment.pool,
        "saturation": f"{min(round(saturation * 20) / 20, 99.0):.2f}",
        "endpoints": attachment.endpoints,
        "queues": [bands[name] for name in sorted(kept)],
    }


def _reports(pickers: Sequence[Picker]) -> list[pb.Stats]:
    """Return what EPPs report; what one that cannot be reached said last is no longer so."""
    return [
        picker.stats
        for picker in pickers
        if picker.stats is not None and picker.state is not PickerState.STALE
    ]


def quantised(value: int) -> int:
    """Keep two digits: 7, 42, 130, 5,300."""
    step = 1
    while value // step >= 100:
        step *= 10
    return value // step * step


# --- comparing


def _times(conditions: Iterable[Any] | None) -> dict[str, tuple[str, str]]:
    return {
        condition["type"]: (condition.get("status", ""), condition.get("lastTransitionTime", ""))
        for condition in conditions or ()
        if isinstance(condition, dict) and "type" in condition
    }


def _stamped(
    conditions: list[dict[str, Any]], times: dict[str, tuple[str, str]], now: str
) -> list[dict[str, Any]]:
    stamped = []
    for condition in conditions:
        status, since = times.get(condition["type"], ("", ""))
        same = status == condition["status"] and since
        stamped.append({**condition, "lastTransitionTime": since if same else now})
    return stamped


def _key(ancestor: Mapping[str, Any]) -> str:
    reference = ancestor.get("ancestorRef") or {}
    return f"{reference.get('group')}/{reference.get('name')}/{ancestor.get('controllerName')}"


def _meaning(status: Mapping[str, Any], like: Mapping[str, Any], controller_name: str) -> Any:
    """Return what of a status people act on, only the parts that `like` has too."""
    types = {c["type"] for c in like.get("conditions") or ()}
    mine = {pool["name"] for pool in like.get("pools") or ()}
    conditions = {
        c.get("type"): (
            c.get("status"),
            c.get("reason"),
            c.get("message"),
            c.get("observedGeneration"),
        )
        for c in status.get("conditions") or ()
        if c.get("type") in types
    }
    ancestors = {
        _key(a): [
            (c.get("type"), c.get("status"), c.get("reason"), c.get("message"))
            for c in a.get("conditions") or ()
        ]
        for a in status.get("ancestors") or ()
        if a.get("controllerName") == controller_name
    }
    return (
        conditions,
        ancestors,
        status.get("programmedGeneration") if types else None,
        status.get("endpointPickers") if types else None,
        status.get("poolNames") if types else None,
        sorted(p["name"] for p in status.get("pools") or () if p.get("name") in mine),
    )
