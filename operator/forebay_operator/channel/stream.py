"""One control stream: sends what is in its outbox, and reads until its end.

What is sent and what an answer means belong in server.py.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from forebay_control.channel import SILENCE_SECONDS
from forebay_control.v1 import control_pb2 as pb
from forebay_operator.channel.admission import RefusedError, not_a_message

if TYPE_CHECKING:
    from collections.abc import Callable

    from forebay_operator.channel.session import Session

PING_SECONDS = 10.0
WRITE_SECONDS = 10.0  # until an EPP has read what is sent to it

_log = logging.getLogger(__name__)


class Stream:
    """The stream of an EPP that was admitted.

    Args:
        pool: namespace/name of its pool.
        pod_uid: of its pod.
        pod_name: of its pod.
        session: what it was sent and has answered.
        clock: monotonic seconds.
        boot_id: of its process.

    Attributes:
        epp: names the process.
        wake: set when there may be something to send.
        ended: whether nothing more is sent or read.
    """

    def __init__(
        self,
        pool: str,
        pod_uid: str,
        pod_name: str,
        session: Session,
        clock: Callable[[], float],
        boot_id: str = "",
    ) -> None:
        self.pool = pool
        self.pod_uid = pod_uid
        self.pod_name = pod_name
        self.epp = f"{pod_uid} {boot_id}"
        self.session = session
        self._clock = clock
        self.wake = asyncio.Event()
        self.ended = False
        self._outbox: list[pb.FromOperator] = []
        self._refusal: RefusedError | None = None

    def send(self, message: pb.FromOperator) -> None:
        """Put a message into the outbox."""
        self._outbox.append(message)

    def end(
        self,
        last: pb.FromOperator | None = None,
        refusal: RefusedError | None = None,
    ) -> None:
        """Have a stream end, after a last message or for a reason."""
        if last is not None and not self.ended:
            self._outbox.append(last)
        self._refusal = self._refusal or refusal
        self.ended = True
        self.wake.set()

    async def serve(
        self,
        context: grpc.aio.ServicerContext[Any, Any],
        *,
        offer: Callable[[float], None],
        offers: Callable[[], bool],
        take: Callable[[pb.FromPicker, float], None],
    ) -> None:
        """Write and read until the stream ends.

        Args:
            context: the call.
            offer: puts the program into the outbox if it is to be sent now.
            offers: says whether there is a program that may have to be sent.
            take: takes a message of the EPP.

        Raises:
            RefusedError: the EPP has broken a rule.
        """
        reading = asyncio.create_task(self._read(context, take))
        try:
            await self._write(context, offer, offers)
        finally:
            reading.cancel()
            await asyncio.wait((reading,))

    async def _write(
        self,
        context: grpc.aio.ServicerContext[Any, Any],
        offer: Callable[[float], None],
        offers: Callable[[], bool],
    ) -> None:
        """Send all pending messages until the stream ends."""
        ping_at = self._clock()  # the first shows the EPP at once that it is served
        while True:
            now = self._clock()
            offer(now)
            if now >= ping_at:
                self._outbox.append(pb.FromOperator(ping=pb.Ping()))
                ping_at = now + PING_SECONDS
            while self._outbox:
                await self._send(self._outbox.pop(0), context)
            if self._refusal is not None:
                raise self._refusal
            if self.ended:
                return
            if now - self.session.heard_at > SILENCE_SECONDS:
                raise RefusedError(
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                    "silent",
                    f"nothing heard from {self.pod_name} for {SILENCE_SECONDS:.0f} s",
                )
            await self._sleep(ping_at, offers=offers())

    async def _send(
        self,
        message: pb.FromOperator,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                await context.write(message)
        except TimeoutError:
            raise RefusedError(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                "unread",
                f"{self.pod_name} does not read what it is sent",
            ) from None

    async def _sleep(self, ping_at: float, *, offers: bool) -> None:
        """Wait until there may be something to do."""
        now = self._clock()
        until = min(ping_at, self.session.heard_at + SILENCE_SECONDS + 0.1)
        if offers:
            until = min(until, self.session.offer_at(now))
        self.wake.clear()
        if self._outbox or self.ended:
            return
        with suppress(TimeoutError):
            await asyncio.wait_for(self.wake.wait(), max(0.01, until - now))

    async def _read(
        self,
        context: grpc.aio.ServicerContext[Any, Any],
        take: Callable[[pb.FromPicker, float], None],
    ) -> None:
        """Take what the EPP says until it stops."""
        try:
            while True:
                message = await context.read()
                if not isinstance(message, pb.FromPicker):
                    break
                now = self._clock()
                if not self.session.heard(now):
                    self.end(refusal=_flood())
                    return
                take(message, now)
                if self.ended:
                    return
        except DecodeError:
            self.end(refusal=not_a_message())
        except (grpc.RpcError, asyncio.InvalidStateError, grpc.aio.BaseError):
            _log.debug("control stream broke", extra={"pod": self.pod_name})
        except Exception:  # nothing that an EPP sends may end more than its own stream
            _log.exception("control stream failed", extra={"pod": self.pod_name})
        self.end()


def _flood() -> RefusedError:
    text = "too many messages: an EPP needs to send one every few seconds at most"
    return RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, "flood", text)
