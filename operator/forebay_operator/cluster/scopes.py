"""Keeps kopf's watches running, one scope per watched namespace, or one for all.

Running kopf belongs in handlers.py.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from forebay_operator.cluster import api, handlers
from forebay_operator.pacing import Backoff

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from forebay_operator.resources import Kind

MAX_BACKOFF_SECONDS = 10.0  # each time kopf lists everything in the scope
STEADY_SECONDS = 60.0
DELIVERY_SECONDS = 5.0  # what is younger may still be on its way
END_SECONDS = 10.0

_log = logging.getLogger(__name__)


class DeafError(Exception):
    """Watches do not deliver; only a new process gets new ones."""


@dataclass(slots=True)
class Scope:
    """A namespace, or "" for all, and the state of kopf's watches; `began_at`: None if none run."""

    namespace: str
    restart: asyncio.Event = field(default_factory=asyncio.Event)
    began_at: float | None = None
    listed_by_kopf_until: float = 0.0


class Scopes:
    """All scopes.

    Args:
        namespaces: which are watched; none means all.
        readable: returns the kinds that may be read in a namespace, "" for all.
        sweep: lists a kind in a namespace.
        on_event: called with each event of a kind and its scope.
        gap: called when a sweep is due.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        namespaces: tuple[str, ...],
        readable: Callable[[str], tuple[Kind, ...]],
        sweep: Callable[[Kind, str], Awaitable[Any]],
        on_event: Callable[[Kind, Any, Scope], None],
        gap: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._scopes = [Scope(namespace) for namespace in namespaces or ("",)]
        self._readable = readable
        self._sweep = sweep
        self._on_event = on_event
        self._gap = gap
        self._clock = clock

    @property
    def namespaces(self) -> list[str]:
        """The namespace of each scope; "" is all."""
        return [scope.namespace for scope in self._scopes]

    def steady(self, since: float) -> set[str]:
        """Return the namespaces that have been watched since a moment."""
        return {
            scope.namespace
            for scope in self._scopes
            if scope.began_at is not None and scope.began_at < since
        }

    def restart(self, namespace: str) -> None:
        """Have kopf find out again what there is to watch in a namespace, "" for all of them."""
        for scope in self._scopes:
            if namespace in ("", scope.namespace):
                scope.restart.set()

    async def run(self) -> None:
        """Keep kopf running in every scope, until cancelled.

        Raises:
            DeafError: kopf does not stop when asked.
        """
        tasks = [asyncio.create_task(self._run_scope(scope)) for scope in self._scopes]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=END_SECONDS)

    async def _run_scope(self, scope: Scope) -> None:
        """Keep kopf running in one scope.

        It ends when a watch fails for good or a CRD goes, and starts again. So it does when a CRD
        or a right has come or gone, since it finds out about kinds at its start only.
        """
        running = asyncio.get_running_loop()

        def on_event(kind: Kind, event: Any) -> None:
            with suppress(RuntimeError):  # this loop has ended
                running.call_soon_threadsafe(self._on_event, kind, event, scope)

        backoff = Backoff(MAX_BACKOFF_SECONDS)
        while True:
            scope.restart.clear()
            kinds = self._readable(scope.namespace)
            if not kinds:
                await scope.restart.wait()
                continue
            began_at = scope.began_at = self._clock()
            scope.listed_by_kopf_until = began_at + DELIVERY_SECONDS
            # What has changed between our LIST and its own is found by a sweep.
            settled = running.call_later(DELIVERY_SECONDS, self._gap)
            namespaces = (scope.namespace,) if scope.namespace else ()
            watches = handlers.Watches(on_event, kinds, namespaces)
            restarting = asyncio.create_task(scope.restart.wait())
            ended = watches.start()
            try:
                await asyncio.wait((restarting, ended), return_when=asyncio.FIRST_COMPLETED)
            finally:
                scope.began_at = None
                settled.cancel()
                restarting.cancel()
                watches.stop()
                await asyncio.wait((ended,), timeout=END_SECONDS)
                error = ended.exception() if ended.done() else None
            if not ended.done():
                raise DeafError("the watches do not end")
            if scope.restart.is_set():
                continue
            _log.warning(
                "watches ended, restarting",
                extra={"namespace": scope.namespace, "error": str(error)[:500]},
            )
            for kind in kinds:  # the reason may be a right that is gone
                with suppress(api.ApiError):
                    await self._sweep(kind, scope.namespace)
            if self._clock() - began_at > STEADY_SECONDS:
                backoff.reset()
            await asyncio.sleep(backoff.next_seconds())
