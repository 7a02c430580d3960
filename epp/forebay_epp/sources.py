"""The source of an EPP's Plan and endpoints: a file, or the operator.

Either one says what to start with and then puts what is new into force with a `put` that app.py
gives it. What a program means belongs in codec/, what it does in the core.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Protocol

from watchfiles import awatch

from forebay_control.plan import Plan, PlanError
from forebay_epp.adapters.control import ControlClient, Dial, Identity, Slots
from forebay_epp.adapters.lastgood import LastGood
from forebay_epp.adapters.prometheus import ControlState
from forebay_epp.codec import plan as plan_codec
from forebay_epp.codec.control import Accepted, Applied, Nacked, Programs, Version
from forebay_epp.codec.stats import stats

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from forebay_control.v1 import control_pb2 as pb
    from forebay_epp.core.terms import ControllerState, Endpoint
    from forebay_epp.settings import ControlSettings, Settings
    from forebay_epp.traffic import Traffic

    Put = Callable[["Update"], Awaitable[None]]

PLAN_DEBOUNCE_MILLISECONDS = 50
PLAN_LOOK_MILLISECONDS = 1000
STALE_SECONDS = 60.0
SURVIVED_SECONDS = 60.0
GOODBYE_SECONDS = 1.0
DISK_SECONDS = 2.0

_log = logging.getLogger("forebay_epp")


@dataclass(frozen=True, slots=True)
class Update:
    """The desired parts.

    Attributes:
        plan: None: the one in force stays.
        endpoints: None: those in force stay.
        deleted: whether the pool is.
        version: of the operator's program that this is of, if it is of one.
    """

    plan: Plan | None
    endpoints: tuple[Endpoint, ...] | None
    deleted: bool = False
    version: Version | None = None


class PlanFileError(Exception):
    """The plan file cannot be used; the text says why."""


class Source(Protocol):
    """Where plan and endpoints come from.

    Attributes:
        first: what to start with.
        ready: set once there is a plan that is more than built-in defaults.
        usable: set once there is any endpoint, so that built-in defaults would do.
        bootstrap_seconds: how long to be unready for want of a plan.
    """

    first: Update
    ready: asyncio.Event
    usable: asyncio.Event
    bootstrap_seconds: float

    async def run(self, put: Put) -> None:
        """Put what is new into force, until cancelled."""

    async def leave(self) -> None:
        """Say goodbye to the operator, if there is one, before this process ends."""

    def state(self) -> ControlState | None:
        """Return what the metrics page shows of the control channel, if there is one."""


class PlanFile:
    """A Snapshot as JSON in a file, which is watched.

    Raises:
        PlanFileError: it cannot be read, or holds no valid snapshot.
    """

    bootstrap_seconds = 0.0

    def __init__(self, path: Path, traffic: Traffic) -> None:
        self._path = path
        self._traffic = traffic
        self._text = self._read()
        self.first = self._parse(self._text)
        self.ready = self.usable = asyncio.Event()
        self.ready.set()

    async def run(self, put: Put) -> None:
        """Take each new content of the file; what is not valid leaves the last good one.

        A look every second is not for speed: it finds what was written before the watch began.
        """
        async for _ in awatch(
            self._path.parent,
            debounce=PLAN_DEBOUNCE_MILLISECONDS,
            step=10,
            recursive=False,
            rust_timeout=PLAN_LOOK_MILLISECONDS,
            yield_on_timeout=True,
        ):
            try:
                text = await asyncio.to_thread(self._read)
                if text == self._text:
                    continue
                self._text = text
                update = self._parse(text)
            except PlanFileError as error:
                self._traffic.plan_reloaded(ok=False)
                _log.error("plan refused, the last good one stays: %s", error)
                continue
            await put(update)
            self._traffic.plan_reloaded(ok=True)

    async def leave(self) -> None:
        """There is no operator to say goodbye to."""

    def state(self) -> ControlState | None:
        """There is no control channel."""
        return None

    def _read(self) -> str:
        try:
            return self._path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise PlanFileError(f"--plan-file: {self._path}: {error}") from error

    def _parse(self, text: str) -> Update:
        try:
            return Update(*plan_codec.parse_snapshot_json(text))
        except PlanError as error:
            raise PlanFileError(f"{self._path}: {error}") from error


class Operator:
    """The operator's programs; the last good one from the disk until it is reached.

    Args:
        settings: of the process.
        control: the part of them that is about the operator.
        traffic: counters, to feed and to report.
        state: asks the controller for its state.
        slots: what the EPP holds of the pool's slots.
    """

    def __init__(
        self,
        settings: Settings,
        control: ControlSettings,
        traffic: Traffic,
        state: Callable[[], Awaitable[ControllerState]],
        slots: Slots,
    ) -> None:
        pool = f"{settings.pool_namespace}/{settings.pool_name}"
        self.bootstrap_seconds = control.bootstrap_timeout_seconds
        self.ready = asyncio.Event()
        self.usable = asyncio.Event()
        self._traffic = traffic
        self._ask_state = state
        self._put: Put | None = None
        self._began_at = time.monotonic()  # to run the plan that is kept
        self._begun = asyncio.Event()
        self._disk_failures: dict[str, int] = {}
        self._last_good = LastGood(control.state_path, pool, self._disk_failures)
        self._last_good.load()
        self.first, self._programs = self._from_disk(pool)
        self._client = ControlClient(
            Dial(
                control.host,
                control.port,
                control.server_name or control.host,
                control.ca_path,
                control.token_path,
                control.cert_path,
            ),
            Identity(
                control.pod_namespace,
                control.pod_name,
                control.pod_uid,
                uuid.uuid4().hex,
                metadata.version("forebay"),
            ),
            self._programs,
            self._apply,
            self._stats,
            slots,
            control.stats_interval_seconds,
        )

    def _from_disk(self, pool: str) -> tuple[Update, Programs]:
        """Take the newest plan on the disk that is valid, or built-in defaults; and endpoints."""
        state = self._last_good.state
        programs = Programs(pool, None, state.highest_epoch)
        programs.quarantined = frozenset(state.quarantined)
        plan = None
        plan_sha256, whole = b"", state.whole
        for kept in state.plans:
            read = programs.read_plan(kept.data)
            if not isinstance(read, Nacked):
                plan, plan_sha256 = read, kept.sha256
                self.ready.set()
                _log.info(
                    "starting on the last plan that was applied",
                    extra={"epoch": state.epoch, "revision": state.revision},
                )
                break
            whole = False
            self._disk_refused("plan", read)
        endpoints: tuple[Endpoint, ...] = ()
        kept_endpoints = programs.read_endpoints(state.endpoints)
        if isinstance(kept_endpoints, Nacked):
            whole = False
            self._disk_refused("endpoints", kept_endpoints)
        elif kept_endpoints:
            endpoints = kept_endpoints
            self.usable.set()
        if state.sha256:
            programs.applied = Applied(
                Version(state.epoch, state.revision),
                state.sha256,
                plan_sha256,
                "File" if plan else "Defaults",
                whole,
            )
        return Update(plan or Plan(pool=pool), endpoints, state.deleted), programs

    def _disk_refused(self, part: str, refused: Nacked) -> None:
        self._disk_failures["refused"] = self._disk_failures.get("refused", 0) + 1
        _log.error("the %s on disk is not used: %s", part, list(refused.problems))

    async def run(self, put: Put) -> None:
        """Keep a stream to the operator and apply what it sends, until cancelled."""
        self._put = put
        surviving = asyncio.create_task(self._survive())
        try:
            await self._client.run()
        finally:
            surviving.cancel()

    async def _survive(self) -> None:
        """Mark programs stable after SURVIVED_SECONDS."""
        while True:
            self._begun.clear()
            began_at = self._began_at
            await asyncio.sleep(began_at + SURVIVED_SECONDS - time.monotonic())
            if began_at == self._began_at:
                self._last_good.survived()
                await self._last_good.save(DISK_SECONDS)
                await self._begun.wait()

    async def _apply(self, accepted: Accepted) -> None:
        """Put what is accepted into force and onto the disk, in this order."""
        if self._put is None:
            raise AssertionError("programs come while running")
        applied, before = accepted.applied, self._programs.applied
        another = accepted.plan is not None and (
            before is None or before.plan_sha256 != applied.plan_sha256
        )
        if another:
            await self._last_good.attempt(applied.plan_sha256, DISK_SECONDS)
        try:
            await self._put(
                Update(accepted.plan, accepted.endpoints, accepted.deleted, applied.version)
            )
        except Exception:
            self._traffic.plan_reloaded(ok=False)
            raise
        finally:
            if another:
                self._last_good.attempted()
        state = self._last_good.state
        state.highest_epoch = max(state.highest_epoch, self._programs.highest_epoch)
        state.epoch, state.revision = applied.version.epoch, applied.version.revision
        state.sha256, state.whole = applied.sha256, applied.whole
        state.deleted = accepted.deleted
        if accepted.endpoints is not None:
            state.endpoints = accepted.endpoints_data
        if accepted.plan is not None:
            self._last_good.keep_plan(accepted.plan_data)
        if another:
            self._began_at = time.monotonic()
            self._begun.set()
        await self._last_good.save(DISK_SECONDS)
        self._traffic.plan_reloaded(ok=True)
        if accepted.plan is not None:
            self.ready.set()
        if accepted.endpoints:
            self.usable.set()

    async def leave(self) -> None:
        """Say goodbye to the operator, so that an orderly end does not count as a crash."""
        self._last_good.ended()
        await asyncio.gather(
            self._client.leave(GOODBYE_SECONDS), self._last_good.save(GOODBYE_SECONDS)
        )

    def state(self) -> ControlState:
        """Return what the metrics page shows of the control channel."""
        client, applied = self._client, self._programs.applied
        away = 0.0 if client.connected else time.monotonic() - client.disconnected_since
        return ControlState(
            connected=client.connected,
            stale=away > STALE_SECONDS,
            source=applied.source if applied else "Defaults",
            epoch=applied.version.epoch if applied else 0,
            revision=applied.version.revision if applied else 0,
            sha256=applied.sha256.hex() if applied else "",
            answers=client.answers,
            disk_failures=self._disk_failures,
            pool_deleted=self._last_good.state.deleted,
        )

    async def _stats(self) -> pb.Stats:
        return stats(await self._ask_state(), dict(self._traffic.outcomes), self._traffic.shadow)
