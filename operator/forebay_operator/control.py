"""The control gRPC server: endpoint pickers dial, get the program of their pool and answer.

What is wanted is compared with what a picker has *acknowledged*, never with what was sent: a
program that got lost or was refused is not taken for running (NGINX Gateway Fabric issue 5330). A
version is (epoch, revision); pickers refuse what is not newer, so of two leaders only the younger
one counts. Everything here runs on one asyncio loop. Who may connect is trust.py's business, what a
program holds planning.py's.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import random
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc

from forebay_control.v1 import control_pb2 as pb
from forebay_control.v1 import control_pb2_grpc as rpc
from forebay_operator import metrics, wording
from forebay_operator.conditions import Picker, PickerState

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

PROTOCOL = 1
PING_SECONDS = 10.0
SILENCE_SECONDS = 30.0
HELLO_SECONDS = 10.0
ACK_SECONDS = 10.0
MAX_SENDS = 3
RETRY_SECONDS = 5.0
MAX_RETRY_SECONDS = 300.0
STATS_SECONDS = 1.0
MAX_MESSAGE_BYTES = 4 << 20
MAX_RECEIVED_BYTES = 1 << 20
MAX_STREAMS = 4000
MAX_STREAMS_PER_POD = 2
MAX_MESSAGES_PER_SECOND = 50
MAX_BURST = 250
MAX_NAME = 253
MAX_STATS_BANDS = 64
MAX_ERROR = 200
REMEMBERED_PROGRAMS = 16
CLOSE_SECONDS = 3.0
MAX_EPOCH_JUMP = 1000
_STALE_EPOCH = "StaleEpoch"

_log = logging.getLogger(__name__)


class RefusedError(Exception):
    """A picker that may not connect; `reason` is a metric label, the text is for its log."""

    def __init__(self, code: grpc.StatusCode, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason


@dataclass(slots=True)
class _Desired:
    """What the pickers of a pool should run."""

    snapshot: bytes
    sha256: bytes
    revision: int


@dataclass(slots=True)
class _Record:
    """What is known of a picker, beyond the life of its stream."""

    heard_at: float
    sha256: bytes = b""
    generations: Mapping[str, int] = field(default_factory=dict)
    stats: pb.Stats | None = None


@dataclass(slots=True, eq=False)
class _Session:
    """One stream."""

    pool: str
    pod_uid: str
    pod_name: str
    heard_at: float
    acked: tuple[int, bytes] | None  # epoch and hash
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    outbox: list[pb.FromOperator] = field(default_factory=list)
    nonce: int = 0
    in_flight: pb.Program | None = None
    in_flight_generations: Mapping[str, int] = field(default_factory=dict)
    sent_at: float = 0.0
    sends: int = 0
    nacked: bytes = b""
    error: str = ""
    retry_at: float = 0.0
    retry_seconds: float = RETRY_SECONDS
    stats_at: float = -math.inf
    tokens: float = MAX_BURST
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
        self._desired: dict[str, _Desired] = {}
        self._programs: dict[str, OrderedDict[bytes, Mapping[str, int]]] = {}
        self._sessions: dict[str, list[_Session]] = {}
        self._records: dict[tuple[str, str], _Record] = {}
        self._streams = 0
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
            for session in self._all():
                if session.error.startswith(_STALE_EPOCH):
                    session.nacked, session.error = b"", ""
        self._epoch, self._quiet, self._hint = epoch, quiet, hint
        for session in self._all():
            if epoch is None:
                self._end(session, pb.FromOperator(not_leader=pb.NotLeader(hint=hint)))
            session.wake.set()

    def program(self, pool: str, snapshot: pb.Snapshot) -> bool:
        """Say what the pickers of a pool should run; return whether that is news."""
        data = snapshot.SerializeToString(deterministic=True)
        sha256 = hashlib.sha256(data).digest()
        before = self._desired.get(pool)
        if before is not None and before.sha256 == sha256:
            return False
        # One counter for all pools: it also grows over a pool that is deleted and made again.
        self._revision += 1
        self._desired[pool] = _Desired(data, sha256, self._revision)
        known = self._programs.setdefault(pool, OrderedDict())
        known[sha256] = {source.uid: source.generation for source in snapshot.sources}
        while len(known) > REMEMBERED_PROGRAMS:
            known.popitem(last=False)
        for session in self._sessions.get(pool, ()):
            session.retry_seconds = RETRY_SECONDS
            session.wake.set()
        return True

    def forget(self, pool: str) -> None:
        """Stop programming a pool that is gone; its pickers keep what they have."""
        self._desired.pop(pool, None)
        self._programs.pop(pool, None)

    def connected(self, pool: str) -> dict[str, str]:
        """Return the pickers that have a stream: name by pod uid."""
        return {session.pod_uid: session.pod_name for session in self._sessions.get(pool, ())}

    def pickers(self, pool: str, expected: Mapping[str, str]) -> list[Picker]:
        """Say how the expected pickers (name by pod uid) of a pool stand."""
        now = self._clock()
        sessions = {session.pod_uid: session for session in self._sessions.get(pool, ())}
        for key in [key for key in self._records if key[0] == pool and key[1] not in expected]:
            if key[1] not in sessions:
                del self._records[key]
        found = []
        for uid, name in sorted(expected.items(), key=lambda item: item[1]):
            record = self._records.setdefault((pool, uid), _Record(heard_at=now))
            found.append(self._picker(name, sessions.get(uid), record, pool, now))
        return found

    def _picker(
        self, name: str, session: _Session | None, record: _Record, pool: str, now: float
    ) -> Picker:
        desired = self._desired.get(pool)
        wanted = desired.sha256 if desired else b""
        heard_at = session.heard_at if session else max(record.heard_at, self._leading_since)
        if session is not None and session.nacked == wanted and wanted:
            state = PickerState.REJECTED
        elif now - heard_at > SILENCE_SECONDS:
            state = PickerState.STALE
        elif wanted and record.sha256 == wanted:
            state = PickerState.PROGRAMMED
        else:
            state = PickerState.PENDING
        return Picker(
            name=name,
            state=state,
            connected=session is not None,
            generations=record.generations,
            error=session.error if session else "",
            stats=record.stats,
        )

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
        for session in self._all():
            after = random.uniform(0, CLOSE_SECONDS)  # noqa: S311  # spreads load, hides nothing
            self._end(session, pb.FromOperator(close=pb.Close(retry_after_seconds=after)))
        if self._server is not None:
            await self._server.stop(0.5)

    async def Connect(self, _: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:  # noqa: N802  # the name in control.proto
        """Serve one stream."""
        self._streams += 1
        session: _Session | None = None
        try:
            hello = await self._hello(context)
            if self._epoch is None or self._closing:
                metrics.REFUSALS.labels("not_leader").inc()
                await context.write(pb.FromOperator(not_leader=pb.NotLeader(hint=self._hint)))
                return
            session = await self._admit(hello, context)
            reading = asyncio.create_task(self._read(session, context))
            try:
                await self._write(session, context)
            finally:
                reading.cancel()
                with suppress(asyncio.CancelledError):
                    await reading
        except RefusedError as error:
            metrics.REFUSALS.labels(error.reason).inc()
            _log.warning("control stream refused: %s", error, extra={"reason": error.reason})
            await context.abort(error.code, str(error))
        finally:
            self._streams -= 1
            if session is not None:
                self._remove(session)

    async def _hello(self, context: grpc.aio.ServicerContext[Any, Any]) -> pb.Hello:
        if self._streams > MAX_STREAMS:
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

    async def _admit(
        self, hello: pb.Hello, context: grpc.aio.ServicerContext[Any, Any]
    ) -> _Session:
        """Check who it is and register it; from here on it is told of every change."""
        sent = dict(context.invocation_metadata() or ())
        uid = await self._authorize(hello, sent, context.auth_context())
        now = self._clock()
        applied = hello.applied if hello.HasField("applied") else None
        session = _Session(
            pool=hello.pool,
            pod_uid=uid,
            pod_name=hello.pod_name,
            heard_at=now,
            acked=(applied.version.epoch, applied.sha256) if applied else None,
        )
        sessions = self._sessions.setdefault(hello.pool, [])
        mine = [other for other in sessions if other.pod_uid == uid]
        for other in mine[: max(0, len(mine) + 1 - MAX_STREAMS_PER_POD)]:
            metrics.REFUSALS.labels("replaced").inc()
            self._end(other, None)
        sessions.append(session)
        metrics.STREAMS.labels(hello.pool).set(len(sessions))
        if applied is not None:
            record = self._records.setdefault((hello.pool, uid), _Record(now))
            record.heard_at = now
            record.sha256 = applied.sha256
            record.generations = self._generations(hello.pool, applied.sha256)
        seen = max(hello.highest_epoch, applied.version.epoch if applied else 0)
        self._see_epoch(seen)
        self._changed(hello.pool)
        _log.info("endpoint picker connected", extra={"pool": hello.pool, "pod": hello.pod_name})
        return session

    def _generations(self, pool: str, sha256: bytes) -> Mapping[str, int]:
        """Return what a program was made from, by uid; nothing for one of another leader."""
        programs = self._programs.get(pool)
        return programs.get(sha256, {}) if programs else {}

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

    def _remove(self, session: _Session) -> None:
        session.ended = True
        sessions = self._sessions.get(session.pool, [])
        if session in sessions:
            sessions.remove(session)
        metrics.STREAMS.labels(session.pool).set(len(sessions))
        if not sessions:
            self._sessions.pop(session.pool, None)
            metrics.STREAMS.remove(session.pool)
        record = self._records.get((session.pool, session.pod_uid))
        if record is not None:
            record.heard_at = session.heard_at
        self._changed(session.pool)

    def _all(self) -> list[_Session]:
        return [session for sessions in self._sessions.values() for session in sessions]

    def _end(self, session: _Session, last: pb.FromOperator | None) -> None:
        if last is not None and not session.ended:
            session.outbox.append(last)
        session.ended = True
        session.wake.set()

    # --- writing

    async def _write(self, session: _Session, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Send what there is to send until the stream ends."""
        ping_at = self._clock() + PING_SECONDS
        while True:
            now = self._clock()
            self._offer(session, now)
            if now >= ping_at:
                session.outbox.append(pb.FromOperator(ping=pb.Ping()))
                ping_at = now + PING_SECONDS
            while session.outbox:
                await context.write(session.outbox.pop(0))
            if session.ended:
                return
            if now - session.heard_at > SILENCE_SECONDS:
                raise RefusedError(
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                    "silent",
                    f"nothing heard from {session.pod_name} for {SILENCE_SECONDS:.0f} s",
                )
            await self._sleep(session, ping_at)

    async def _sleep(self, session: _Session, ping_at: float) -> None:
        now = self._clock()
        until = min(ping_at, session.heard_at + SILENCE_SECONDS + 0.1)
        if session.in_flight is not None:
            until = min(until, session.sent_at + ACK_SECONDS)
        elif session.nacked and session.retry_at > now:
            until = min(until, session.retry_at)
        session.wake.clear()
        if session.outbox or session.ended:
            return
        with suppress(TimeoutError):
            await asyncio.wait_for(session.wake.wait(), max(0.01, until - now))

    def _offer(self, session: _Session, now: float) -> None:
        """Put the program into the outbox if this picker should get it now."""
        desired = self._desired.get(session.pool)
        if self._epoch is None or self._quiet or desired is None or session.ended:
            return
        if session.in_flight is not None:
            if now - session.sent_at < ACK_SECONDS:
                return
            if session.sends >= MAX_SENDS:
                raise RefusedError(
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                    "unacknowledged",
                    f"{session.pod_name} has not answered a program sent {MAX_SENDS} times",
                )
            session.sends += 1
        else:
            if session.acked == (self._epoch, desired.sha256):
                return
            if session.nacked == desired.sha256 and now < session.retry_at:
                return
            session.nonce += 1
            session.sends = 1
            session.in_flight = pb.Program(
                nonce=session.nonce,
                version=pb.Version(epoch=self._epoch, revision=desired.revision),
                sha256=desired.sha256,
                snapshot=desired.snapshot,
            )
            session.in_flight_generations = self._generations(session.pool, desired.sha256)
        session.sent_at = now
        session.outbox.append(pb.FromOperator(program=session.in_flight))
        metrics.PROGRAMS.inc()

    # --- reading

    async def _read(self, session: _Session, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Take what the picker says until it stops."""
        refilled_at = self._clock()
        try:
            while True:
                message = await context.read()
                if not isinstance(message, pb.FromPicker):
                    break
                now = self._clock()
                session.heard_at = now
                session.tokens = min(
                    MAX_BURST, session.tokens + (now - refilled_at) * MAX_MESSAGES_PER_SECOND
                )
                refilled_at = now
                session.tokens -= 1
                if session.tokens < 0:
                    metrics.REFUSALS.labels("flood").inc()
                    _log.warning("endpoint picker floods", extra={"pod": session.pod_name})
                    break
                self._take(session, message, now)
                if session.ended:
                    return
        except (grpc.RpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
            _log.debug("control stream broke", extra={"pod": session.pod_name})
        except Exception:  # whatever a picker sends must end its own stream only
            _log.exception("control stream failed", extra={"pod": session.pod_name})
        self._end(session, None)

    def _take(self, session: _Session, message: pb.FromPicker, now: float) -> None:
        match message.WhichOneof("message"):
            case "ack":
                self._on_ack(session, message.ack)
            case "nack":
                self._on_nack(session, message.nack, now)
            case "stats":
                if now - session.stats_at >= STATS_SECONDS:
                    session.stats_at = now
                    self._on_stats(session, message.stats)
            case "bye":
                _log.info("endpoint picker leaves", extra={"pod": session.pod_name})
                self._end(session, None)
            case _:
                return

    def _on_ack(self, session: _Session, ack: pb.Ack) -> None:
        program = session.in_flight
        if program is None or ack.nonce != program.nonce or ack.sha256 != program.sha256:
            metrics.ANSWERS.labels("unknown").inc()
            return
        metrics.ANSWERS.labels("ack").inc()
        session.in_flight = None
        session.acked = (program.version.epoch, program.sha256)
        session.nacked, session.error = b"", ""
        record = self._records.setdefault(
            (session.pool, session.pod_uid), _Record(session.heard_at)
        )
        record.sha256 = program.sha256
        record.generations = session.in_flight_generations
        session.wake.set()
        self._changed(session.pool)

    def _on_nack(self, session: _Session, nack: pb.Nack, now: float) -> None:
        program = session.in_flight
        if program is None or nack.nonce != program.nonce:
            metrics.ANSWERS.labels("unknown").inc()
            return
        metrics.ANSWERS.labels("nack").inc()
        session.in_flight = None
        if nack.code == _STALE_EPOCH:
            # Not the program's fault: somebody leads with a higher epoch, or we must heal ours.
            session.retry_at, session.nacked = now + 1.0, program.sha256
            session.error = f"{_STALE_EPOCH}: the endpoint picker has seen a newer leader"
            self._see_epoch(nack.highest_epoch)
            session.wake.set()
            return
        if session.nacked != program.sha256:
            session.retry_seconds = RETRY_SECONDS
        session.nacked = program.sha256
        session.retry_at = now + session.retry_seconds
        session.retry_seconds = min(2 * session.retry_seconds, MAX_RETRY_SECONDS)
        problems = "; ".join(
            f"{error.path[:MAX_ERROR]}: {error.message[:MAX_ERROR]}" for error in nack.errors[:5]
        )
        session.error = wording.printable(f"{nack.code[:32] or 'Internal'}: {problems}")
        _log.warning(
            "endpoint picker refuses its program",
            extra={"pod": session.pod_name, "pool": session.pool, "error": session.error},
        )
        session.wake.set()
        self._changed(session.pool)

    def _on_stats(self, session: _Session, stats: pb.Stats) -> None:
        del stats.bands[MAX_STATS_BANDS:]
        if not math.isfinite(stats.saturation):
            stats.saturation = 0.0
        for band in stats.bands:
            band.band = band.band[:MAX_NAME]
            if not 0 <= band.oldest_seconds < 1e9:
                band.oldest_seconds = 0.0
        record = self._records.setdefault(
            (session.pool, session.pod_uid), _Record(session.heard_at)
        )
        record.stats = stats


def join(host: str, port: int) -> str:
    """Write host:port, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
