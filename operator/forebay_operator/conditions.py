"""From plans, acknowledgements and stats to what `.status` says. Pure.

Statuses follow the Kubernetes API conventions and GEP-713: observedGeneration on each condition, a
False one says why and what to do, lastTransitionTime moves only when the status flips. Numbers are
quantised, so that a status is written again only when something has changed that a person would
care about; exact values are the endpoint pickers' metrics. When and where a status is written is
reconcile.py's business.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from forebay_control.v1 import control_pb2 as pb

CONTROLLER_NAME = "forebay.dev/operator"
NOT_CLAIMED = "PoolNotClaimed"
MAX_ANCESTORS = 16  # the schema's
PLAN_HELD = "PlanHeld"
MAX_NAMED = 5
MAX_MESSAGE = 1024


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
    then not sent.
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
    accepted = _accepted(subject, attachments)
    conditions = [
        accepted,
        _resolved(attachments),
        _programmed(subject, attachments, pickers),
        _degraded(subject, attachments, pickers),
    ]
    counts = {
        "desired": len(pickers),
        "connected": sum(picker.connected for picker in pickers),
        "programmed": sum(_programs(subject, picker) for picker in pickers),
        "rejected": sum(picker.state is PickerState.REJECTED for picker in pickers),
        "stale": sum(picker.state is PickerState.STALE for picker in pickers),
    }
    status: dict[str, Any] = {
        "conditions": [{**c, "observedGeneration": subject.generation} for c in conditions],
        "ancestors": [_ancestor(subject, each, controller_name) for each in attachments],
        "endpointPickers": {**counts, "ready": f"{counts['programmed']}/{counts['desired']}"},
        "pools": [_pool(attachment) for attachment in live],
    }
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
    """Return the status of an InferenceModel, its conditions without times."""
    if subject.problems:
        accepted = _condition("Accepted", "False", "Invalid", _fix(subject))
    elif attachment.refused is not None:
        accepted = _condition("Accepted", "False", *attachment.refused)
    elif attachment.pickers is None:
        message = f"waits for InferencePool {attachment.pool}, which does not exist"
        accepted = _condition("Accepted", "Unknown", "Pending", message)
    else:
        accepted = _condition("Accepted", "True", "Accepted", "")
    programmed = _programmed(subject, [attachment], attachment.pickers or (), "plan.models")
    conditions = [accepted, programmed]
    return {"conditions": [{**c, "observedGeneration": subject.generation} for c in conditions]}


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

    One that only repeats why the object is not accepted is left out.
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


def _accepted(subject: Subject, attachments: Sequence[Attachment]) -> dict[str, Any]:
    if subject.problems:
        return _condition("Accepted", "False", "Invalid", _fix(subject))
    refused = [attachment.refused for attachment in attachments if attachment.refused]
    if refused:
        reason = refused[0][0]
        return _condition("Accepted", "False", reason, "; ".join(text for _, text in refused))
    return _condition("Accepted", "True", "Accepted", "")


def _resolved(attachments: Sequence[Attachment]) -> dict[str, Any]:
    if not attachments:
        return _condition("ResolvedRefs", "Unknown", "Invalid", "no target is named: see Accepted")
    missing = [attachment.pool for attachment in attachments if attachment.pickers is None]
    if missing:
        message = (
            f"there is no InferencePool {_listed(missing)} in this namespace; "
            "it counts as soon as it is created"
        )
        return _condition("ResolvedRefs", "False", "TargetNotFound", message)
    return _condition("ResolvedRefs", "True", "ResolvedRefs", "")


def _programs(subject: Subject, picker: Picker) -> bool:
    """Say whether a picker runs the latest generation."""
    return picker.generations.get(subject.uid) == subject.generation


def _programmed(
    subject: Subject,
    attachments: Sequence[Attachment],
    pickers: Sequence[Picker],
    part: str = "plan.",
) -> dict[str, Any]:
    """Say whether all EPPs run the latest generation; `part`: which fields of the plan it is."""

    def false(reason: str, message: str) -> dict[str, Any]:
        return _condition("Programmed", "False", reason, message)

    if subject.problems:
        return false("Invalid", "the latest generation is not valid: see Accepted")
    counting = [attachment for attachment in attachments if attachment.refused is None]
    if not counting:
        reason, _ = attachments[0].refused or ("Pending", "")
        return false(reason, "has no effect: see Accepted")
    if all(attachment.pickers is None for attachment in counting):
        return false("TargetNotFound", "has no effect while its pool does not exist")
    held = next((attachment.held_by for attachment in counting if attachment.held_by), "")
    if held:
        message = (
            f"FlowControlPolicy {held} is not valid: until it is mended, endpoint pickers keep the "
            "plan they have, and the operator does not know which that is"
        )
        return _condition("Programmed", "Unknown", PLAN_HELD, message)
    rejected = [picker for picker in pickers if picker.state is PickerState.REJECTED]
    if rejected:
        named = "; ".join(f"{picker.name}: {picker.error}" for picker in rejected[:MAX_NAMED])
        unsupported = all(picker.error.startswith("Unsupported") for picker in rejected)
        reason = "UnsupportedByEndpointPicker" if unsupported else "Rejected"
        return false(reason, f"{len(rejected)} of {len(pickers)} endpoint pickers refuse: {named}")
    stale = [picker.name for picker in pickers if picker.state is PickerState.STALE]
    if stale:
        message = (
            f"no connection from {_listed(stale)}; they keep the last program they had: look at "
            "their logs and at the network between them and the operator"
        )
        return false("Stale", message)
    if (behind := _behind(subject, counting, pickers, part)) is not None:
        return false(*behind)
    idle = [a for a in counting if a.pickers is not None and not a.pickers]
    if idle:
        return false("NoEndpointPickers", _no_pickers(idle[0]))
    return _condition(
        "Programmed",
        "True",
        "Programmed",
        f"{len(pickers)} of {len(pickers)} endpoint pickers run it",
    )


def _older(pickers: Sequence[Picker]) -> str:
    paths = sorted({path for picker in pickers for path in picker.unsupported})
    return (
        f"{_listed([picker.name for picker in pickers])}: of an older release, which does not know "
        f"{_listed(paths)}: update it, or leave that out"
    )


def _behind(
    subject: Subject, attachments: Sequence[Attachment], pickers: Sequence[Picker], part: str
) -> tuple[str, str] | None:
    """Return reason and message where EPPs do not run the latest generation, or a part of it."""
    older = [
        picker
        for picker in pickers
        if any(path.startswith(part) for path in picker.unsupported)
        or (picker.unsupported and not _programs(subject, picker))
    ]
    if older:
        return "UnsupportedByEndpointPicker", _older(older)
    behind = [picker.name for picker in pickers if not _programs(subject, picker)]
    if not behind:
        return None
    too_large = next((a.too_large for a in attachments if a.too_large), "")
    if too_large:
        return "TooLarge", too_large
    return "Pending", f"waits for {_listed(behind)} to acknowledge"


def _no_pickers(attachment: Attachment) -> str:
    if attachment.service == "":
        return "no endpoint picker is connected"
    if attachment.service is None:
        return (
            f"InferencePool {attachment.pool} names no Service as its endpointPickerRef: set it to "
            "the Service of the endpoint pickers"
        )
    return (
        f"no running pod is behind Service {attachment.service}, the endpointPickerRef of "
        f"InferencePool {attachment.pool}: deploy forebay's endpoint picker for it"
    )


def _degraded(
    subject: Subject, attachments: Sequence[Attachment], pickers: Sequence[Picker]
) -> dict[str, Any]:
    if subject.problems and subject.valid_generation is not None:
        message = f"generation {subject.valid_generation} is in force, not the latest"
        return _condition("Degraded", "True", "LastValidInForce", message)
    if subject.problems and any(attachment.held_by for attachment in attachments):
        message = "endpoint pickers keep the plan they have; the operator knows no valid generation"
        return _condition("Degraded", "True", PLAN_HELD, message)
    stale = [picker.name for picker in pickers if picker.state is PickerState.STALE]
    if stale:
        message = f"{_listed(stale)} cannot be reached and may run an older program"
        return _condition("Degraded", "True", "EndpointPickersStale", message)
    rejected = [picker.name for picker in pickers if picker.state is PickerState.REJECTED]
    if rejected:
        message = f"{_listed(rejected)} run an older program"
        return _condition("Degraded", "True", "EndpointPickersReject", message)
    notes = [
        note for attachment in attachments if not attachment.refused for note in attachment.notes
    ]
    if notes:
        return _condition("Degraded", "True", "PoolDegraded", "; ".join(notes[:MAX_NAMED]))
    return _condition("Degraded", "False", "AsExpected", "")


def _ancestor(subject: Subject, attachment: Attachment, controller_name: str) -> dict[str, Any]:
    if subject.problems:
        accepted = _condition("Accepted", "False", "Invalid", _fix(subject))
    elif attachment.pickers is None:
        message = f"there is no InferencePool {attachment.pool} in this namespace"
        accepted = _condition("Accepted", "False", "TargetNotFound", message)
    elif attachment.refused is not None:
        accepted = _condition("Accepted", "False", *attachment.refused)
    else:
        accepted = _condition("Accepted", "True", "Accepted", "")
    return {
        "ancestorRef": {
            "group": attachment.group,
            "kind": "InferencePool",
            "namespace": subject.namespace,
            "name": attachment.pool,
        },
        "controllerName": controller_name,
        "conditions": [{**accepted, "observedGeneration": subject.generation}],
    }


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


# --- numbers


def _pool(attachment: Attachment) -> dict[str, Any]:
    """Add up what the pool's endpoint pickers report."""
    reports = [picker.stats for picker in attachment.pickers or () if picker.stats is not None]
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
    for sums in bands.values():
        for name in ("requests", "bytes", "dispatched", "rejected", "evicted"):
            sums[name] = quantised(sums[name])
        sums["oldestSeconds"] = quantised(round(sums["oldestSeconds"]))
    saturation = max((report.saturation for report in reports), default=0.0)
    return {
        "name": attachment.pool,
        "saturation": f"{min(round(saturation * 20) / 20, 99.0):.2f}",
        "endpoints": attachment.endpoints,
        "queues": [bands[name] for name in sorted(bands)],
    }


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
        sorted(p["name"] for p in status.get("pools") or () if p.get("name") in mine),
    )
