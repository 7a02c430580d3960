"""What a cluster holds, kept true: kopf's watches for speed, LISTs for truth.

A first LIST of every kind fills the store, watches deliver what changes, and once a minute (and
whenever kopf lists anew, which is a sign of a gap) a LIST corrects what the watches missed. If two
sweeps in a row find such corrections the watches are deaf and the process has to start again.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import kopf

from forebay_operator import cluster as api
from forebay_operator import handlers, metrics
from forebay_operator.resources import KINDS, POOL_LABEL, EndpointSlice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from forebay_operator.cluster import Cluster
    from forebay_operator.resources import Kind
    from forebay_operator.store import Store

SWEEP_SECONDS = 60.0
HELD_SECONDS = 11.0
GAP_SECONDS = 1.0
MAX_BACKOFF_SECONDS = 30.0
DEAF_SWEEPS = 2
DELIVERY_SECONDS = 5.0  # what is younger may still be on its way

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
        clock: monotonic seconds.
    """

    def __init__(
        self,
        cluster: Cluster,
        store: Store,
        touch: Callable[[set[str]], None],
        namespaces: tuple[str, ...] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster = cluster
        self._store = store
        self._touch = touch
        self._namespaces = namespaces
        self._clock = clock
        self._gap = asyncio.Event()
        self._watching_since: float | None = None
        self._deaf = 0
        self.synced = False

    # --- events

    def on_event(self, kind: Kind, event: Any) -> None:
        """Take an event of a watch; kopf gives what it lists itself the type None."""
        metrics.EVENTS.labels(kind.kind).inc()
        now = self._clock()
        manifest = event["object"]
        if event["type"] == "DELETED":
            uid = str(manifest.get("metadata", {}).get("uid", ""))
            self._touch(self._store.remove(kind, uid, now))
            return
        if event["type"] is None and self._watching_since is not None:
            self._gap.set()
        self._touch(self._store.put(kind, dict(manifest), now))

    # --- lists

    async def fill(self) -> None:
        """List every kind until all have been listed once."""
        backoff = 0.5
        missing = list(KINDS)
        while missing:
            failed = []
            for kind in missing:
                try:
                    await self._list(kind)
                except api.ApiError as error:
                    failed.append(kind)
                    _log.error(
                        "cannot list yet",
                        extra={"kind": f"{kind.plural}.{kind.group}", "error": str(error)},
                    )
            missing = failed
            if missing:
                await asyncio.sleep(random.uniform(0.5, 1.0) * backoff)  # noqa: S311  # jitter
                backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)
        self.synced = True
        metrics.SWEPT_AT.set_to_current_time()

    async def run_sweeps(self) -> None:
        """Correct the store from time to time, for ever.

        Raises:
            DeafError: watches do not deliver.
        """
        wait = SWEEP_SECONDS
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(
                    self._gap.wait(),
                    random.uniform(0.8, 1.0) * wait,  # noqa: S311  # jitter
                )
                await asyncio.sleep(GAP_SECONDS)  # the rest of that LIST
            gap = self._gap.is_set()
            self._gap.clear()
            wait = SWEEP_SECONDS
            missed = 0
            for kind in KINDS:
                try:
                    found, held = await self._list(kind)
                except api.ApiError as error:
                    metrics.SWEEPS.labels("error").inc()
                    _log.warning(
                        "sweep failed",
                        extra={"kind": f"{kind.plural}.{kind.group}", "error": str(error)},
                    )
                    continue
                missed += found
                if held:
                    wait = HELD_SECONDS
            metrics.SWEPT_AT.set_to_current_time()
            metrics.SWEEPS.labels("corrected" if missed else "clean").inc()
            self._listen(missed=missed, gap=gap)

    def _listen(self, *, missed: int, gap: bool) -> None:
        """Count sweeps that found what watches should have delivered."""
        if not missed or gap:
            self._deaf = 0
            return
        self._deaf += 1
        _log.warning("watches missed changes", extra={"changes": missed, "sweeps": self._deaf})
        if self._deaf >= DEAF_SWEEPS:
            raise DeafError(f"{DEAF_SWEEPS} sweeps in a row found changes no watch delivered")

    async def _list(self, kind: Kind) -> tuple[int, bool]:
        """Sweep one kind; return what the watches missed, and whether a wipe was held back."""
        manifests: list[dict[str, Any]] = []
        began_at = self._clock()
        try:
            for namespace in self._namespaces or (None,):
                manifests += await self._cluster.list(kind, namespace)
        except api.ApiError as error:
            if error.status == 404 and kind.group and not kind.required:
                return 0, False  # the CRD is not installed; what was known of it stays
            raise
        if kind.model is EndpointSlice:
            manifests = [m for m in manifests if POOL_LABEL in (m["metadata"].get("labels") or {})]
        swept = self._store.sweep(kind, manifests, began_at, self._clock())
        if swept.held:
            _log.error(
                "a LIST holds none of the objects that were there; waiting for a second one",
                extra={"kind": f"{kind.plural}.{kind.group}"},
            )
        self._touch(swept.changed)
        return swept.missed, swept.held

    # --- watches

    async def run_watches(self, ready: asyncio.Event, stop: asyncio.Event) -> None:
        """Be a kopf operator until `stop`."""
        registry = handlers.registry(self.on_event)
        settings = _settings(scanning=not self._namespaces)
        with suppress(asyncio.CancelledError):
            await asyncio.gather(
                self._started(ready),
                kopf.operator(
                    registry=registry,
                    settings=settings,
                    standalone=True,
                    clusterwide=not self._namespaces,
                    namespaces=self._namespaces,
                    ready_flag=ready,
                    stop_flag=stop,
                ),
            )

    async def _started(self, ready: asyncio.Event) -> None:
        await ready.wait()
        await asyncio.sleep(DELIVERY_SECONDS)  # kopf's own first LIST comes as events of type None
        self._watching_since = self._clock()


def _settings(*, scanning: bool) -> kopf.OperatorSettings:
    """Return kopf's settings; the reasons are in facts/reliability.md 1.3."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.persistence.finalizer = "forebay.dev/none"  # none is ever added: only on.event is used
    settings.scanning.disabled = not scanning
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 330
    settings.watching.connect_timeout = 10
    settings.watching.chunk_size = 500
    selectors = settings.watching.label_selectors
    selectors["discovery.k8s.io", "v1", "endpointslices"] = POOL_LABEL
    settings.networking.request_timeout = 30
    settings.networking.error_backoffs = _Backoffs()
    settings.process.ultimate_exiting_timeout = 20
    return settings


class _Backoffs:
    """Endless delays in seconds with jitter: a watch that gives up would be deaf for ever."""

    def __iter__(self) -> Iterator[float]:
        delay = 0.5
        while True:
            yield random.uniform(0.5, 1.0) * delay  # noqa: S311  # jitter
            delay = min(2 * delay, MAX_BACKOFF_SECONDS)
