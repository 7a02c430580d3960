"""The content of a cluster: watches for speed, LISTs for correctness.

A first LIST of every kind fills the store, watches deliver what changes, and once a minute (and
whenever kopf lists again, which is a sign of a gap) a LIST corrects what the watches missed. If two
sweeps in a row find changes that no watch delivers, the watches are deaf and the process must
restart.

Every watched namespace is read separately, by kopf; all namespaces together are one scope. Where
the API server denies a kind, that scope continues without it, and what was known of it stays. Pods
are many and large: they are read only where a pool is ours, page by page, by a watch of our own,
because kopf would keep several copies of each. How kopf is run does not belong here (handlers.py).
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from forebay_operator import metrics
from forebay_operator.cluster import api
from forebay_operator.cluster.pods import PodWatches
from forebay_operator.cluster.scopes import DELIVERY_SECONDS, DeafError, Scope, Scopes
from forebay_operator.pacing import Backoff, jittered
from forebay_operator.resources import (
    KINDS,
    POD,
    InferencePool,
    InferencePoolV1Alpha2,
    Service,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from forebay_operator.cluster.api import Cluster
    from forebay_operator.cluster.denials import Denials
    from forebay_operator.cluster.store import Store, Sweep
    from forebay_operator.resources import Kind

HELD_SECONDS = 14.0  # with jitter still more than store.EMPTY_SECONDS
GAP_SECONDS = 1.0
MIN_SWEEP_SECONDS = 5.0  # between sweeps, however often kopf lists
DISCOVERY_SECONDS = 10.0
DEAF_SWEEPS = 2
STEP_OBJECTS = 50  # between two turns of the loop: 5 ms

_POOLS = [kind for kind in KINDS if kind.model in (InferencePool, InferencePoolV1Alpha2)]
_CLAIMS = [*_POOLS, *(kind for kind in KINDS if kind.model is Service)]

_log = logging.getLogger(__name__)


class Watching:
    """Fills a store from a cluster.

    Args:
        cluster: the API.
        store: what is filled.
        touch: called with the namespaces that have changed.
        acts_on: says whether a namespace holds a pool that is ours; there pods are read.
        denials: notified of what may not be read.
        namespaces: which are watched; none means all.
        sweep_seconds: between LISTs of everything.
        kinds: which are read.

    Attributes:
        waits_for: why the store is not filled yet; empty when it is.
    """

    def __init__(
        self,
        cluster: Cluster,
        store: Store,
        touch: Callable[[set[str]], None],
        acts_on: Callable[[str], bool],
        denials: Denials,
        namespaces: tuple[str, ...] = (),
        sweep_seconds: float = 60.0,
        kinds: tuple[Kind, ...] = KINDS,
    ) -> None:
        self._cluster = cluster
        self._store = store
        self._touch = touch
        self._acts_on = acts_on
        self._denials = denials
        self._sweep_seconds = sweep_seconds
        self._kinds = tuple(kind for kind in kinds if kind != POD)
        self._clock = time.monotonic
        self._gap = asyncio.Event()
        self._absent: set[Kind] = set()
        self._held: set[tuple[Kind, str]] = set()
        self._read: set[tuple[Kind, str]] = set()
        self._undelivered: dict[str, tuple[Kind, str]] = {}  # uids, and where each was listed
        self._deaf = 0
        self._pods = PodWatches(cluster, self._list_pods, self._on_pod, self._clock)
        self._scopes = Scopes(
            namespaces, self._readable, self._list, self.on_event, self._gap.set, self._clock
        )
        self._filled = False
        self.waits_for = "the first LIST"

    def unread(self, namespace: str) -> set[Kind]:
        """Return the kinds that planning a namespace needs and that are not read yet.

        Pods matter only where a pool is ours.
        """
        wide = {kind for kind in self._kinds if (kind, "") not in self._read} - self._absent
        if namespace in self._pods:
            wide.add(POD)
        return {kind for kind in wide if (kind, namespace) not in self._read}

    # --- events

    def on_event(self, kind: Kind, event: Any, scope: Scope | None = None) -> None:
        """Take an event of a watch; kopf gives what it lists itself the type None."""
        metrics.EVENTS.labels(kind.kind).inc()
        now = self._clock()
        manifest = event["object"]
        metadata = manifest.get("metadata", {})
        uid = str(metadata.get("uid", ""))
        self._undelivered.pop(uid, None)
        if event["type"] == "DELETED":
            version = str(metadata.get("resourceVersion", ""))
            self._changed(kind, self._store.remove(kind, uid, now, version))
            return
        if event["type"] is None and scope is not None and now > scope.listed_by_kopf_until:
            self._gap.set()
        self._changed(kind, self._store.put(kind, dict(manifest), now))

    def _changed(self, kind: Kind, namespaces: set[str]) -> None:
        if kind in _CLAIMS and self._filled:
            for namespace in namespaces:
                self._follow(namespace)
        self._touch(namespaces)

    # --- lists

    async def fill(self) -> None:
        """List every kind until all that may be read is, and the needed kinds exist."""
        backoff = Backoff(DISCOVERY_SECONDS)
        while True:
            # Python's collector would scan all new objects again and again, up to 0.3 s each time.
            gc.disable()
            try:
                failures = await self._list_all()
                self.waits_for = "; ".join([*self._lacking(), *failures])
                if not self.waits_for:
                    gc.freeze()
            finally:
                gc.enable()
            if not self.waits_for:
                metrics.SWEPT_AT.set_to_current_time()
                self._filled = True
                for namespace in self._store.namespaces():
                    self._follow(namespace)
                return
            _log.warning("not ready", extra={"waits_for": self.waits_for})
            await asyncio.sleep(backoff.next_seconds())

    def _lacking(self) -> list[str]:
        """Name the kinds without which nothing works; a pool may be of either group."""
        needed = [[kind] for kind in KINDS if kind.required] + [_POOLS]
        lacking = []
        for kinds in needed:
            names = " or ".join(map(_name, kinds))
            if self._absent.issuperset(kinds):
                lacking.append(f"the CRD {names} to be installed")
            elif not any(
                (kind, namespace) in self._read
                for kind in kinds
                for namespace in self._scopes.namespaces
            ):
                lacking.append(f"the right to list {names}")
        return lacking

    async def run_sweeps(self) -> None:
        """Correct the store from time to time, until cancelled.

        Raises:
            DeafError: watches do not deliver.
        """
        wait = self._sweep_seconds
        swept_at = self._clock()
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._gap.wait(), jittered(wait))
                # The rest of that LIST comes too.
                pause = max(GAP_SECONDS, swept_at + MIN_SWEEP_SECONDS - self._clock())
                await asyncio.sleep(pause)
            gap = self._gap.is_set()
            self._gap.clear()
            self._undelivered.clear()
            steady = self._steady()
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
            self._listen(steady & self._steady(), gap=gap or self._gap.is_set())

    def _steady(self) -> set[tuple[Kind, str]]:
        """Return the kinds and namespaces watched for long enough that changes are delivered."""
        late = self._clock() - DELIVERY_SECONDS
        kopfs = {
            (kind, namespace) for namespace in self._scopes.steady(late) for kind in self._kinds
        }
        return kopfs | {(POD, namespace) for namespace in self._pods.steady(late)}

    def _listen(self, steady: set[tuple[Kind, str]], *, gap: bool) -> None:
        """Count sweeps that found what watches should have delivered."""
        missed = sum(where in steady for where in self._undelivered.values())
        if not missed or gap:
            self._deaf = 0
            return
        self._deaf += 1
        _log.warning("watches missed changes", extra={"changes": missed, "sweeps": self._deaf})
        if self._deaf >= DEAF_SWEEPS:
            raise DeafError(f"{DEAF_SWEEPS} sweeps in a row found changes no watch delivered")

    async def run_discovery(self) -> None:
        """Look for kinds whose CRDs were missing, until cancelled.

        This asks for what we may read, and so works without the right to look at CRDs.
        """
        while True:
            await asyncio.sleep(jittered(DISCOVERY_SECONDS))
            for kind in sorted(self._absent, key=_name):
                with suppress(api.ApiError):
                    await self._list_kind(kind)

    async def _list_all(self) -> list[str]:
        """Sweep every kind, and pods where pools are ours; return what went wrong."""
        failures: dict[str, None] = {}
        for kind in self._kinds:
            try:
                await self._list_kind(kind)
            except api.ApiError as error:
                failures[f"{_name(kind)}: {error}" if error.status else str(error)] = None
        for namespace in self._store.namespaces():
            if not self._acts_on(namespace):
                continue
            try:
                version = await self._list(POD, namespace)
                if version is not None:
                    self._pods.listed(namespace, version)
            except api.ApiError as error:
                failures[f"{_name(POD)}: {error}" if error.status else str(error)] = None
        return list(failures)

    async def _list_kind(self, kind: Kind) -> None:
        """Sweep one kind in every scope; one that fails does not keep the others from it."""
        error: api.ApiError | None = None
        for namespace in self._scopes.namespaces:
            try:
                await self._list(kind, namespace)
            except api.ApiError as what:
                error = error or what
        if error is not None:
            raise error

    async def _list(self, kind: Kind, namespace: str) -> str | None:
        """Sweep one kind in a namespace, "" for all.

        Returns:
            the version from which a watch continues; None if there is nothing to read.

        Raises:
            ApiError: the API server fails; one that denies the kind does not raise it.
        """
        sweep = self._store.begin_sweep(kind, namespace, self._clock())
        try:
            version = await self._take_pages(sweep, kind, namespace)
        except api.ApiError as error:
            self._changed(kind, sweep.swept.changed)
            if self._is_answer(error, kind, namespace):
                return None
            raise
        if kind in self._absent:
            _log.info("the CRD is installed now", extra={"kind": _name(kind)})
            self._absent.discard(kind)
            self._scopes.restart("")
        elif self._denials.allow(_name(kind), namespace) and kind != POD:
            self._scopes.restart(namespace)
        swept = sweep.finish(self._clock())
        key = (kind, namespace)
        if not swept.held:
            self._held.discard(key)
        elif key not in self._held:
            self._held.add(key)
            _log.error(
                "a LIST holds none of the known objects; waiting for a second one to confirm",
                extra={"kind": _name(kind), "namespace": namespace},
            )
        self._undelivered.update(dict.fromkeys(swept.corrected, (kind, namespace)))
        if key not in self._read:
            self._read.add(key)
            swept.changed |= {namespace} if namespace else set(self._store.namespaces())
        self._changed(kind, swept.changed)
        return version

    async def _take_pages(self, sweep: Sweep, kind: Kind, namespace: str) -> str:
        """Put a LIST into the store, and let others have the loop in between."""
        version = ""
        async for page in self._cluster.pages(kind, namespace):
            version = page.version
            for start in range(0, len(page.items), STEP_OBJECTS):
                sweep.take(page.items[start : start + STEP_OBJECTS], self._clock())
                await asyncio.sleep(0)
        return version

    def _is_answer(self, error: api.ApiError, kind: Kind, namespace: str) -> bool:
        """Note and return whether a LIST failed because the kind is missing or denied.

        What was known of it stays.
        """
        if error.status == 403:
            if self._denials.deny(_name(kind), namespace, str(error)) and kind != POD:
                self._scopes.restart(namespace)
            return True
        if error.status == 404 and kind.group:
            if kind not in self._absent:
                _log.info("the CRD is not installed", extra={"kind": _name(kind)})
            self._absent.add(kind)
            return True
        return False

    # --- watches

    async def run_watches(self) -> None:
        """Keep kopf running in every scope, until cancelled.

        Raises:
            DeafError: kopf does not stop when asked.
        """
        await self._scopes.run()

    async def stop(self) -> None:
        """End the watches of pods."""
        await self._pods.stop()

    def _readable(self, namespace: str) -> tuple[Kind, ...]:
        """Return the kinds that may be read in a namespace, "" for all."""
        return tuple(
            kind for kind in self._kinds if not self._denials.holds(_name(kind), namespace)
        )

    async def _list_pods(self, namespace: str) -> str | None:
        return await self._list(POD, namespace)

    def _on_pod(self, event: Any) -> None:
        self.on_event(POD, event)

    def _follow(self, namespace: str) -> None:
        """Begin to read the pods of a namespace in which a pool is ours, or end it."""
        acts = self._acts_on(namespace)
        if acts and namespace not in self._pods:
            self._pods.begin(namespace)
        elif not acts and namespace in self._pods:
            self._pods.end(namespace)
            self._read.discard((POD, namespace))
            self._denials.allow(_name(POD), namespace)
            self._store.forget(POD, namespace, self._clock())


def _name(kind: Kind) -> str:
    return f"{kind.plural}.{kind.group}" if kind.group else kind.plural
