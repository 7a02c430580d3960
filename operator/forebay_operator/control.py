"""The control gRPC server: endpoint pickers dial, get the program of their pool and answer.

A version is (epoch, revision); pickers refuse what is not newer, so of two leaders only the younger
one counts. Everything here runs on one asyncio loop. When a picker is sent what is session.py's
business, how a pool stands rollout.py's, who may connect trust.py's.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc

from forebay_control.v1 import control_pb2 as pb
from forebay_control.v1 import control_pb2_grpc as rpc
from forebay_operator import metrics
from forebay_operator.rollout import SILENCE_SECONDS, Rollout
from forebay_operator.session import (
    MAX_NAME,
    MAX_SENDS,
    Answer,
    Session,
    UnansweredError,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from forebay_operator.conditions import Picker

PROTOCOL = 1
PING_SECONDS = 10.0
HELLO_SECONDS = 10.0
MAX_MESSAGE_BYTES = 4 << 20
MAX_RECEIVED_BYTES = 1 << 20
MAX_STREAMS = 4000
MAX_STREAMS_PER_POD = 2
CLOSE_SECONDS = 3.0
MAX_EPOCH_JUMP = 1000

_log = logging.getLogger(__name__)


class RefusedError(Exception):
    """A picker that may not connect; `reason` is a metric label, the text is for its log."""

    def __init__(self, code: grpc.StatusCode, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason


@dataclass(slots=True, eq=False)
class _Stream:
    """One stream."""

    pool: str
    pod_uid: str
    pod_name: str
    session: Session
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    outbox: list[pb.FromOperator] = field(default_factory=list)
    ended: bool = False


class ControlServer(rpc.ControlServicer):
    """Serves the pickers of all pools.

    Args:
        authorize: says which pod a Hello comes from (its uid), or raises RefusedError.
        changed: called with a pool whose pickers have changed in a way that statuses show.
        higher_epoch: called with an epoch that a picker has seen and that is above ours.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        authorize: Callable[[pb.Hello, Mapping[str, Any], Mapping[str, Any]], Awaitable[str]],
        changed: Callable[[str], None],
        higher_epoch: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._authorize = authorize
        self._changed = changed
        self._higher_epoch = higher_epoch
        self._clock = clock
        self._epoch: int | None = None
        self._quiet = False
        self._revision = 0
        self._hint = ""
        self._leading_since = clock()
        self._rollouts: defaultdict[str, Rollout] = defaultdict(Rollout)
        self._streams: dict[str, list[_Stream]] = {}
        self._open = 0
        self._server: grpc.aio.Server | None = None
        self._closing = False

    # --- what the rest of the operator says

    def lead(self, epoch: int | None, *, quiet: bool = False, hint: str = "") -> None:
        """Take, keep or give up leadership.

        Args:
            epoch: of our leadership; None sends every picker to another replica.
            quiet: leadership is in doubt: keep the streams but program nobody.
            hint: who leads instead, for people.
        """
        if epoch != self._epoch:
            if self._epoch is None:
                self._leading_since = self._clock()
            for stream in self._all():
                stream.session.led_anew()
        self._epoch, self._quiet, self._hint = epoch, quiet, hint
        for stream in self._all():
            if epoch is None:
                self._end(stream, pb.FromOperator(not_leader=pb.NotLeader(hint=hint)))
            stream.wake.set()

    def program(self, pool: str, snapshot: pb.Snapshot) -> bool:
        """Say what the pickers of a pool should run; return whether that is news."""
        # One counter for all pools: it also grows over a pool that is deleted and made again.
        if not self._rollouts[pool].want(snapshot, self._revision + 1):
            return False
        self._revision += 1
        for stream in self._streams.get(pool, ()):
            stream.session.wanted_anew()
            stream.wake.set()
        return True

    def forget(self, pool: str) -> None:
        """Stop programming a pool that is gone; its pickers keep what they have."""
        self._rollouts[pool].give_up()

    def connected(self, pool: str) -> dict[str, str]:
        """Return the pickers that have a stream: name by pod uid."""
        return {stream.pod_uid: stream.pod_name for stream in self._streams.get(pool, ())}

    def pickers(self, pool: str, expected: Mapping[str, str]) -> list[Picker]:
        """Say how the expected pickers (name by pod uid) of a pool stand."""
        streams = self._streams.get(pool, ())
        sessions = {stream.pod_uid: stream.session for stream in streams}
        rollout = self._rollouts[pool]
        rollout.retain(expected.keys() | sessions.keys())
        return rollout.pickers(expected, sessions, self._leading_since, self._clock())

    # --- the server

    async def serve(self, address: str, credentials: grpc.ServerCredentials | None) -> int:
        """Listen and return the port.

        Raises:
            RuntimeError: the address cannot be bound.
        """
        server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", MAX_RECEIVED_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_concurrent_streams", 8),
                ("grpc.max_metadata_size", 32 << 10),
                ("grpc.keepalive_time_ms", 20_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
                ("grpc.max_connection_age_ms", 1_800_000),
                ("grpc.max_connection_age_grace_ms", 5_000),
            ],
        )
        rpc.add_ControlServicer_to_server(self, server)  # type: ignore[no-untyped-call]  # generated
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
        await server.start()
        self._server = server
        return int(port)

    async def stop(self) -> None:
        """Ask every picker to dial again soon, at moments of their own, and close."""
        self._closing = True
        for stream in self._all():
            after = random.uniform(0, CLOSE_SECONDS)  # noqa: S311  # spreads load, hides nothing
            self._end(stream, pb.FromOperator(close=pb.Close(retry_after_seconds=after)))
        if self._server is not None:
            await self._server.stop(0.5)

    async def Connect(self, _: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:  # noqa: N802  # the name in control.proto
        """Serve one stream."""
        self._open += 1
        stream: _Stream | None = None
        try:
            hello = await self._hello(context)
            if self._epoch is None or self._closing:
                metrics.REFUSALS.labels("not_leader").inc()
                await context.write(pb.FromOperator(not_leader=pb.NotLeader(hint=self._hint)))
                return
            stream = await self._admit(hello, context)
            reading = asyncio.create_task(self._read(stream, context))
            try:
                await self._write(stream, context)
            finally:
                reading.cancel()
                with suppress(asyncio.CancelledError):
                    await reading
        except RefusedError as error:
            metrics.REFUSALS.labels(error.reason).inc()
            _log.warning("control stream refused: %s", error, extra={"reason": error.reason})
            await context.abort(error.code, str(error))
        finally:
            self._open -= 1
            if stream is not None:
                self._remove(stream)

    async def _hello(self, context: grpc.aio.ServicerContext[Any, Any]) -> pb.Hello:
        if self._open > MAX_STREAMS:
            raise RefusedError(
                grpc.StatusCode.RESOURCE_EXHAUSTED, "streams", "too many control streams"
            )
        try:
            first = await asyncio.wait_for(context.read(), HELLO_SECONDS)
        except TimeoutError:
            raise RefusedError(
                grpc.StatusCode.DEADLINE_EXCEEDED, "silent", "no Hello came in time"
            ) from None
        if not isinstance(first, pb.FromPicker) or first.WhichOneof("message") != "hello":
            raise RefusedError(
                grpc.StatusCode.INVALID_ARGUMENT, "protocol", "the first message must be Hello"
            )
        hello = first.hello
        if hello.protocol != PROTOCOL:
            raise RefusedError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "protocol",
                f"protocol {hello.protocol} is not spoken here, only {PROTOCOL}: "
                "run endpoint pickers and operator of neighbouring releases",
            )
        for name in ("pool", "pod_namespace", "pod_name", "pod_uid", "boot_id", "build"):
            if len(getattr(hello, name)) > MAX_NAME:
                raise RefusedError(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    "protocol",
                    f"hello.{name} has more than {MAX_NAME} characters",
                )
        return hello

    async def _admit(self, hello: pb.Hello, context: grpc.aio.ServicerContext[Any, Any]) -> _Stream:
        """Check who it is and register it; from here on it is told of every change."""
        sent = dict(context.invocation_metadata() or ())
        uid = await self._authorize(hello, sent, context.auth_context())
        now = self._clock()
        applied = hello.applied if hello.HasField("applied") else None
        stream = _Stream(hello.pool, uid, hello.pod_name, Session(now, applied))
        streams = self._streams.setdefault(hello.pool, [])
        mine = [other for other in streams if other.pod_uid == uid]
        for other in mine[: max(0, len(mine) + 1 - MAX_STREAMS_PER_POD)]:
            metrics.REFUSALS.labels("replaced").inc()
            self._end(other, None)
        streams.append(stream)
        metrics.STREAMS.labels(hello.pool).set(len(streams))
        if applied is not None:
            self._rollouts[hello.pool].runs(uid, applied.sha256, now)
        seen = max(hello.highest_epoch, applied.version.epoch if applied else 0)
        self._see_epoch(seen)
        self._changed(hello.pool)
        _log.info("endpoint picker connected", extra={"pool": hello.pool, "pod": hello.pod_name})
        return stream

    def _see_epoch(self, epoch: int) -> None:
        """Heal an epoch that fell behind what pickers have seen, within reason.

        A picker that claims a huge epoch must not be able to use the counter up.
        """
        if self._epoch is None or epoch <= self._epoch:
            return
        if epoch - self._epoch > MAX_EPOCH_JUMP:
            metrics.REFUSALS.labels("epoch").inc()
            _log.error("an endpoint picker claims an absurd epoch", extra={"epoch": epoch})
            return
        self._higher_epoch(epoch)

    def _remove(self, stream: _Stream) -> None:
        stream.ended = True
        streams = self._streams.get(stream.pool, [])
        if stream in streams:
            streams.remove(stream)
        metrics.STREAMS.labels(stream.pool).set(len(streams))
        if not streams:
            self._streams.pop(stream.pool, None)
            metrics.STREAMS.remove(stream.pool)
        self._rollouts[stream.pool].left(stream.pod_uid, stream.session.heard_at)
        self._changed(stream.pool)

    def _all(self) -> list[_Stream]:
        return [stream for streams in self._streams.values() for stream in streams]

    def _end(self, stream: _Stream, last: pb.FromOperator | None) -> None:
        if last is not None and not stream.ended:
            stream.outbox.append(last)
        stream.ended = True
        stream.wake.set()

    # --- writing

    async def _write(self, stream: _Stream, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Send what there is to send until the stream ends."""
        ping_at = self._clock() + PING_SECONDS
        while True:
            now = self._clock()
            self._offer(stream, now)
            if now >= ping_at:
                stream.outbox.append(pb.FromOperator(ping=pb.Ping()))
                ping_at = now + PING_SECONDS
            while stream.outbox:
                await context.write(stream.outbox.pop(0))
            if stream.ended:
                return
            if now - stream.session.heard_at > SILENCE_SECONDS:
                raise RefusedError(
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                    "silent",
                    f"nothing heard from {stream.pod_name} for {SILENCE_SECONDS:.0f} s",
                )
            await self._sleep(stream, ping_at)

    async def _sleep(self, stream: _Stream, ping_at: float) -> None:
        session = stream.session
        now = self._clock()
        until = min(ping_at, session.heard_at + SILENCE_SECONDS + 0.1, session.offer_at(now))
        stream.wake.clear()
        if stream.outbox or stream.ended:
            return
        with suppress(TimeoutError):
            await asyncio.wait_for(stream.wake.wait(), max(0.01, until - now))

    def _offer(self, stream: _Stream, now: float) -> None:
        """Put the program into the outbox if this picker should get it now."""
        desired = self._rollouts[stream.pool].desired
        if self._epoch is None or self._quiet or desired is None or stream.ended:
            return
        try:
            program = stream.session.offer(desired, self._epoch, now)
        except UnansweredError:
            raise RefusedError(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                "unacknowledged",
                f"{stream.pod_name} has not answered a program sent {MAX_SENDS} times",
            ) from None
        if program is not None:
            stream.outbox.append(pb.FromOperator(program=program))
            metrics.PROGRAMS.inc()

    # --- reading

    async def _read(self, stream: _Stream, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Take what the picker says until it stops."""
        try:
            while True:
                message = await context.read()
                if not isinstance(message, pb.FromPicker):
                    break
                now = self._clock()
                if not stream.session.heard(now):
                    metrics.REFUSALS.labels("flood").inc()
                    _log.warning("endpoint picker floods", extra={"pod": stream.pod_name})
                    break
                self._take(stream, message, now)
                if stream.ended:
                    return
        except (grpc.RpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
            _log.debug("control stream broke", extra={"pod": stream.pod_name})
        except Exception:  # whatever a picker sends must end its own stream only
            _log.exception("control stream failed", extra={"pod": stream.pod_name})
        self._end(stream, None)

    def _take(self, stream: _Stream, message: pb.FromPicker, now: float) -> None:
        match message.WhichOneof("message"):
            case "ack":
                self._on_ack(stream, message.ack, now)
            case "nack":
                self._on_nack(stream, message.nack, now)
            case "stats":
                stats = stream.session.on_stats(message.stats, now)
                if stats is not None:
                    self._rollouts[stream.pool].reported(stream.pod_uid, stats, now)
            case "bye":
                _log.info("endpoint picker leaves", extra={"pod": stream.pod_name})
                self._end(stream, None)
            case _:
                return

    def _on_ack(self, stream: _Stream, ack: pb.Ack, now: float) -> None:
        in_force = stream.session.on_ack(ack)
        if in_force is None:
            metrics.ANSWERS.labels("unknown").inc()
            return
        metrics.ANSWERS.labels("ack").inc()
        self._rollouts[stream.pool].acknowledged(stream.pod_uid, in_force, now)
        stream.wake.set()
        self._changed(stream.pool)

    def _on_nack(self, stream: _Stream, nack: pb.Nack, now: float) -> None:
        answer = stream.session.on_nack(nack, now)
        if answer is Answer.UNKNOWN:
            metrics.ANSWERS.labels("unknown").inc()
            return
        metrics.ANSWERS.labels("nack").inc()
        stream.wake.set()
        if answer is Answer.STALE:
            self._see_epoch(nack.highest_epoch)
            return
        _log.warning(
            "endpoint picker refuses its program",
            extra={"pod": stream.pod_name, "pool": stream.pool, "error": stream.session.error},
        )
        self._changed(stream.pool)


def join(host: str, port: int) -> str:
    """Write host:port, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
