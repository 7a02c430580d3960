"""One stream to an operator: what is read, answered and reported on it."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, Protocol

import grpc

from forebay_control.channel import SILENCE_SECONDS
from forebay_control.v1 import control_pb2 as pb
from forebay_epp.adapters.control.slots import Sharing, Slots

PING_SECONDS = 10.0
MAX_RETRY_AFTER_SECONDS = 60.0
GOODBYE_SECONDS = 1.0

_log = logging.getLogger("forebay_epp")


class Client(Protocol):
    """What a stream asks of the client that has opened it."""

    connected: bool
    slots: Slots

    @property
    def stats_seconds(self) -> float:
        """How often stats are sent."""

    def hello(self) -> pb.FromPicker:
        """Return the first message."""

    def opened(self) -> None:
        """Note that the operator talks to us."""

    async def answer(self, program: pb.Program) -> pb.FromPicker:
        """Judge a program and put it into force; return the answer."""

    async def report(self) -> pb.FromPicker:
        """Return stats to send; TimeoutError: the data plane is busy."""


class Stream:
    """One stream: a reader, one that answers programs, and a writer that also reports."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._heard_at = time.monotonic()
        self._programs: asyncio.Queue[pb.Program] = asyncio.Queue()
        self._outbox: asyncio.Queue[pb.FromPicker] = asyncio.Queue()
        self._sharing = Sharing(client.slots, self._outbox.put_nowait)
        self.served = False
        self.retry_after: float | None = None

    def leave(self) -> None:
        """Say goodbye and end."""
        self._outbox.put_nowait(pb.FromPicker(bye=pb.Bye()))

    async def serve(self, call: Any) -> None:
        """Talk until either side ends it."""
        await call.write(self._client.hello())
        reading = asyncio.create_task(self._read(call))
        answering = asyncio.create_task(self._answer())
        writing = asyncio.create_task(self._write(call))
        sharing = asyncio.create_task(self._sharing.run(lambda: self._client.connected))
        tasks = (reading, answering, writing, sharing)
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            if writing.done():  # we have said goodbye; the operator ends the stream
                await asyncio.wait((reading,), timeout=GOODBYE_SECONDS)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            call.cancel()

    async def _read(self, call: Any) -> None:
        while True:
            message = await call.read()
            if message is grpc.aio.EOF:
                return
            self._heard_at = time.monotonic()
            match message.WhichOneof("message"):
                case "program":
                    self._client.opened()
                    self.served = True
                    self._programs.put_nowait(message.program)
                case "shares":
                    self._sharing.take(message.shares)
                case "not_leader":
                    return
                case "close":
                    seconds = message.close.retry_after_seconds
                    if 0 <= seconds <= MAX_RETRY_AFTER_SECONDS:
                        self.retry_after = seconds
                    return
                case _:
                    self._client.opened()

    async def _answer(self) -> None:
        while True:
            program = await self._programs.get()
            self._outbox.put_nowait(await self._client.answer(program))

    async def _write(self, call: Any) -> None:
        """Send answers at once, and between them pings and the newest stats."""
        began = time.monotonic()
        ping_at, stats_at = began + PING_SECONDS, began + self._client.stats_seconds
        while True:
            now = time.monotonic()
            if now - self._heard_at > SILENCE_SECONDS:
                raise TimeoutError(f"nothing heard for {SILENCE_SECONDS:.0f} s")
            try:
                message = await asyncio.wait_for(
                    self._outbox.get(), max(0.0, min(ping_at, stats_at) - now)
                )
            except TimeoutError:
                pass
            else:
                await call.write(message)
                if message.HasField("bye"):
                    await call.done_writing()
                    return
            now = time.monotonic()
            if now >= ping_at:
                ping_at = now + PING_SECONDS
                await call.write(pb.FromPicker(ping=pb.Ping()))
            if now >= stats_at:
                stats_at = now + self._client.stats_seconds
                await self._report(call)

    async def _report(self, call: Any) -> None:
        if not self._client.connected:
            return
        try:
            report = await self._client.report()
        except TimeoutError:  # the data plane is busy; the next report counts
            _log.warning("no report: the data plane did not answer in time")
            return
        await call.write(report)
