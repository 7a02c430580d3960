"""Reports problems of pools by metric, log and Event, because a pool's status is its gateway's."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from forebay_operator import metrics
from forebay_operator.reconcile.statuses import POOL_KIND
from forebay_operator.resources import KINDS, FlowControlPolicy
from forebay_operator.status import verdicts
from forebay_operator.status.comparing import Transition
from forebay_operator.status.observed import EPPState

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from typing import Any

    from forebay_operator.cluster.store import Entry, Store
    from forebay_operator.planning import Planned
    from forebay_operator.resources import AnyPool
    from forebay_operator.status.observed import EPP

_log = logging.getLogger(__name__)


class PoolProblems:
    """The problems that have been reported.

    Args:
        store: all objects.
        announce: posts an Event of conditions of an object.
    """

    def __init__(self, store: Store, announce: Callable[[Entry, list[Transition]], None]) -> None:
        self._store = store
        self._announce = announce
        self._told: dict[str, set[str]] = {}  # reasons by pool

    def tell(self, name: str, pool: AnyPool, planned: Planned, epps: list[EPP]) -> None:
        """Report a pool's new problems, and those that are solved.

        A pool without a policy has its EPPs' absence announced too; else the policy's Event does.
        """
        problems = {p.reason: p.message for p in planned.problems if p.kind == POOL_KIND}
        problems |= verdicts.pool_problems(epps)
        announced = problems.keys() if planned.policy is None else problems.keys() - {"Stale"}
        new = self._update(name, problems)
        kind = next(kind for kind in KINDS if kind.model is type(pool))
        entry = self._store.get(kind, pool.metadata.uid)
        changes = [
            Transition("Degraded", "True", reason, problems[reason])
            for reason in new
            if reason in announced
        ]
        if changes and entry is not None:
            self._announce(entry, changes)

    def retain(self, namespace: str, pools: Collection[str]) -> None:
        """Forget the pools of a namespace that are not among these: they are gone."""
        for name in list(self._told):
            if name.partition("/")[0] == namespace and name not in pools:
                self._update(name, {})

    def _update(self, name: str, problems: Mapping[str, str]) -> list[str]:
        """Log and count what is new and what is over; return the reasons that are new."""
        before = self._told.pop(name, set())
        if problems:
            self._told[name] = set(problems)
        for reason in before - problems.keys():
            metrics.POOL_PROBLEMS.remove(name, reason)
            _log.info("problem of pool is solved", extra={"pool": name, "reason": reason})
        new = [reason for reason in problems if reason not in before]
        for reason in new:
            metrics.POOL_PROBLEMS.labels(name, reason).set(1)
            text = problems[reason]
            _log.warning("pool has a problem", extra={"pool": name, "reason": reason, "text": text})
        return new

    def clear(self) -> None:
        """Stop measuring: another replica leads."""
        for pool, reasons in self._told.items():
            for reason in reasons:
                metrics.POOL_PROBLEMS.remove(pool, reason)
        self._told.clear()
        for series in (
            metrics.DESIRED,
            metrics.CONNECTED,
            metrics.PROGRAMMED,
            metrics.CONDITIONS,
        ):
            series.clear()


def measure(
    namespace: str,
    epps: Mapping[str, list[EPP]],
    statuses: list[tuple[Entry, dict[str, Any]]],
) -> None:
    """Show the state of the EPPs of a namespace's pools, and the conditions of its policies."""
    metrics.DESIRED.show(namespace, {(pool,): len(found) for pool, found in epps.items()})
    metrics.CONNECTED.show(
        namespace,
        {(pool,): sum(epp.connected for epp in found) for pool, found in epps.items()},
    )
    metrics.PROGRAMMED.show(
        namespace,
        {
            (pool,): sum(epp.state is EPPState.PROGRAMMED for epp in found)
            for pool, found in epps.items()
        },
    )
    metrics.CONDITIONS.show(
        namespace,
        {
            (namespace, entry.metadata.name, condition["type"], condition["status"]): 1
            for entry, status in statuses
            if entry.kind.model is FlowControlPolicy
            for condition in status.get("conditions") or ()
        },
    )
