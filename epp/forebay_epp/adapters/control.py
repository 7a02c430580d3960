"""The EPP's end of the control channel: dial, identify, apply programs, report.

Losing the operator does not affect serving. Programs are judged in codec/control.py,
put into force by app.py and kept by adapters/lastgood.py.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from forebay_control import features
from forebay_control.channel import PROTOCOL, SILENCE_SECONDS, host_port
from forebay_control.v1 import control_pb2 as pb
from forebay_control.v1 import control_pb2_grpc as rpc
from forebay_epp.codec.control import Accepted, Code, Nacked

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from forebay_epp.codec.control import Programs

PING_SECONDS = 10.0
MIN_BACKOFF_SECONDS = 0.2
MAX_BACKOFF_SECONDS = 10.0
MAX_RETRY_AFTER_SECONDS = 60.0
CONNECT_MILLISECONDS = 5_000
GOODBYE_SECONDS = 1.0
MAX_MESSAGE_BYTES = 4 << 20

_log = logging.getLogger("forebay_epp")


@dataclass(frozen=True, slots=True)
class Dial:
    """Where the operator is, and how it and we prove who we are.

    Attributes:
        host: name or address; a name may have several addresses, one per replica.
        server_name: the DNS name its certificate has to carry.
        ca_path: PEM bundle that has to have signed it; None dials in plaintext.
        token_path: a service account token to show.
        cert_path: folder with tls.crt and tls.key to show.
    """

    host: str
    port: int
    server_name: str
    ca_path: Path | None
    token_path: Path | None
    cert_path: Path | None


@dataclass(frozen=True, slots=True)
class Identity:
    """This EPP's identity."""

    pod_namespace: str
    pod_name: str
    pod_uid: str
    boot_id: str
    build: str


class NotReadyError(Exception):
    """Something that dialling needs is not there yet; the text says what."""


class ControlClient:
    """Keeps a stream to whichever replica of the operator leads.

    Args:
        dial: where and how.
        identity: who we are.
        programs: judges programs; holds what is in force.
        apply: puts a program into force, and returns when it is.
        stats: what to report.
        stats_seconds: how often.
    """

    def __init__(
        self,
        dial: Dial,
        identity: Identity,
        programs: Programs,
        apply: Callable[[Accepted], Awaitable[None]],
        stats: Callable[[], Awaitable[pb.Stats]],
        stats_seconds: float = 5.0,
    ) -> None:
        self._dial = dial
        self._identity = identity
        self._programs = programs
        self._apply = apply
        self._stats = stats
        self._stats_seconds = stats_seconds
        self._said = ""
        self._refused: Nacked | None = None
        self._judging = asyncio.Lock()
        self._tasks: set[asyncio.Task[pb.FromPicker]] = set()
        self._stream: _Stream | None = None
        self._leaving = False
        self._left = asyncio.Event()
        self.connected = False
        self.disconnected_since = time.monotonic()
        self.answers: dict[str, int] = {"ack": 0, "nack": 0}

    async def run(self) -> None:
        """Dial until asked to leave."""
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
                backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)
        self._left.set()

    async def leave(self, timeout_seconds: float) -> None:
        """Say goodbye: this EPP will not come back."""
        self._leaving = True
        if self._stream is not None:
            self._stream.leave()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._left.wait(), timeout_seconds)

    # --- dialling

    async def _addresses(self) -> list[str]:
        """Return every replica's ip:port in random order."""
        try:
            found = await asyncio.get_running_loop().getaddrinfo(
                self._dial.host, self._dial.port, type=socket.SOCK_STREAM
            )
        except OSError as error:
            self._say(f"--control-address: {self._dial.host}: {error.strerror or error}")
            return []
        addresses = list({host_port(*entry[4][:2]) for entry in found})
        random.shuffle(addresses)
        return addresses

    def _channel(self, address: str) -> grpc.aio.Channel:
        """Open a channel with what the files hold now.

        Raises:
            NotReadyError: a file is not there (yet).
        """
        options: list[tuple[str, Any]] = [
            ("grpc.enable_http_proxy", 0),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.max_pings_without_data", 0),
            # The first one bounds connecting, which 20 s by default would outlast a short outage.
            ("grpc.min_reconnect_backoff_ms", CONNECT_MILLISECONDS),
            ("grpc.initial_reconnect_backoff_ms", CONNECT_MILLISECONDS),
        ]
        if self._dial.ca_path is None:
            return grpc.aio.insecure_channel(address, options)
        key = certificate = None
        if self._dial.cert_path is not None:
            key = _read("--control-cert-path", self._dial.cert_path / "tls.key")
            certificate = _read("--control-cert-path", self._dial.cert_path / "tls.crt")
        credentials = grpc.ssl_channel_credentials(
            _read("--control-ca-path", self._dial.ca_path), key, certificate
        )
        options.append(("grpc.ssl_target_name_override", self._dial.server_name))
        return grpc.aio.secure_channel(address, credentials, options)

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        path = self._dial.token_path
        if path is None:
            return ()
        token = _read("--control-token-path", path).decode(errors="replace").strip()
        return (("authorization", f"Bearer {token}"),)

    async def _once(self, address: str) -> tuple[bool, float | None]:
        """Serve one stream; return whether it was one, and how long the operator asks to wait.

        A failure costs only this stream: requests are still served.
        """
        stream = _Stream(self)
        try:
            channel = self._channel(address)
            try:
                call = rpc.ControlStub(channel).Connect(metadata=self._metadata())  # type: ignore[no-untyped-call]  # generated
                self._stream = stream
                await stream.serve(call)
            finally:
                self._stream = None
                await channel.close(None)
        except NotReadyError as error:
            self._say(str(error))
        except grpc.aio.AioRpcError as error:
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


class _Stream:
    """One stream: a reader, one that answers programs, and a writer that also reports."""

    def __init__(self, client: ControlClient) -> None:
        self._client = client
        self._heard_at = time.monotonic()
        self._programs: asyncio.Queue[pb.Program] = asyncio.Queue()
        self._outbox: asyncio.Queue[pb.FromPicker] = asyncio.Queue()
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
        tasks = (reading, answering, writing)
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


def _read(flag: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise NotReadyError(f"{flag}: {path}: {error.strerror}") from error
