"""Writes statuses that differ, and posts Events about what has changed.

A status waits for a better one before it is written: acknowledgements settle, and numbers alone are
written rarely. Errors are retried with back-off. Computing a status belongs in statuses.py.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from forebay_operator import metrics
from forebay_operator.cluster.api import ApiError, now_text
from forebay_operator.pacing import Backoff, RateLimit
from forebay_operator.reconcile.problems import PoolProblems, measure
from forebay_operator.status import comparing

if TYPE_CHECKING:
    from collections.abc import Callable

    from forebay_operator.cluster.store import Entry, Store
    from forebay_operator.reconcile.planner import Planner
    from forebay_operator.reconcile.statuses import Statuses
    from forebay_operator.status.comparing import Transition
    from forebay_operator.status.observed import EPP

SETTLE_SECONDS = 0.3  # acknowledgements come within it, and one write is enough
PENDING_SECONDS = 2.0  # a status that waits for acknowledgements is worth writing after this,
REPLACED_PENDING_SECONDS = 15.0  # and after this where it would replace a good one
NUMBERS_SECONDS = 30.0
NUMBERS_PER_SECOND = 5.0
LOOK_SECONDS = 5.0
TICK_SECONDS = 0.1
MAX_WRITES = 16  # at once
MAX_BACKOFF_SECONDS = 30.0

_log = logging.getLogger(__name__)


class Reporter(Protocol):
    """Where statuses go."""

    async def write(self, entry: Entry, status: dict[str, Any]) -> dict[str, Any] | None:
        """Write an object's status and return the object as it is then, if that is known.

        Raises:
            ApiError: it was not written.
        """

    async def announce(self, entry: Entry, changes: list[Transition]) -> None:
        """Announce conditions that have changed."""


@dataclass(slots=True)
class _Pending:
    """A status that has to be written. `meaning`: more than numbers has changed."""

    status: dict[str, Any]
    meaning: bool
    noticed_at: float
    due_at: float = 0.0
    retry_at: float = 0.0
    backoff: Backoff = field(default_factory=lambda: Backoff(MAX_BACKOFF_SECONDS, jitter=0.0))
    writing: bool = False


class StatusWriter:
    """Keeps statuses in step with what should be.

    Args:
        store: all objects.
        planner: what is planned for them; touched when a written object differs from the store's.
        statuses: what they should be.
        reporter: where they go.
        clock: monotonic seconds.

    Attributes:
        reporting: whether statuses are written.
        alive_at: when the loop has last turned.
    """

    def __init__(
        self,
        store: Store,
        planner: Planner,
        statuses: Statuses,
        reporter: Reporter,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._planner = planner
        self._statuses = statuses
        self._reporter = reporter
        self._clock = clock
        self._problems = PoolProblems(store, self._announce_soon)
        self._unreported: set[str] = set()
        self._wake = asyncio.Event()
        self._pending: dict[tuple[Any, str], _Pending] = {}
        self._written_at: dict[tuple[Any, str], float] = {}
        self._paused_until = 0.0
        self._looked_at = clock()
        self._numbers = RateLimit(NUMBERS_PER_SECOND, NUMBERS_PER_SECOND, clock())
        self._writes: set[asyncio.Task[None]] = set()
        self.reporting = False
        self.alive_at = clock()

    def look_at(self, namespace: str) -> None:
        """Look at the statuses of a namespace soon."""
        self._unreported.add(namespace)
        self._wake.set()

    async def run(self) -> None:
        """Write statuses that differ, until cancelled."""
        while True:
            timeout = TICK_SECONDS if self._pending else 1.0
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), timeout)
            self._wake.clear()
            self.alive_at = self._clock()
            if self.reporting:
                await self.report()
            if self._pending:  # at most one look per tick, however many acknowledgements come
                await asyncio.sleep(TICK_SECONDS / 2)

    async def report(self) -> None:
        """Look at what has changed and start the writes that are due."""
        for namespace in self._to_look_at():
            try:
                self._look(namespace, self._clock())
            except Exception:  # one namespace that cannot be reported on must not stop the others
                _log.exception("statuses failed", extra={"namespace": namespace})
            await asyncio.sleep(0)
        self._write_due(self._clock())

    def _to_look_at(self) -> list[str]:
        """Return the namespaces of which something has changed; now and then all of them."""
        now = self._clock()
        if now - self._looked_at >= LOOK_SECONDS:
            self._looked_at = now
            self._unreported.update(self._store.namespaces())
            for key in [key for key in self._written_at if self._store.get(*key) is None]:
                del self._written_at[key]
        namespaces, self._unreported = self._unreported, set()
        return sorted(namespaces)

    def _look(self, namespace: str, now: float) -> None:
        """Find out which statuses of a namespace have to be written, and when."""
        epps: dict[str, list[EPP]] = {}
        for pool, planned in self._planner.planned(namespace):
            name = f"{namespace}/{pool.metadata.name}"
            epps[name] = self._planner.epps(name)
            self._problems.tell(name, pool, planned, epps[name])
        self._problems.retain(namespace, epps)
        statuses = list(self._statuses.of(namespace))
        measure(namespace, epps, statuses)
        for entry, status in statuses:
            key = (entry.kind, entry.metadata.uid)
            pending = self._pending.get(key)
            if pending is not None and pending.writing:
                continue  # it is looked at again when that is done
            difference = comparing.differs(status, entry.status, self._statuses.name)
            if not difference:
                self._pending.pop(key, None)
                continue
            meaning = difference == "meaning"
            if pending is None:
                pending = self._pending[key] = _Pending(status, meaning, now)
            elif pending.meaning != meaning:
                pending.meaning, pending.noticed_at = meaning, now
            pending.status = status
            patience = self._patience(entry, status, now, meaning=meaning)
            pending.due_at = now + patience if not meaning else pending.noticed_at + patience

    def _announce_soon(self, entry: Entry, changes: list[Transition]) -> None:
        task = asyncio.create_task(self._announce(entry, changes))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def _announce(self, entry: Entry, changes: list[Transition]) -> None:
        try:
            await self._reporter.announce(entry, changes)
        except ApiError as error:  # its text is in the status or the log as well
            _log.info("event not posted", extra={"error": str(error)})

    def _patience(
        self, entry: Entry, status: dict[str, Any], now: float, *, meaning: bool
    ) -> float:
        """Return how long a difference may wait for a better status before it is written."""
        if not meaning:
            written_at = self._written_at.setdefault((entry.kind, entry.metadata.uid), now)
            return max(0.0, written_at + NUMBERS_SECONDS - now)
        if not comparing.unsettled(status):
            return SETTLE_SECONDS
        programmed = any(
            condition.get("type") == "Programmed"
            and condition.get("status") == "True"
            and condition.get("observedGeneration") == entry.metadata.generation
            for condition in entry.status.get("conditions") or ()
        )
        return REPLACED_PENDING_SECONDS if programmed else PENDING_SECONDS

    def _write_due(self, now: float) -> None:
        """Start the writes that are due, as many as may run at once."""
        if now < self._paused_until:
            return
        for (kind, uid), pending in list(self._pending.items()):
            if len(self._writes) >= MAX_WRITES:
                return
            if pending.writing or max(pending.due_at, pending.retry_at) > now:
                continue
            entry = self._store.get(kind, uid)
            if entry is None:
                del self._pending[kind, uid]
                continue
            if not pending.meaning and not self._numbers.take(now):
                continue
            pending.writing = True
            task = asyncio.create_task(self._write(entry, pending))
            self._writes.add(task)
            task.add_done_callback(self._writes.discard)

    async def _write(self, entry: Entry, pending: _Pending) -> None:
        """Write one status; an error is tried again, ever more slowly."""
        key = (entry.kind, entry.metadata.uid)
        before = entry.status
        stamped = comparing.with_times(pending.status, before, now_text(), self._statuses.name)
        began_at = self._clock()
        try:
            written = await self._reporter.write(entry, stamped)
        except Exception as error:
            self._not_written(entry, pending, error)
            return
        metrics.STATUS_WRITES.labels(entry.kind.kind, "ok").inc()
        self._pending.pop(key, None)
        now = self._clock()
        self._written_at[key] = now
        if written is None:
            entry.status = stamped
        else:
            self._planner.touch(self._store.put(entry.kind, written, now, began_at))
        self._unreported.add(entry.metadata.namespace)
        changes = comparing.transitions(pending.status, before)
        if changes:
            await self._announce(entry, changes)

    def _not_written(self, entry: Entry, pending: _Pending, error: Exception) -> None:
        """Try again later: what has been deleted meanwhile is gone from the store by then."""
        metrics.STATUS_WRITES.labels(entry.kind.kind, "error").inc()
        now = self._clock()
        pending.retry_at = now + pending.backoff.next_seconds()
        pending.writing = False
        level, trace = logging.WARNING, None
        if not isinstance(error, ApiError):
            level, trace = logging.ERROR, error
        elif error.status in (404, 409):  # deleted, or another object under its name
            level = logging.INFO
        elif error.retry_after_seconds:  # the server is overloaded, for every caller
            self._paused_until = max(self._paused_until, now + error.retry_after_seconds)
        _log.log(
            level,
            "status not written; trying again",
            extra={"kind": entry.kind.kind, "object": entry.metadata.name, "error": str(error)},
            exc_info=trace,
        )

    def forget_pending(self) -> None:
        """Stop writing and measuring: another replica leads."""
        self._pending.clear()
        self._problems.clear()
