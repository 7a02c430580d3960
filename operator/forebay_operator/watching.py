"""What a cluster holds, kept true: kopf's watches for speed, LISTs for truth.

A first LIST of every kind fills the store, watches deliver what changes, and once a minute (and
whenever kopf lists anew, which is a sign of a gap) a LIST corrects what the watches missed. If two
sweeps in a row find changes that no watch delivers, the watches are deaf and the process has to
start again. How kopf is run is handlers.py's business.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from forebay_operator import cluster as api
from forebay_operator import handlers, metrics
from forebay_operator.resources import KINDS, InferencePool, InferencePoolV1Alpha2

if TYPE_CHECKING:
    from collections.abc import Callable

    from forebay_operator.cluster import Cluster
    from forebay_operator.resources import Kind
    from forebay_operator.store import Store

HELD_SECONDS = 14.0  # with jitter still more than store.EMPTY_SECONDS
GAP_SECONDS = 1.0
MIN_SWEEP_SECONDS = 5.0  # between sweeps, however often kopf lists
DISCOVERY_SECONDS = 10.0
MAX_BACKOFF_SECONDS = 10.0  # each time kopf lists everything
STEADY_SECONDS = 60.0
DEAF_SWEEPS = 2
DELIVERY_SECONDS = 5.0  # what is younger may still be on its way
END_SECONDS = 10.0

_POOLS = [kind for kind in KINDS if kind.model in (InferencePool, InferencePoolV1Alpha2)]

_log = logging.getLogger(__name__)


class DeafError(Exception):
    """Watches do not deliver; only a new process gets new ones."""


class Watching:
    """Fills a store from a cluster.

    Args:
        cluster: the API.
        store: what is filled.
        touch: called with the namespaces that have changed.
        namespaces: which are watched; none means all.
        sweep_seconds: between LISTs of everything.
        kinds: which are read.
        clock: monotonic seconds.

    Attributes:
        waits_for: why the store is not filled yet; empty when it is.
    """

    def __init__(
        self,
        cluster: Cluster,
        store: Store,
        touch: Callable[[set[str]], None],
        namespaces: tuple[str, ...] = (),
        sweep_seconds: float = 60.0,
        kinds: tuple[Kind, ...] = KINDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster = cluster
        self._store = store
        self._touch = touch
        self._namespaces = namespaces
        self._sweep_seconds = sweep_seconds
        self._kinds = kinds
        self._clock = clock
        self._gap = asyncio.Event()
        self._listed_by_kopf_until = 0.0
        self._absent: set[Kind] = set()
        self._held: set[Kind] = set()
        self._begin_anew = asyncio.Event()
        self._undelivered: set[str] = set()
        self._deaf = 0
        self.waits_for = "the first LIST"

    # --- events

    def on_event(self, kind: Kind, event: Any) -> None:
        """Take an event of a watch; kopf gives what it lists itself the type None."""
        metrics.EVENTS.labels(kind.kind).inc()
        now = self._clock()
        manifest = event["object"]
        metadata = manifest.get("metadata", {})
        uid = str(metadata.get("uid", ""))
        self._undelivered.discard(uid)
        if event["type"] == "DELETED":
            version = str(metadata.get("resourceVersion", ""))
            self._touch(self._store.remove(kind, uid, now, version))
            return
        if event["type"] is None and now > self._listed_by_kopf_until:
            self._gap.set()
        self._touch(self._store.put(kind, dict(manifest), now))

    # --- lists

    async def fill(self) -> None:
        """List every kind until that succeeds for all of them and the needed ones exist."""
        backoff = 0.5
        while True:
            failures = await self._list_all()
            self.waits_for = "; ".join([*self._uninstalled(), *failures])
            if not self.waits_for:
                metrics.SWEPT_AT.set_to_current_time()
                return
            _log.warning("not ready", extra={"waits_for": self.waits_for})
            await asyncio.sleep(_jittered(backoff))
            backoff = min(2 * backoff, DISCOVERY_SECONDS)

    def _uninstalled(self) -> list[str]:
        """Name the CRDs without which nothing works; a pool may be of either group."""
        needed = [[kind] for kind in KINDS if kind.required] + [_POOLS]
        return [
            f"the CRD {' or '.join(map(_name, kinds))} to be installed"
            for kinds in needed
            if self._absent.issuperset(kinds)
        ]

    async def run_sweeps(self) -> None:
        """Correct the store from time to time, for ever.

        Raises:
            DeafError: watches do not deliver.
        """
        wait = self._sweep_seconds
        swept_at = self._clock()
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._gap.wait(), _jittered(wait))
                # The rest of that LIST comes too.
                pause = max(GAP_SECONDS, swept_at + MIN_SWEEP_SECONDS - self._clock())
                await asyncio.sleep(pause)
            gap = self._gap.is_set()
            self._gap.clear()
            self._undelivered.clear()
            failures = await self._list_all()
            swept_at = self._clock()
            for failure in failures:
                _log.warning("sweep failed", extra={"error": failure})
            wait = HELD_SECONDS if self._held else self._sweep_seconds
            if not failures:
                metrics.SWEPT_AT.set_to_current_time()
            corrected = "corrected" if self._undelivered else "clean"
            result = "error" if failures else "held" if self._held else corrected
            metrics.SWEEPS.labels(result).inc()
            if self._undelivered and not gap:
                await asyncio.sleep(DELIVERY_SECONDS)
            self._listen(gap=gap or self._gap.is_set())

    def _listen(self, *, gap: bool) -> None:
        """Count sweeps that found what watches should have delivered."""
        if not self._undelivered or gap:
            self._deaf = 0
            return
        self._deaf += 1
        _log.warning(
            "watches missed changes",
            extra={"changes": len(self._undelivered), "sweeps": self._deaf},
        )
        if self._deaf >= DEAF_SWEEPS:
            raise DeafError(f"{DEAF_SWEEPS} sweeps in a row found changes no watch delivered")

    async def run_discovery(self) -> None:
        """Look for kinds whose CRDs were missing, for ever.

        This asks for what we may read, and so works without the right to look at CRDs.
        """
        while True:
            await asyncio.sleep(_jittered(DISCOVERY_SECONDS))
            for kind in sorted(self._absent, key=_name):
                with suppress(api.ApiError):
                    await self._list(kind)

    async def _list_all(self) -> list[str]:
        """Sweep every kind; return what went wrong."""
        failures: dict[str, None] = {}
        for kind in self._kinds:
            try:
                await self._list(kind)
            except api.ApiError as error:
                failures[f"{_name(kind)}: {error}" if error.status else str(error)] = None
        return list(failures)

    async def _list(self, kind: Kind) -> None:
        """Sweep one kind."""
        manifests: list[dict[str, Any]] = []
        began_at = self._clock()
        try:
            for namespace in self._namespaces or (None,):
                manifests += await self._cluster.list(kind, namespace)
        except api.ApiError as error:
            if error.status != 404 or not kind.group:
                raise
            if kind not in self._absent:
                _log.info("the CRD is not installed", extra={"kind": _name(kind)})
            self._absent.add(kind)  # what was known of it stays
            return
        if kind in self._absent:
            _log.info("the CRD is installed now", extra={"kind": _name(kind)})
            self._absent.discard(kind)
            self._begin_anew.set()
        swept = self._store.sweep(kind, manifests, began_at, self._clock())
        if not swept.held:
            self._held.discard(kind)
        elif kind not in self._held:
            self._held.add(kind)
            _log.error(
                "a LIST holds none of the objects that were there; waiting for a second one",
                extra={"kind": _name(kind)},
            )
        self._undelivered |= swept.corrected
        self._touch(swept.changed)

    # --- watches

    async def run_watches(self) -> None:
        """Keep kopf running, for ever.

        It ends when a watch fails for good or a CRD goes; then it begins anew, and also when a CRD
        has come, since it finds out about kinds at its start only.

        Raises:
            DeafError: it does not end when it is told to.
        """
        running = asyncio.get_running_loop()

        def on_event(kind: Kind, event: Any) -> None:
            with suppress(RuntimeError):  # this loop has ended
                running.call_soon_threadsafe(self.on_event, kind, event)

        backoff = 0.5
        while True:
            self._begin_anew.clear()
            began_at = self._clock()
            self._listed_by_kopf_until = began_at + DELIVERY_SECONDS
            # What has changed between our LIST and its own is found by a sweep.
            settled = running.call_later(DELIVERY_SECONDS, self._gap.set)
            watches = handlers.Watches(on_event, self._kinds, self._namespaces)
            anew = asyncio.create_task(self._begin_anew.wait())
            ended = watches.start()
            try:
                await asyncio.wait((anew, ended), return_when=asyncio.FIRST_COMPLETED)
            finally:
                settled.cancel()
                anew.cancel()
                watches.stop()
                await asyncio.wait((ended,), timeout=END_SECONDS)
                error = ended.exception() if ended.done() else None
            if not ended.done():
                raise DeafError("the watches do not end")
            if self._begin_anew.is_set():
                continue
            _log.warning("watches ended, beginning anew", extra={"error": str(error)[:500]})
            if self._clock() - began_at > STEADY_SECONDS:
                backoff = 0.5
            await asyncio.sleep(_jittered(backoff))
            backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)


def _name(kind: Kind) -> str:
    return f"{kind.plural}.{kind.group}" if kind.group else kind.plural


def _jittered(seconds: float) -> float:
    return random.uniform(0.8, 1.0) * seconds  # noqa: S311  # spreads load, hides nothing
