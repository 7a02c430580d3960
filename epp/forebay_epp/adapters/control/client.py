"""Keeps a stream to the operator, and answers the programs that come on it."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from forebay_control import features
from forebay_control.channel import PROTOCOL
from forebay_control.v1 import control_pb2 as pb
from forebay_control.v1 import control_pb2_grpc as rpc
from forebay_epp.adapters.control.dialling import NotReadyError
from forebay_epp.adapters.control.slots import FROZEN_SECONDS
from forebay_epp.adapters.control.stream import Stream
from forebay_epp.codec.control import Accepted, Code, Nacked

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from forebay_epp.adapters.control.dialling import Dial
    from forebay_epp.adapters.control.slots import Slots
    from forebay_epp.codec.control import Programs

MIN_BACKOFF_SECONDS = 0.2
MAX_BACKOFF_SECONDS = 10.0
MAX_ABSENT_SECONDS = 1.0  # between attempts while nothing listens, which costs no operator anything

_log = logging.getLogger("forebay_epp")


@dataclass(frozen=True, slots=True)
class Identity:
    """This EPP's identity."""

    pod_namespace: str
    pod_name: str
    pod_uid: str
    boot_id: str
    build: str


class ControlClient:
    """Keeps a stream to whichever replica of the operator leads.

    Args:
        dial: where and how.
        identity: who we are.
        programs: judges programs; holds what is in force.
        apply: puts a program into force, and returns when it is.
        stats: what to report.
        slots: what the EPP holds of the pool's slots.
        stats_seconds: how often.
    """

    def __init__(
        self,
        dial: Dial,
        identity: Identity,
        programs: Programs,
        apply: Callable[[Accepted], Awaitable[None]],
        stats: Callable[[], Awaitable[pb.Stats]],
        slots: Slots,
        stats_seconds: float = 5.0,
    ) -> None:
        self._dial = dial
        self._identity = identity
        self._programs = programs
        self._apply = apply
        self._stats = stats
        self.slots = slots
        self._stats_seconds = stats_seconds
        self._said = ""
        self._absent = False
        self._refused: Nacked | None = None
        self._judging = asyncio.Lock()
        self._tasks: set[asyncio.Task[pb.FromPicker]] = set()
        self._stream: Stream | None = None
        self._leaving = False
        self._left = asyncio.Event()
        self.connected = False
        self.disconnected_since = time.monotonic()
        self.answers: dict[str, int] = {"ack": 0, "nack": 0}

    async def run(self) -> None:
        """Dial until asked to leave."""
        relaxing = asyncio.create_task(self._relax())
        try:
            await self._dial_until_leaving()
        finally:
            relaxing.cancel()
        self._left.set()

    async def _dial_until_leaving(self) -> None:
        backoff = MIN_BACKOFF_SECONDS
        while not self._leaving:
            for address in await self._addresses():
                served, wait = await self._once(address)
                if served:
                    backoff = MIN_BACKOFF_SECONDS
                if self._leaving:
                    break
                if wait is not None:
                    await asyncio.sleep(wait)
            else:
                await asyncio.sleep(random.uniform(0, backoff))  # noqa: S311  # spreads load
                most = MAX_ABSENT_SECONDS if self._absent else MAX_BACKOFF_SECONDS
                backoff = min(2 * backoff, most)

    async def _relax(self) -> None:
        """Have the EPP share by what scrapes show once the operator has been away for a while."""
        relaxed_since = 0.0  # of which absence
        while True:
            since = self.disconnected_since
            away = 0.0 if self.connected else time.monotonic() - since
            if away >= FROZEN_SECONDS and relaxed_since != since:
                relaxed_since = since
                self.slots.relax()
            await asyncio.sleep(max(0.5, FROZEN_SECONDS - away))

    async def leave(self, timeout_seconds: float) -> None:
        """Say goodbye: this EPP will not come back."""
        self._leaving = True
        if self._stream is not None:
            self._stream.leave()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._left.wait(), timeout_seconds)

    # --- dialling

    async def _addresses(self) -> list[str]:
        try:
            return await self._dial.addresses()
        except NotReadyError as error:
            self._say(str(error))
            return []

    async def _once(self, address: str) -> tuple[bool, float | None]:
        """Serve one stream; return whether it was one, and how long the operator asks to wait.

        A failure costs only this stream: requests are still served.
        """
        stream = Stream(self)
        self._absent = False
        try:
            channel = self._dial.channel(address)
            try:
                call = rpc.ControlStub(channel).Connect(metadata=self._dial.metadata())  # type: ignore[no-untyped-call]  # generated
                self._stream = stream
                await stream.serve(call)
            finally:
                self._stream = None
                await channel.close(None)
        except NotReadyError as error:
            self._say(str(error))
        except grpc.aio.AioRpcError as error:
            self._absent = error.code() is grpc.StatusCode.UNAVAILABLE
            self._say(f"{address}: {error.code().name}: {error.details()}")
        except (TimeoutError, asyncio.InvalidStateError, grpc.aio.BaseError) as error:
            self._say(f"{address}: {error}")
        except Exception as error:
            self._say(f"{address}: {type(error).__name__}", error)
        finally:
            if self.connected:
                self.connected = False
                self.disconnected_since = time.monotonic()
        return stream.served, stream.retry_after

    def _say(self, text: str, error: Exception | None = None) -> None:
        """Log why there is no connection, once per reason."""
        if text != self._said:
            self._said = text
            _log.warning("no control connection: %s", text, exc_info=error)

    def hello(self) -> pb.FromPicker:
        """Send the Hello: identity and programs."""
        me, programs = self._identity, self._programs
        return pb.FromPicker(
            hello=pb.Hello(
                protocol=PROTOCOL,
                pool=programs.pool,
                pod_namespace=me.pod_namespace,
                pod_name=me.pod_name,
                pod_uid=me.pod_uid,
                boot_id=me.boot_id,
                build=me.build,
                applied=programs.applied.message() if programs.applied else None,
                highest_epoch=programs.highest_epoch,
                features=sorted(features.NAMES),
            )
        )

    async def answer(self, program: pb.Program) -> pb.FromPicker:
        """Judge a program, put it into force if it is good, and say so.

        A stream that ends meanwhile does not leave it half done.
        """
        task = asyncio.create_task(self._answer(program))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _answer(self, program: pb.Program) -> pb.FromPicker:
        async with self._judging:
            return await self._judged(program)

    async def _judged(self, program: pb.Program) -> pb.FromPicker:
        began = time.monotonic()
        verdict = self._programs.judge(program)
        if isinstance(verdict, Accepted):
            try:
                await self._apply(verdict)
            except Exception as error:
                _log.exception("a program could not be applied")
                verdict = Nacked(Code.INTERNAL, (("snapshot", f"{type(error).__name__}"),))
            else:
                self._programs.took(verdict)
        refused = verdict.refused if isinstance(verdict, Accepted) else verdict
        if refused is not None:
            parts = verdict.parts if isinstance(verdict, Accepted) else []
            self.answers["nack"] += 1
            # A plan that stays refused is offered with each change of the endpoints.
            _log.log(
                logging.INFO if refused == self._refused else logging.ERROR,
                "program refused, the one in force stays",
                extra={
                    "code": refused.code.value,
                    "problems": list(refused.problems),
                    "applied": parts,
                },
            )
            self._refused = refused
            return self._programs.nack(program, refused, parts)
        self._refused = None
        self.answers["ack"] += 1
        return self._programs.ack(program, time.monotonic() - began)

    def opened(self) -> None:
        """Note that the operator talks to us."""
        if not self.connected:
            self.connected = True
            self._said = ""
            _log.info("control connection", extra={"pool": self._programs.pool})

    async def report(self) -> pb.FromPicker:
        """Return stats to send."""
        return pb.FromPicker(stats=await self._stats())

    @property
    def stats_seconds(self) -> float:
        """How often stats are sent."""
        return self._stats_seconds
