"""The operator of a folder of manifests instead of a cluster.

The store, planning, the control server and the conditions are those of the cluster operator. There
is no election, and a pool's EPPs are those that are connected. Statuses are shown to people instead
of written.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forebay_control.channel import host_port
from forebay_operator import pages, planning
from forebay_operator.channel.server import ControlServer, namespace_of
from forebay_operator.channel.trust import unauthenticated
from forebay_operator.cluster.election import MAX_EPOCH
from forebay_operator.cluster.store import Store
from forebay_operator.reconcile.deletion import Deletions
from forebay_operator.reconcile.planner import Planner
from forebay_operator.reconcile.statuses import Statuses
from forebay_operator.reconcile.writing import StatusWriter
from forebay_operator.resources import (
    BY_NAME,
    POOL_LABEL,
    EndpointSlice,
    FlowControlPolicy,
    InferenceModel,
    InferenceObjective,
    InferencePool,
    InferencePoolV1Alpha2,
    messages,
)
from forebay_operator.standalone import sources
from forebay_operator.standalone.sources import Object

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp.web import AppRunner

    from forebay_control.v1 import control_pb2 as pb
    from forebay_operator.cluster.store import Entry
    from forebay_operator.resources import Kind, Resource
    from forebay_operator.standalone.sources import Manifests
    from forebay_operator.status.comparing import Transition

MAX_CHANGES = 20
_SLICE = BY_NAME["discovery.k8s.io/v1", "EndpointSlice"]
# Pending, as intended, or already reported as an error of the file.
_QUIET_REASONS = ("Pending", "AsExpected", "ResolvedRefs", "NoEndpointPickers", "Invalid")


class Folder:
    """Turns what a folder holds into objects with uids and generations, as an API server would.

    Args:
        store: what is filled.
        pool: namespace/name of the only pool that counts; None for all.
        endpoints: ip:port of servers that replace every EndpointSlice of that pool.
    """

    def __init__(
        self, store: Store, pool: str | None = None, endpoints: tuple[str, ...] = ()
    ) -> None:
        self._store = store
        self._pool = pool
        self._endpoints = endpoints
        self._known: dict[tuple[Kind, str, str], tuple[Object, str, int]] = {}

    def where(self, kind: Kind, namespace: str, name: str) -> str:
        """Describe an object's place, for people."""
        known = self._known.get((kind, namespace, name))
        return known[0].where if known else f"{kind.kind} {name}"

    def take(self, manifests: Manifests, now: float) -> set[str]:
        """Bring the store up to date; return the namespaces to plan again.

        What a file held that cannot be read now stays as it was.
        """
        changed: set[str] = set()
        objects = {
            (item.kind, item.namespace, item.name): item
            for item in (*self._counting(manifests), *self._servers())
        }
        for key, item in objects.items():
            known = self._known.get(key)
            if known is not None and known[0].manifest == item.manifest:
                self._known[key] = (item, *known[1:])
                continue
            uid, generation = (known[1], known[2] + 1) if known else (uuid.uuid4().hex, 1)
            self._known[key] = (item, uid, generation)
            metadata = {**item.manifest["metadata"], "uid": uid, "generation": generation}
            changed |= self._store.put(item.kind, {**item.manifest, "metadata": metadata}, now)
        for key, (item, uid, _) in list(self._known.items()):
            if key not in objects and not manifests.unread & {item.file, item.file.parent}:
                del self._known[key]
                changed |= self._store.remove(item.kind, uid, now)
        return changed

    def _counting(self, manifests: Manifests) -> list[Object]:
        """Leave out what is for another pool of the folder than the one that counts."""
        if self._pool is None:
            return list(manifests.objects)
        others = {
            f"{pool.metadata.namespace}/{pool.metadata.name}"
            for pool in planning.pools(manifests.resources)
        } - {self._pool}
        return [item for item in manifests.objects if not self._is_for(item, others)]

    def _is_for(self, item: Object, others: set[str]) -> bool:
        names = {f"{item.namespace}/{name}" for name in _pools_of(item.resource)}
        replaced = bool(self._endpoints) and item.kind is _SLICE
        return replaced or bool(names & others and self._pool not in names)

    def _servers(self) -> list[Object]:
        """Write the endpoints as slices of the pool."""
        if not self._endpoints or self._pool is None:
            return []
        namespace, _, pool = self._pool.partition("/")
        found = []
        for number, address in enumerate(self._endpoints):
            host, _, port = address.rpartition(":")
            name = f"endpoint-{number}"
            manifest = {
                "apiVersion": _SLICE.api_version,
                "kind": _SLICE.kind,
                "metadata": {"name": name, "namespace": namespace, "labels": {POOL_LABEL: pool}},
                "endpoints": [{"addresses": [host.removeprefix("[").removesuffix("]")]}],
                "ports": [{"port": int(port)}],
            }
            where = f"--endpoint {address}"
            found.append(Object(_SLICE, namespace, name, manifest, None, Path(), where))
        return found


def _pools_of(resource: Resource | None) -> list[str]:
    match resource:
        case InferencePool() | InferencePoolV1Alpha2():
            return [resource.metadata.name]
        case FlowControlPolicy():
            return [reference.name for reference in resource.spec.target_refs]
        case InferenceModel() | InferenceObjective():
            return [resource.spec.pool_ref.name]
        case EndpointSlice():
            return [resource.metadata.labels.get(POOL_LABEL, "")]
    return []


class FolderOperator:
    """The operator of a folder.

    Args:
        folder: the folder, watched by `run`.
        tell: gets lines for people; `bad` ones are about something to fix.
        pool: namespace/name of the only pool that counts; None for all.
        endpoints: ip:port of servers that replace the pool's EndpointSlices.
    """

    def __init__(
        self,
        folder: Path,
        tell: Callable[[str, bool], None],
        pool: str | None = None,
        endpoints: tuple[str, ...] = (),
    ) -> None:
        self._path = folder
        self._tell = tell
        self._store = Store()
        self._folder = Folder(self._store, pool, endpoints)
        self._control = ControlServer(
            unauthenticated, changed=self._epps_changed, higher_epoch=self._lead_from
        )
        self._deletions = Deletions(self._control, self._is_absent)
        self._planner = Planner(
            self._store,
            self._control,
            None,
            replanned=self._replanned,
            deletions=self._deletions,
        )
        self._statuses = Statuses(self._store, self._planner, None)
        self._writer = StatusWriter(self._store, self._planner, self._statuses, self)
        self._runner: AppRunner | None = None
        self._snapshots: dict[str, pb.Snapshot] = {}
        self._said: frozenset[str] = frozenset()
        self._errors: tuple[str, ...] = ()

    async def _is_absent(self, namespace: str, name: str) -> bool | None:
        """Return whether the folder has no such pool; not while a file cannot be read."""
        return None if self._errors else f"{namespace}/{name}" not in self._snapshots

    def _epps_changed(self, pool: str) -> None:
        self._writer.look_at(namespace_of(pool))

    def _replanned(self, namespace: str) -> None:
        self._writer.look_at(namespace)

    def _lead_from(self, seen: int, _uid: str, _namespace: str) -> None:
        if seen < MAX_EPOCH:
            self._control.lead(seen + 1)

    async def start(
        self,
        manifests: Manifests,
        control_host: str,
        control_port: int,
        http_host: str,
        http_port: int,
    ) -> int:
        """Plan, listen on both ports, and return the control port.

        Raises:
            OSError: the HTTP port cannot be bound.
            RuntimeError: the control port cannot be bound.
        """
        self._take(manifests)
        # Pickers refuse what is older than what they have seen, also from an operator before.
        self._control.lead(int(time.time()))
        self._writer.reporting = True
        self._runner = await pages.serve(
            http_host,
            http_port,
            self._statuses,
            self._store,
            lambda: self._writer.alive_at,
            lambda: "",
        )
        return await self._control.serve(host_port(control_host, control_port), None)

    async def run(self) -> None:
        """Follow the folder and the EPPs, until cancelled.

        Raises:
            OSError: the folder cannot be watched.
        """
        reporting = asyncio.create_task(self._writer.run())
        deleting = asyncio.create_task(self._deletions.run())
        try:
            async for manifests in sources.changes(self._path):
                self._take(manifests)
        finally:
            reporting.cancel()
            deleting.cancel()

    async def stop(self) -> None:
        """Let the EPPs go and close the ports."""
        await self._control.stop()
        if self._runner is not None:
            await self._runner.cleanup()

    def planned(self, pool: str) -> pb.Snapshot:
        """Return what a pool's EPPs are to run."""
        return self._snapshots[pool]

    # --- objects

    def _take(self, manifests: Manifests) -> None:
        now = time.monotonic()
        for namespace in sorted(self._folder.take(manifests, now)):
            self._planner.plan(namespace)
        self._complain(manifests)
        snapshots = {}
        for pool, planned in self._planner.planned():
            name = f"{pool.metadata.namespace}/{pool.metadata.name}"
            snapshots[name] = planned.snapshot
            before = self._snapshots.get(name)
            if before is not None and planned.snapshot != before:
                changes = planning.differences(before, planned.snapshot)
                if changes:
                    self._tell(_listed(f"{name} changes", changes), False)
        for name in self._snapshots.keys() - snapshots.keys():
            self._tell(f"InferencePool {name} is gone; its EPP drains", True)
        self._snapshots = snapshots

    def _complain(self, manifests: Manifests) -> None:
        """Report problems and settings without effect, once per message."""
        if manifests.errors != self._errors:
            for line in manifests.errors:
                if line not in self._errors:
                    self._tell(line, True)
            if self._errors and not manifests.errors:
                self._tell("manifests are valid again", False)
            self._errors = manifests.errors
        resources = [
            entry.resource
            for namespace in self._store.namespaces()
            for entry in self._store.entries(namespace)
            if entry.resource is not None
        ]
        problems = [*planning.unattached(resources)]
        for _, planned in self._planner.planned():
            problems += planned.problems
        lines = [*manifests.ignored, *(messages.printable(str(problem)) for problem in problems)]
        for line in lines:
            if line not in self._said:
                self._tell(f"warning: {line}", True)
        self._said = frozenset(lines)

    # --- statuses

    async def write(self, _entry: Entry, _status: dict[str, Any]) -> dict[str, Any] | None:
        """Keep the status; /resources shows it."""
        return None

    async def announce(self, entry: Entry, changes: list[Transition]) -> None:
        """Report conditions that have changed; new ones only if they are bad."""
        if not entry.kind.ours_to_report:
            return  # a pool's problems are reported with the manifests
        metadata = entry.metadata
        where = self._folder.where(entry.kind, metadata.namespace, metadata.name)
        for change in changes:
            if change.reason in _QUIET_REASONS or not (change.bad or change.before):
                continue
            text = f"{where}: {change.type}={change.status} {change.reason}"
            line = f"{text}: {change.message}" if change.message else text
            self._tell(messages.printable(line), change.bad)


def _listed(title: str, lines: list[str]) -> str:
    shown = [messages.printable(line) for line in lines[:MAX_CHANGES]]
    if len(lines) > MAX_CHANGES:
        shown.append(f"and {len(lines) - MAX_CHANGES} more")
    return "\n  ".join([f"{title}:", *shown])
