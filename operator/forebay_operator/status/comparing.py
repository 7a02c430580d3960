"""Compares statuses: times of conditions, differences and transitions. Pure.

Only what this operator writes is compared: other controllers' ancestors and conditions are theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forebay_operator.status.conditions import NOT_CLAIMED
from forebay_operator.status.observed import CONTROLLER_DOMAIN, CONTROLLER_NAME
from forebay_operator.status.verdicts import PLAN_HELD, SHADOW

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

MAX_ANCESTORS = 16  # the schema's
_TOLD_BY_PROGRAMMED = ("EndpointPickersStale", "EndpointPickersReject")


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
        """Whether the condition needs action: any status but True, or for Degraded True.

        A shadow is meant not to be programmed.
        """
        return self.reason != SHADOW and (self.status == "True") == (self.type == "Degraded")


def was_in_force(status: Mapping[str, Any]) -> bool:
    """Return whether a policy's status shows that EPPs have run some generation of it."""
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

    The list of ancestors is written as a whole, so those of other controllers are kept in it. A
    pool belongs to one forebay controller: what another has said of one that is ours is outdated.
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
        ours = {_pool(ancestor) for ancestor in status["ancestors"] if _is_claimed(ancestor)}
        others = [
            ancestor
            for ancestor in before.get("ancestors") or ()
            if isinstance(ancestor, dict)
            and (name := str(ancestor.get("controllerName"))) != controller_name
            and not (name.startswith(CONTROLLER_DOMAIN) and _pool(ancestor) in ours)
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
    """Return the transition of each condition whose status or reason is new.

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
    """Return whether the status is one that acknowledgements are about to change."""
    return any(
        condition["type"] == "Programmed" and condition["reason"] == "Pending"
        for condition in status.get("conditions") or ()
    )


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
    return f"{_pool(ancestor)}/{ancestor.get('controllerName')}"


def _is_claimed(ancestor: Mapping[str, Any]) -> bool:
    """Return whether a pool is the writer's; each operator reports on one that is unclaimed."""
    return all(condition["reason"] != NOT_CLAIMED for condition in ancestor["conditions"])


def _pool(ancestor: Mapping[str, Any]) -> str:
    reference = ancestor.get("ancestorRef") or {}
    return f"{reference.get('group')}/{reference.get('name')}"


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
