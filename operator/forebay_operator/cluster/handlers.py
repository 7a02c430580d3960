"""All kopf decorators, which index what the operator reacts to, and how kopf is run.

Only `on.event`: kopf's other handlers write annotations or finalizers on objects that are not ours.
Handlers only pass events on.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import kopf

from forebay_operator.cluster import api
from forebay_operator.pacing import Backoff

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from forebay_operator.resources import Kind

MAX_BACKOFF_SECONDS = 30.0
END_SECONDS = 3.0
END_TRIES = 30


class Watches:
    """A kopf operator in a thread with a loop of its own: it takes all tasks there for its own.

    Args:
        on_event: called in that thread with every event.
        kinds: which are watched.
        namespaces: which are watched; none means all.
    """

    def __init__(
        self,
        on_event: Callable[[Kind, Any], None],
        kinds: tuple[Kind, ...],
        namespaces: tuple[str, ...] = (),
    ) -> None:
        self._registry = registry(on_event, kinds)
        self._kinds = kinds
        self._namespaces = namespaces
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ended: Future[None] = Future()

    def start(self) -> asyncio.Future[None]:
        """Begin; the future is done when it has ended, with the error if it was one."""
        ended = asyncio.wrap_future(self._ended)
        # A daemon: a thread that hangs does not keep the process from ending.
        threading.Thread(target=self._run, name="watches", daemon=True).start()
        return ended

    def stop(self) -> None:
        """Ask it to end."""
        with suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._stop.set)

    def _run(self) -> None:
        error: Exception | None = None
        try:
            self._loop.run_until_complete(self._operate())
        except Exception as what:
            error = what
        self._end_tasks()
        with suppress(TimeoutError):
            self._loop.run_until_complete(asyncio.wait_for(self._loop.shutdown_asyncgens(), 1.0))
        self._loop.close()
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)

    async def _operate(self) -> None:
        """Run until the first of kopf's tasks ends; kopf.operator would wait 5 s for the others."""
        # kopf has logged what its tasks have failed with.
        self._loop.set_exception_handler(lambda _loop, _context: None)
        tasks = await kopf.spawn_tasks(
            registry=self._registry,
            settings=_settings(self._kinds),
            # Unused without peers, but kopf's own would be the user's name, which a container's
            # user need not have.
            identity="forebay-operator",  # type: ignore[arg-type]  # a str whose type is private
            standalone=True,
            clusterwide=not self._namespaces,
            namespaces=self._namespaces,
            stop_flag=self._stop,
        )
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    def _end_tasks(self) -> None:
        """Cancel the tasks that are left, repeatedly.

        A watch that ends just then swallows a cancellation (kopf's `streaming_block`). Tasks that
        do not end in time are left behind with their loop.
        """
        for _ in range(END_TRIES):
            tasks = asyncio.all_tasks(self._loop)
            if not tasks:
                return
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.wait(tasks, timeout=END_SECONDS / END_TRIES))


def registry(
    on_event: Callable[[Kind, Any], None], kinds: tuple[Kind, ...]
) -> kopf.OperatorRegistry:
    """Return a registry in which each of the kinds has a handler."""
    found = kopf.OperatorRegistry()

    @kopf.on.login(registry=found)
    def login(**_: Any) -> kopf.ConnectionInfo:
        return api.login()

    for kind in kinds:
        _watch(found, kind, on_event)
    return found


def _watch(found: kopf.OperatorRegistry, kind: Kind, on_event: Callable[[Kind, Any], None]) -> None:
    @kopf.on.event(
        group=kind.group, version=kind.version, plural=kind.plural, id="event", registry=found
    )
    async def event(event: Any, **_: Any) -> None:
        on_event(kind, event)


def _settings(kinds: tuple[Kind, ...]) -> kopf.OperatorSettings:
    """Return kopf's settings: it watches, and writes nothing."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.persistence.finalizer = "forebay.dev/none"  # none is ever added: only on.event is used
    settings.scanning.disabled = True  # watching.py finds CRDs, without a right to look at them
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 330
    settings.watching.connect_timeout = 10
    settings.watching.chunk_size = 500
    for kind in kinds:
        if kind.label:
            settings.watching.label_selectors[kind.group, kind.version, kind.plural] = kind.label
    settings.networking.request_timeout = 30
    settings.networking.error_backoffs = _Backoffs()
    settings.process.ultimate_exiting_timeout = None  # it would kill the process, not the thread
    return settings


class _Backoffs:
    """Endless delays in seconds with jitter: a watch that gives up would stay deaf."""

    def __iter__(self) -> Iterator[float]:
        backoff = Backoff(MAX_BACKOFF_SECONDS, jitter=0.5)
        while True:
            yield backoff.next_seconds()
