"""The control gRPC server: EPPs dial, get the program of their pool and answer.

A version is (epoch, revision); EPPs refuse what is not newer, so of two leaders only the newer
counts. Everything here runs on one asyncio loop. What an EPP is sent and when belongs
in session.py, the state of a pool in rollout.py, access in admission.py and trust.py.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections import defaultdict
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import grpc

from forebay_control import features
from forebay_control.v1 import control_pb2 as pb
from forebay_control.v1 import control_pb2_grpc as rpc
from forebay_operator import metrics
from forebay_operator.channel.admission import Admission, RefusedError
from forebay_operator.channel.rollout import Rollout
from forebay_operator.channel.session import (
    MAX_SENDS,
    Answer,
    Session,
    UnansweredError,
)
from forebay_operator.channel.sharing import Sharing
from forebay_operator.channel.stream import WRITE_SECONDS, Stream
from forebay_operator.resources import messages

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from forebay_operator.channel.admission import Authorize
    from forebay_operator.channel.session import Desired
    from forebay_operator.status.observed import EPP

MAX_MESSAGE_BYTES = 4 << 20
MAX_RECEIVED_BYTES = 1 << 20
MAX_CONNECTIONS = 500  # 0.1 MB each with TLS, before the peer is known
MAX_STREAMS = 1000
MAX_STREAMS_PER_POD = 2
CLOSE_SECONDS = 3.0
REDIAL_SECONDS = 0.5
LOG_SECONDS = 1.0
MAX_BOOT_ID = 64

_log = logging.getLogger(__name__)


class ControlServer(rpc.ControlServicer):
    """Serves the EPPs of all pools.

    Args:
        authorize: says which pod a Hello comes from (its uid), or raises RefusedError.
        changed: called with a pool whose EPPs have changed in a way that statuses show.
        higher_epoch: called with an epoch that an EPP claims to have seen, with the uid and the
            namespace of its pod; ours has to be above it.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        authorize: Authorize,
        changed: Callable[[str], None],
        higher_epoch: Callable[[int, str, str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._admission = Admission(authorize)
        self._changed = changed
        self._higher_epoch = higher_epoch
        self._clock = clock
        self._epoch: int | None = None
        self._quiet = False
        self._revision = 0
        self._hint = ""
        self._leading_since = clock()
        self._rollouts: defaultdict[str, Rollout] = defaultdict(Rollout)
        self._streams: dict[str, list[Stream]] = {}
        self._sharing = Sharing(lambda: self._epoch is not None and not self._quiet, clock)
        self._open = 0
        self._logged_at: dict[str, float] = {}
        self._server: grpc.aio.Server | None = None
        self._closing = False

    # --- what the rest of the operator says

    def lead(self, epoch: int | None, *, quiet: bool = False, hint: str = "") -> None:
        """Take, keep or give up leadership.

        Args:
            epoch: of our leadership; None sends every EPP to another replica.
            quiet: leadership is in doubt: keep the streams but program no EPP.
            hint: who leads instead, for people.
        """
        if epoch != self._epoch:
            if self._epoch is None:
                self._leading_since = self._clock()
            for stream in self._all():
                stream.session.epoch_changed()
        self._epoch, self._quiet, self._hint = epoch, quiet, hint
        for stream in self._all():
            if epoch is None:
                stream.end(pb.FromOperator(not_leader=pb.NotLeader(hint=hint)))
            stream.wake.set()

    def program(self, pool: str, snapshot: pb.Snapshot) -> bool:
        """Set the desired program of a pool; return whether it is new."""
        # One counter for all pools: it also grows over a pool that is deleted and made again.
        if not self._rollouts[pool].want(snapshot, self._revision + 1):
            return False
        self._revision += 1
        for stream in self._streams.get(pool, ()):
            stream.session.desired_changed()
            stream.wake.set()
        return True

    def forget(self, pool: str) -> None:
        """Stop programming a pool that is gone; its EPPs keep what they have."""
        self._rollouts[pool].give_up()
        if pool not in self._streams:
            del self._rollouts[pool]

    def redial(self, pool: str) -> None:
        """Have the EPPs of a pool dial again, each at a moment of its own."""
        for stream in self._streams.get(pool, ()):
            after = random.uniform(0, REDIAL_SECONDS)  # noqa: S311  # spreads load, hides nothing
            stream.end(pb.FromOperator(close=pb.Close(retry_after_seconds=after)))

    def retain(self, pool: str, expected: Collection[str]) -> None:
        """Forget all EPPs of a pool that are neither expected (pod uids) nor connected."""
        connected = [stream.pod_uid for stream in self._streams.get(pool, ())]
        self._rollouts[pool].retain({*expected, *connected})

    def connected(self, pool: str) -> dict[str, str]:
        """Return the EPPs that have a stream: name by pod uid."""
        return {stream.pod_uid: stream.pod_name for stream in self._streams.get(pool, ())}

    def epps(self, pool: str, expected: Mapping[str, str]) -> list[EPP]:
        """Return the state of a pool's expected EPPs (name by pod uid)."""
        self.retain(pool, expected.keys())
        streams = self._streams.get(pool, ())
        sessions = {stream.pod_uid: stream.session for stream in streams}
        return self._rollouts[pool].epps(expected, sessions, self._leading_since, self._clock())

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
                ("grpc.max_concurrent_streams", MAX_STREAMS_PER_POD),
                ("grpc.max_metadata_size", 32 << 10),
                ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
                ("grpc.server_handshake_timeout_ms", 10_000),
                ("grpc.max_connection_idle_ms", 15_000),
                ("grpc.keepalive_time_ms", 20_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
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
        """Ask every EPP to dial again soon, at moments of their own, and close."""
        self._closing = True
        for stream in self._all():
            after = random.uniform(0, CLOSE_SECONDS)  # noqa: S311  # spreads load, hides nothing
            stream.end(pb.FromOperator(close=pb.Close(retry_after_seconds=after)))
        if self._server is not None:
            await self._server.stop(0.5)

    async def Connect(self, _: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:  # noqa: N802  # the name in control.proto
        """Serve one stream."""
        self._open += 1
        try:
            await self._serve_stream(context)
        except RefusedError as error:
            self._count(error)
            # A peer that does not read would hold this up for as long as its connection lives.
            with suppress(TimeoutError):
                async with asyncio.timeout(WRITE_SECONDS):
                    await context.abort(error.code, str(error))
        finally:
            self._open -= 1

    async def _serve_stream(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        if self._open > MAX_STREAMS:
            raise RefusedError(
                grpc.StatusCode.RESOURCE_EXHAUSTED, "streams", "too many control streams"
            )
        hello = await self._admission.hello(context)
        uid = ""
        if self._leading:
            uid = await self._admission.pod_uid(hello, context)
        if not self._leading:  # leadership may have ended while the API server was asked
            metrics.REFUSALS.labels("not_leader").inc()
            await context.write(pb.FromOperator(not_leader=pb.NotLeader(hint=self._hint)))
            return
        stream = self._admit(hello, uid)
        try:
            await stream.serve(
                context,
                offer=lambda now: self._offer(stream, now),
                offers=lambda: self._desired(stream) is not None,
                take=lambda message, now: self._take(stream, message, now),
            )
        finally:
            self._remove(stream)

    @property
    def _leading(self) -> bool:
        return self._epoch is not None and not self._closing

    def _count(self, error: RefusedError) -> None:
        """Count a refusal, and log it, rate-limited per reason."""
        metrics.REFUSALS.labels(error.reason).inc()
        now = self._clock()
        if now - self._logged_at.get(error.reason, -math.inf) >= LOG_SECONDS:
            self._logged_at[error.reason] = now
            text = messages.printable(str(error))
            _log.warning("control stream refused: %s", text, extra={"reason": error.reason})

    def _admit(self, hello: pb.Hello, uid: str) -> Stream:
        """Register an EPP; from here on it receives every change."""
        now = self._clock()
        applied = hello.applied if hello.HasField("applied") else None
        known = features.NAMES & set(hello.features)
        session = Session(now, applied, known)
        boot_id = hello.boot_id[:MAX_BOOT_ID]
        stream = Stream(hello.pool, uid, hello.pod_name, session, self._clock, boot_id)
        streams = self._streams.setdefault(hello.pool, [])
        mine = [other for other in streams if other.pod_uid == uid and not other.ended]
        for other in mine[: max(0, len(mine) + 1 - MAX_STREAMS_PER_POD)]:
            metrics.REFUSALS.labels("replaced").inc()
            other.end()
        streams.append(stream)
        metrics.STREAMS.labels(hello.pool).set(len(streams))
        self._rollouts[hello.pool].runs(uid, applied, known, now)
        seen = max(hello.highest_epoch, applied.version.epoch if applied else 0)
        if self._epoch is not None and seen > self._epoch:
            self._higher_epoch(seen, uid, namespace_of(hello.pool))
        self._changed(hello.pool)
        _log.info("EPP connected", extra={"pool": hello.pool, "pod": hello.pod_name})
        return stream

    def _remove(self, stream: Stream) -> None:
        stream.ended = True
        self._sharing.leave(stream)
        streams = self._streams.get(stream.pool, [])
        if stream in streams:
            streams.remove(stream)
        metrics.STREAMS.labels(stream.pool).set(len(streams))
        if not streams:
            self._streams.pop(stream.pool, None)
            metrics.STREAMS.remove(stream.pool)
        rollout = self._rollouts[stream.pool]
        rollout.left(stream.pod_uid, stream.session.heard_at)
        if not streams and not rollout.wants:
            del self._rollouts[stream.pool]
        self._changed(stream.pool)

    def _all(self) -> list[Stream]:
        return [stream for streams in self._streams.values() for stream in streams]

    # --- what a stream says

    def _desired(self, stream: Stream) -> Desired | None:
        """Return what an EPP should run, if it is ours to say now."""
        if self._epoch is None or self._quiet or stream.ended:
            return None
        return self._rollouts[stream.pool].desired_for(stream.session.features)

    def _offer(self, stream: Stream, now: float) -> None:
        """Put the program into the outbox if this EPP should get it now."""
        desired = self._desired(stream)
        if desired is None or self._epoch is None:
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
            stream.send(pb.FromOperator(program=program))
            metrics.PROGRAMS.inc()

    def _take(self, stream: Stream, message: pb.FromPicker, now: float) -> None:
        match message.WhichOneof("message"):
            case "ack":
                self._on_ack(stream, message.ack, now)
            case "nack":
                self._on_nack(stream, message.nack, now)
            case "stats":
                stats = stream.session.on_stats(message.stats, now)
                if stats is not None:
                    self._rollouts[stream.pool].reported(stream.pod_uid, stats, now)
            case "demand" if features.SHARES in stream.session.features:
                self._sharing.take(stream, message.demand)
            case "bye":
                self._sharing.leave(stream, gone=True)
                _log.info("EPP leaves", extra={"pod": stream.pod_name})
                stream.end()
            case _:
                return

    def _on_ack(self, stream: Stream, ack: pb.Ack, now: float) -> None:
        in_force = stream.session.on_ack(ack)
        if in_force is None:
            metrics.ANSWERS.labels("unknown").inc()
            return
        metrics.ANSWERS.labels("ack").inc()
        self._rollouts[stream.pool].acknowledged(stream.pod_uid, in_force, now)
        stream.wake.set()
        self._changed(stream.pool)

    def _on_nack(self, stream: Stream, nack: pb.Nack, now: float) -> None:
        answer = stream.session.on_nack(nack, now)
        if answer is Answer.UNKNOWN:
            metrics.ANSWERS.labels("unknown").inc()
            return
        metrics.ANSWERS.labels("nack").inc()
        stream.wake.set()
        if answer is Answer.STALE and self._epoch is not None and nack.highest_epoch >= self._epoch:
            namespace = namespace_of(stream.pool)
            self._higher_epoch(nack.highest_epoch, stream.pod_uid, namespace)
        _log.warning(
            "EPP refuses its program",
            extra={"pod": stream.pod_name, "pool": stream.pool, "error": stream.session.error},
        )
        self._changed(stream.pool)


def namespace_of(pool: str) -> str:
    """Return the namespace of a pool, which is also that of its EPPs' pods."""
    return pool.partition("/")[0]
