"""Assembles an operator: one asyncio loop, from sources to planning to EPPs and statuses.

In a cluster resources come from kopf's watches, and one of several replicas leads. With a folder of
manifests, the operator of standalone/ runs instead.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import signal
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from forebay_control import tls
from forebay_control.channel import host_port
from forebay_operator import metrics, pages
from forebay_operator.certificates.issuing import Issuer, Places
from forebay_operator.channel.server import ControlServer, namespace_of
from forebay_operator.channel.trust import CertificateTrust, Pods, TokenTrust, unauthenticated
from forebay_operator.cluster.api import FIELD_MANAGER, ApiError, Cluster
from forebay_operator.cluster.denials import Denial, Denials
from forebay_operator.cluster.election import Elector, Leadership
from forebay_operator.cluster.scopes import DeafError
from forebay_operator.cluster.store import Store
from forebay_operator.cluster.watching import Watching
from forebay_operator.reconcile.deletion import Deletions, is_absent
from forebay_operator.reconcile.planner import Planner
from forebay_operator.reconcile.statuses import Statuses
from forebay_operator.reconcile.writing import StatusWriter
from forebay_operator.resources import KINDS, POD, EndpointSlice, Pod
from forebay_operator.standalone import sources
from forebay_operator.standalone.folder import FolderOperator

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from pathlib import Path

    from forebay_operator.cluster.store import Entry
    from forebay_operator.settings import Settings
    from forebay_operator.status.comparing import Transition

FINISH_SECONDS = 5.0
# An EndpointSlice may hold any address, those of other namespaces' pods too (CVE-2021-25740).
KINDS_BY_DEFAULT = tuple(kind for kind in KINDS if kind.model is not EndpointSlice)

_log = logging.getLogger("forebay_operator")


class StartError(Exception):
    """The process cannot start; the text says what to do."""


async def run_folder(settings: Settings, folder: Path) -> int:
    """Run the operator of a folder until a signal."""
    stop = asyncio.Event()
    running = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        running.add_signal_handler(number, stop.set)

    def tell(line: str, bad: bool) -> None:  # noqa: FBT001  # the only property of a line
        _log.log(logging.WARNING if bad else logging.INFO, line)

    operator = FolderOperator(folder, tell)
    try:
        port = await operator.start(
            sources.read(folder),
            settings.control_bind_address,
            settings.control_port,
            settings.http_bind_address,
            settings.http_port,
        )
    except OSError as error:
        raise StartError(f"--http-port {settings.http_port}: {error.strerror}") from error
    except RuntimeError as error:
        raise StartError(f"--control-port {settings.control_port}: in use?") from error
    _log.info("listening", extra={"control_port": port, "http_port": settings.http_port})
    following = asyncio.create_task(operator.run())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((following, stopping), return_when=asyncio.FIRST_COMPLETED)
        if following.done():
            _log.critical("the folder cannot be followed: %s", following.exception())
            return 1
    finally:
        following.cancel()
        stopping.cancel()
        await asyncio.gather(following, stopping, return_exceptions=True)
        await operator.stop()
    return 0


class ClusterReporter:
    """Writes statuses and Events to the API server."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    async def write(self, entry: Entry, status: dict[str, Any]) -> dict[str, Any] | None:
        """Apply the status."""
        metadata = entry.metadata
        return await self._cluster.apply_status(
            entry.kind, metadata.namespace, metadata.name, metadata.uid, status
        )

    async def announce(self, entry: Entry, changes: list[Transition]) -> None:
        """Post an Event per condition that people should hear of."""
        for change in changes:
            if change.reason in ("Pending", "AsExpected", "ResolvedRefs"):
                continue
            text = f"{change.type}={change.status}"
            await self._cluster.event(
                api_version=entry.kind.api_version,
                kind=entry.kind.kind,
                namespace=entry.metadata.namespace,
                name=entry.metadata.name,
                uid=entry.metadata.uid,
                warning=change.bad,
                reason=change.reason,
                message=f"{text}: {change.message}" if change.message else text,
            )


class ClusterOperator:
    """The operator of a cluster."""

    def __init__(self, settings: Settings, cluster: Cluster | None = None) -> None:
        self._settings = settings
        self._cluster = cluster or Cluster(manager=f"{FIELD_MANAGER}-{settings.controller_name}")
        self._store = Store()
        self._denials = Denials(self._tell)
        self._told: set[asyncio.Task[None]] = set()
        self._control = ControlServer(
            self._trust(),
            changed=self._epps_changed,
            higher_epoch=self._higher_epoch,
        )
        self._deletions = Deletions(self._control, functools.partial(is_absent, self._cluster))
        self._planner = Planner(
            self._store,
            self._control,
            settings.controller_name,
            replanned=self._replanned,
            deletions=self._deletions,
        )
        self._statuses = Statuses(self._store, self._planner, settings.controller_name)
        self._writer = StatusWriter(
            self._store, self._planner, self._statuses, ClusterReporter(self._cluster)
        )
        self._watching = Watching(
            self._cluster,
            self._store,
            self._planner.touch,
            self._planner.acts_on,
            self._denials,
            settings.namespaces,
            settings.sweep_interval_seconds,
            KINDS if settings.endpoint_slices else KINDS_BY_DEFAULT,
        )
        self._planner.unread = self._watching.unread
        self._statuses.denied = lambda name: [str(each) for each in self._denials.of(name)]
        instance = settings.identity or uuid.uuid4().hex
        self._elector = Elector(
            self._cluster,
            settings.lease_namespace,
            settings.lease_name,
            f"{instance}/{uuid.uuid4().hex[:8]}",
            self._lead,
        )
        self._issuer = self._new_issuer()
        self._stop = asyncio.Event()

    def _new_issuer(self) -> Issuer | None:
        settings = self._settings
        if not settings.control_tls_secret:
            return None
        places = Places(
            settings.lease_namespace, settings.control_tls_secret, settings.control_ca_configmaps
        )
        return Issuer(self._cluster, places, settings.control_server_name, self._denials)

    def _trust(self) -> Any:
        def expected(pool: str) -> Any:
            return self._planner.expected(pool)

        def addresses(uid: str) -> frozenset[str]:
            entry = self._store.get(POD, uid)
            pod = entry.resource if entry is not None else None
            return pod.addresses if isinstance(pod, Pod) else frozenset()

        settings = self._settings

        def is_deleted(pool: str) -> bool:
            namespaces = settings.namespaces
            watched = not namespaces or pool.partition("/")[0] in namespaces
            return watched and self._deletions.is_deleted(pool)

        checked = addresses if settings.control_peer_address == "pod" else None
        pods = Pods(expected, checked, is_deleted)
        match settings.control_client_auth:
            case "token":
                return TokenTrust(self._cluster.review_token, pods, settings.control_audience)
            case "certificate":
                return CertificateTrust(pods)
        return unauthenticated

    def _tell(self, denial: Denial, new: bool) -> None:  # noqa: FBT001  # as Denials calls it
        """Post an Event about the operator's own Lease: elsewhere it may lack the right."""

        async def post() -> None:
            with suppress(ApiError):  # it is in the log as well
                await self._cluster.event(
                    api_version="coordination.k8s.io/v1",
                    kind="Lease",
                    namespace=self._settings.lease_namespace,
                    name=self._settings.lease_name,
                    warning=new,
                    reason="Denied" if new else "Allowed",
                    message=str(denial) if new else f"no longer: {denial}",
                )

        task = asyncio.get_running_loop().create_task(post())
        self._told.add(task)
        task.add_done_callback(self._told.discard)

    def _epps_changed(self, pool: str) -> None:
        self._writer.look_at(namespace_of(pool))

    def _replanned(self, namespace: str) -> None:
        self._writer.look_at(namespace)

    def _higher_epoch(self, epoch: int, uid: str, namespace: str) -> None:
        self._elector.see_epoch(epoch, uid, namespace)

    def _lead(self, leadership: Leadership) -> None:
        epoch = leadership.epoch
        metrics.LEADING.set(epoch or 0)
        self._control.lead(epoch, quiet=leadership.quiet, hint=leadership.holder)
        self._writer.reporting = epoch is not None and not leadership.quiet
        if epoch is None:
            self._writer.forget_pending()

    async def run(self) -> int:
        """Run until a signal, or until something that has to run has ended."""
        running = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            running.add_signal_handler(number, self._stop.set)
        runner = await self._serve_pages()
        tasks: list[asyncio.Task[Any]] = []

        def start(work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
            tasks.append(asyncio.create_task(work, name=name))
            return tasks[-1]

        try:
            stopping = start(self._stop.wait(), "signals")
            start(self._writer.run(), "reporting")  # the sign of life of /livez
            if self._issuer is not None:
                issuing = start(self._issuer.first(), "first certificate")
                if await self._first(tasks) is not issuing:
                    return 0 if stopping.done() else 1
                tasks.remove(issuing)
                start(self._issuer.run(), "certificates")
            await self._serve_control()
            filling = start(self._watching.fill(), "first lists")
            if await self._first(tasks) is filling:
                tasks.remove(filling)
                # All of it before any EPP is programmed: in a part, the rest would be absent.
                await self._planner.plan_touched()
                start(self._planner.run(), "planning")
                start(self._deletions.run(), "deletions")
                start(self._watching.run_sweeps(), "sweeps")
                start(self._watching.run_discovery(), "discovery")
                start(self._watching.run_watches(), "watches")
                start(self._elector.run(), "election")
                gc.collect()
                gc.freeze()
                await self._first(tasks)
            return 0 if stopping.done() else 1
        finally:
            await self._control.stop()
            with suppress(TimeoutError, ApiError):
                await asyncio.wait_for(self._elector.release(), FINISH_SECONDS)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=FINISH_SECONDS)
            await self._watching.stop()
            await runner.cleanup()
            await self._cluster.close()

    async def _first(self, tasks: list[asyncio.Task[Any]]) -> asyncio.Task[Any]:
        """Wait for the first of the tasks to end, and log how if it failed."""
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            error = task.exception()
            if isinstance(error, DeafError):
                _log.critical("%s", error)
            elif error is not None:
                _log.critical("%s has ended: %s", task.get_name(), error, exc_info=error)
        return min(done, key=tasks.index)

    async def _serve_pages(self) -> Any:
        settings = self._settings
        try:
            return await pages.serve(
                settings.http_bind_address,
                settings.http_port,
                self._statuses,
                self._store,
                lambda: self._writer.alive_at,
                lambda: self._watching.waits_for,
                lambda: str(self._denials),
            )
        except OSError as error:
            raise StartError(f"--http-port {settings.http_port}: {error.strerror}") from error

    async def _serve_control(self) -> None:
        settings = self._settings
        address = host_port(settings.control_bind_address, settings.control_port)
        credentials = self._credentials()
        try:
            port = await self._control.serve(address, credentials)
        except RuntimeError as error:
            raise StartError(f"--control-port: cannot bind {address}: in use?") from error
        _log.info("listening", extra={"control_port": port, "http_port": settings.http_port})

    def _credentials(self) -> Any:
        """Return what the control channel proves itself with; None on a loopback address."""
        settings = self._settings
        if (issuer := self._issuer) is not None:
            return tls.server_credentials(lambda: (*issuer.pair, None), _log)
        if settings.control_tls_path is None:
            return None
        with_ca = settings.control_client_auth == "certificate"
        read = tls.from_folder(settings.control_tls_path, with_ca=with_ca)
        try:
            return tls.server_credentials(read, _log, require_client_certificate=with_ca)
        except (OSError, ValueError) as error:
            raise StartError(f"--control-tls-path: {error}") from error
