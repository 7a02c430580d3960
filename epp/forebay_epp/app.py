"""Assembles an EPP, runs it, and shuts it down.

Two threads: the transport's, which owns the controller, and the main one, an asyncio loop for
everything else (scrapes, the plan file or the operator, metrics). News crosses by `DataPlane.post`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from aiohttp import web

from forebay_control import memory
from forebay_control.channel import host_port
from forebay_control.plan import MetricsPlan, Plan, SaturationMode, UnmatchedAction
from forebay_epp.adapters import debug, live, logs, prometheus
from forebay_epp.adapters.control import Slots
from forebay_epp.adapters.live.history import History
from forebay_epp.adapters.live.report import MAX_FLOWS, PolicyInForce, describe
from forebay_epp.adapters.scraper import Scraper
from forebay_epp.adapters.served import ServedModels
from forebay_epp.core.observation.shadowed import ShadowedController
from forebay_epp.data_plane import DataPlane
from forebay_epp.handover import ask, hand_over
from forebay_epp.observers import Observer, Observers, Watch
from forebay_epp.sources import Operator, PlanFile, PlanFileError
from forebay_epp.traffic import Traffic
from forebay_epp.transport import Connections, credentials, health
from forebay_epp.transport.aio import AioTransport
from forebay_epp.transport.completion_queue import CompletionQueueTransport

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc

    from forebay_control.shares import Shares
    from forebay_epp.core.holdings import Holdings
    from forebay_epp.core.terms import ControllerState, Endpoint, HealthChange
    from forebay_epp.settings import Settings
    from forebay_epp.sources import Source, Update
    from forebay_epp.transport import Transport

FINISH_SECONDS = 5.0
QUIET_SECONDS = 0.3

TRANSPORTS: dict[
    str, Callable[[DataPlane, str, grpc.ServerCredentials | None, Connections], Transport]
] = {
    "completion-queue": CompletionQueueTransport,
    "aio": AioTransport,
}

_LACKS = {
    Watch.MISSING: "an answer was not shown: the proxy needs an ext_proc filter that observes "
    "behind the one that decides",
    Watch.UNTIED: "an answer without a tie was shown: the proxy needs an ext_proc filter that "
    "decides before the one that observes, and the metadata forebay.responses before both",
}

_T = TypeVar("_T")

_log = logging.getLogger("forebay_epp")


class StartError(Exception):
    """The process cannot start; the text says what to do."""


def run(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT, drain, and return the exit status."""
    memory.limit_fragmentation()
    logs.configure(settings.verbosity, sys.stderr)
    try:
        epp = EndpointPicker(settings)
    except StartError as error:
        _log.critical("cannot start: %s", error)
        return 2
    # The data-plane thread handles an event in some 50 us; 5 ms of another thread would show.
    sys.setswitchinterval(0.0005)
    memory.make_collections_rare()
    return asyncio.run(epp.run())


class EndpointPicker:
    """One EPP process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._traffic = Traffic()
        self._policy = PolicyInForce()
        self._history = History(self._traffic)
        self._slots: Slots | None = None
        self._source = self._open_source()
        first = self._source.first
        plan, endpoints = first.plan or Plan(), first.endpoints or ()
        self._controller = ShadowedController(plan, random.Random())  # noqa: S311  # spreads load
        self._controller.set_endpoints(endpoints, time.monotonic())
        if first.deleted:
            self._controller.delete_pool(time.monotonic())
        self._data_plane = DataPlane(
            self._controller,
            Observers(self._traffic, self._policy, _Log()),
            settings.max_streams,
            address=host_port(settings.advertised_address, settings.grpc_port)
            if settings.advertised_address
            else "",
        )
        self._scraper = Scraper(
            lambda metrics: self._data_plane.post(
                lambda now: self._controller.observe(metrics, now)
            ),
            interval_seconds=settings.scrape_interval_seconds,
            report_failure=self._scrape_failed,
        )
        self._served = ServedModels(
            lambda models: self._data_plane.post(lambda _: self._data_plane.catalogue.serve(models))
        )
        self._endpoints = endpoints
        self._ask_servers(plan, endpoints)
        self._transport = self._bind()
        self._health = self._serve_health()
        self._failed: BaseException | None = None

    def _open_source(self) -> Source:
        settings = self._settings
        if settings.control is not None:
            self._slots = Slots(self._holdings, self._share, self._relax)
            return Operator(settings, settings.control, self._traffic, self._state, self._slots)
        if settings.plan_file is None:
            raise StartError("neither --plan-file nor --control-address")
        try:
            return PlanFile(settings.plan_file, self._traffic)
        except PlanFileError as error:
            raise StartError(str(error)) from error

    def _bind(self) -> Transport:
        settings = self._settings
        address = host_port(settings.bind_address, settings.grpc_port)
        bind = TRANSPORTS[settings.transport]
        try:
            return bind(
                self._data_plane,
                address,
                _credentials(settings),
                Connections(settings.max_message_bytes),
            )
        except RuntimeError as error:
            raise StartError(f"--grpc-port: cannot bind {address}: in use?") from error

    def _serve_health(self) -> grpc.Server:
        settings = self._settings
        address = host_port(settings.bind_address, settings.grpc_health_port)
        try:
            server, _ = health.serve(address, lambda: self._data_plane.serving, self._alive)
        except RuntimeError as error:
            raise StartError(f"--grpc-health-port: cannot bind {address}: in use?") from error
        return server

    def _alive(self) -> bool:
        """Return whether the data-plane thread still turns; a thread of the health server asks."""
        turned = threading.Event()
        self._data_plane.post(lambda _: turned.set())
        return turned.wait(FINISH_SECONDS)

    async def run(self) -> int:
        """Serve until a signal, then drain."""
        stopping = asyncio.Event()
        running = asyncio.get_running_loop()
        if self._slots is not None:
            self._data_plane.on_urgent = _setter(running, self._slots.urgent)
        for number in (signal.SIGTERM, signal.SIGINT):
            running.add_signal_handler(number, stopping.set)
        thread = threading.Thread(
            target=self._serve, args=(running, stopping), name="data-plane", daemon=True
        )
        thread.start()
        runner = web.AppRunner(self._web_app(), access_log=None)
        try:
            await self._serve_metrics(runner)
            background = [
                asyncio.create_task(self._scraper.run()),
                asyncio.create_task(self._served.run()),
                asyncio.create_task(self._history.run()),
                asyncio.create_task(self._source.run(self._put)),
            ]
            becoming_ready = asyncio.create_task(self._become_ready())
            await self._until(stopping, background)
            becoming_ready.cancel()
            await self._drain()
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
        except StartError as error:
            _log.critical("cannot start: %s", error)
            self._failed = error
        finally:
            await runner.cleanup()
        self._data_plane.post(lambda _: self._transport.stop())
        await asyncio.to_thread(thread.join, FINISH_SECONDS)
        self._health.stop(0)
        return 1 if self._failed else 0

    def _serve(self, running: asyncio.AbstractEventLoop, stopping: asyncio.Event) -> None:
        """Run the data-plane thread. If it fails the process ends."""
        try:
            self._transport.serve()
        except BaseException as error:
            self._failed = error
            _log.critical("the data plane has failed", exc_info=error)
            raise
        finally:
            with suppress(RuntimeError):  # the asyncio loop may be gone already
                running.call_soon_threadsafe(stopping.set)

    async def _become_ready(self) -> None:
        """Serve once there is a plan.

        Where none comes for too long, built-in defaults do, but only with endpoints: an EPP without
        any could only refuse, and its predecessor should rather stay.
        """
        source = self._source
        ready = asyncio.create_task(source.ready.wait())
        usable = asyncio.create_task(source.usable.wait())
        await asyncio.wait((ready,), timeout=source.bootstrap_seconds or None)
        if not ready.done():
            if not usable.done():
                _log.error(
                    "no program within %g s (--bootstrap-timeout), and no endpoints: unready until "
                    "one of them arrives",
                    source.bootstrap_seconds,
                )
                await asyncio.wait((ready, usable), return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                _log.error("no plan yet: serving on built-in defaults")
        usable.cancel()
        ready.cancel()
        self._data_plane.serving = True
        _log.info(
            "serving",
            extra={"grpc_port": self._transport.port, "pool": self._controller.plan.pool},
        )

    async def _until(self, stopping: asyncio.Event, background: list[asyncio.Task[None]]) -> None:
        """Wait for a signal; a background task that ends is a failure and ends the process."""
        wait = asyncio.create_task(stopping.wait())
        done, _ = await asyncio.wait([wait, *background], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if task is not wait:
                self._failed = task.exception() or RuntimeError("a background task has ended")
                _log.critical("a background task has failed", exc_info=self._failed)
        wait.cancel()

    async def _ask(self, question: Callable[[float], _T]) -> _T:
        """Have the data-plane thread answer."""
        return await ask(self._data_plane.post, question, FINISH_SECONDS)

    async def _drain(self) -> None:
        """Become unready at once, dispatch what waits, refuse the rest, let answers end."""
        if self._failed:
            return
        self._data_plane.serving = False
        self._data_plane.post(lambda _: self._data_plane.drain())
        await self._source.leave()
        _log.info("draining", extra={"seconds": self._settings.drain_timeout_seconds})
        await self._until_finished(self._settings.drain_timeout_seconds)
        self._data_plane.post(self._data_plane.flush)
        await self._until_finished(FINISH_SECONDS)
        with suppress(TimeoutError):
            if cut := await self._ask(lambda _: self._data_plane.unfinished):
                _log.warning(
                    "cut answers that were still running: raise --drain-timeout",
                    extra={"answers": cut},
                )

    async def _until_finished(self, seconds: float) -> None:
        """Wait until nothing waits or is in flight for a moment, at most `seconds`."""
        deadline = time.monotonic() + seconds
        quiet_since: float | None = None
        while (now := time.monotonic()) < deadline:
            try:
                busy = bool(await self._ask(lambda _: self._data_plane.unfinished))
            except TimeoutError:  # the data plane is too busy to say
                busy = True
            if busy:
                quiet_since = None
            elif quiet_since is None:
                quiet_since = now
            elif now - quiet_since >= QUIET_SECONDS:
                return
            await asyncio.sleep(0.05)

    # --- plan

    async def _put(self, update: Update) -> None:
        """Put plan and endpoints into force in one step; what is not given stays."""
        await hand_over(self._data_plane.post, self._putting(update), FINISH_SECONDS)
        if update.endpoints is not None:
            self._endpoints = update.endpoints
        self._ask_servers(update.plan or self._controller.plan, self._endpoints)

    def _putting(self, update: Update) -> Callable[[float], None]:
        """Return the call that puts the update into force on the data-plane thread."""

        def put(now: float) -> None:
            if update.plan is not None:
                self._data_plane.reconfigure(update.plan, now)
            if update.endpoints is not None:
                self._controller.set_endpoints(update.endpoints, now)
            if update.deleted:
                self._controller.delete_pool(now)
            else:
                self._controller.restore_pool(now)
            _log.info("program applied", extra=_logged(update))

        return put

    def _ask_servers(self, plan: Plan, endpoints: tuple[Endpoint, ...]) -> None:
        """Ask for metrics where they decide anything, and for models where unmatched ones pass."""
        addresses = frozenset(endpoint.address for endpoint in endpoints)
        adaptive = plan.saturation.mode is SaturationMode.ADAPTIVE
        self._scraper.set_metrics(plan.metrics or MetricsPlan())
        self._scraper.set_addresses(addresses if adaptive else frozenset())
        queued = plan.unmatched.action is UnmatchedAction.QUEUE
        self._served.set_addresses(addresses if queued else frozenset())

    # --- shares

    async def _holdings(self, first: bool) -> Holdings:  # noqa: FBT001  # a callback
        """Ask what the EPP has and wants; the `first` time of a stream it holds no more after."""

        def ask_core(_: float) -> Holdings:
            if first:
                self._controller.freeze_shares()
            return self._controller.holdings()

        return await self._ask(ask_core)

    async def _share(self, shares: Shares) -> Holdings:
        data_plane = self._data_plane
        return await hand_over(
            data_plane.post, lambda now: data_plane.share(shares, now), FINISH_SECONDS
        )

    def _relax(self) -> None:
        self._data_plane.post(lambda _: self._controller.relax_shares())

    # --- scrapes

    def _scrape_failed(self, address: str, refused: bool) -> None:  # noqa: FBT001  # a callback
        self._data_plane.post(
            lambda now: self._controller.scrape_failed(address, now, refused=refused)
        )

    # --- pages

    async def _state(self) -> ControllerState:
        return await self._ask(self._controller.state)

    async def _report(self) -> dict[str, object]:
        state = await self._ask(lambda now: self._controller.state(now, MAX_FLOWS))
        control = self._source.state()
        program: dict[str, object] | None = None
        if control is not None:
            program = {
                "source": control.source,
                "connected": control.connected,
                "epoch": control.epoch,
                "revision": control.revision,
                "sha256": control.sha256,
            }
        return describe(state, self._policy, self._history, program)

    def _web_app(self) -> web.Application:
        app = web.Application()
        source = self._source
        app.add_routes(
            prometheus.routes(self._state, self._traffic, self._scraper.failures, source.state)
        )
        app.add_routes(debug.routes(self._state))
        app.add_routes(live.routes(self._report, to_all=self._settings.live_to_all))
        return app

    async def _serve_metrics(self, runner: web.AppRunner) -> None:
        settings = self._settings
        await runner.setup()
        site = web.TCPSite(runner, settings.bind_address, settings.metrics_port)
        try:
            await site.start()
        except OSError as error:
            address = host_port(settings.bind_address, settings.metrics_port)
            raise StartError(f"--metrics-port: cannot bind {address}: {error.strerror}") from error


def _setter(running: asyncio.AbstractEventLoop, event: asyncio.Event) -> Callable[[], None]:
    """Return what sets an event of the asyncio thread from another one."""

    def tell() -> None:
        with suppress(RuntimeError):  # the loop may be gone already
            running.call_soon_threadsafe(event.set)

    return tell


def _logged(update: Update) -> dict[str, object]:
    """Describe an update, for the log."""
    endpoints = None if update.endpoints is None else len(update.endpoints)
    what: dict[str, object] = {
        "plan": update.plan is not None,
        "endpoints": endpoints,
        "deleted": update.deleted,
    }
    version = update.version
    return what | ({"epoch": version.epoch, "revision": version.revision} if version else {})


def _credentials(settings: Settings) -> grpc.ServerCredentials | None:
    if not settings.secure_serving:
        return None
    if settings.cert_path is None:
        return credentials.self_signed()
    try:
        return credentials.from_folder(settings.cert_path)
    except (OSError, ValueError) as error:
        raise StartError(f"--cert-path: {error}") from error


class _Log(Observer):
    """Logs which endpoints are left out, and once each what a proxy lacks to observe answers."""

    def __init__(self) -> None:
        self._lacks: set[Watch] = set()

    def watched(self, kind: Watch) -> None:
        if kind in _LACKS and kind not in self._lacks:
            self._lacks.add(kind)
            _log.warning("%s; until then scrapes free the slots", _LACKS[kind])

    def health_changed(self, change: HealthChange) -> None:
        extra = {"endpoint": change.address, "pod": change.name, "cause": change.cause}
        if change.out:
            _log.warning("endpoint fails and is left out", extra=extra)
        else:
            _log.info("endpoint is back", extra=extra)
