"""The default transport: grpc's C core driven directly, one thread, one completion queue.

`grpc.server()` is built on the same objects, but hands every event through a thread pool; grpc.aio
through futures and tasks. Here each event's tag is a bound method of a small object per stream, so
an event costs one call. hack/bench transport compares them.

The API is private to grpcio, which is why it is used in this module only and grpcio's minor
version is pinned. What it demands: at most one receive and one send in flight per call; a receive
that yields None means that the peer has half-closed or that the call is cancelled; an operation
after cancellation completes with `success` False; nothing is sent, not even a status, before the
initial metadata. Operations that share a batch are one event: a send and the next receive, where
nothing can be sent before the next message; the last send, the status and the call's end. That end
is asked for alone only behind a receive that yields None: it would overtake messages that are there
to be received. A poll's deadline is one of the wall clock: set back by an hour while a poll waits,
it waits for an hour, and a small thread has to wake it.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from grpc._cython import cygrpc  # type: ignore[attr-defined]  # a C module without stubs

from forebay_epp.codec.extproc.watching import calling
from forebay_epp.transport import PROCESS, health

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc

    from forebay_epp.codec.extproc.watching import Filter
    from forebay_epp.data_plane import DataPlane
    from forebay_epp.transport import Connections

_QUEUE_SHUTDOWN = cygrpc.CompletionType.queue_shutdown
_EMPTY_FLAGS = 0
_SHUTDOWN = "shutdown"
_CALL = "call"
_WAKE = "wake"

OVERDUE_SECONDS = 0.25

_Receive = cygrpc.ReceiveMessageOperation
_Send = cygrpc.SendMessageOperation
_Close = cygrpc.ReceiveCloseOnServerOperation
_SEND_METADATA = ((), _EMPTY_FLAGS)


def _ignore(_: Any = None) -> None:
    """Stand in for a callback that has nothing to do."""


class CompletionQueueTransport:
    """An ext_proc server on a completion queue.

    Args:
        data_plane: what the streams talk to.
        address: host:port to bind; port 0 picks one.
        credentials: TLS, or None for plaintext.
        connections: how long connections live, and what they may carry.

    Raises:
        RuntimeError: the address cannot be bound.
    """

    def __init__(
        self,
        data_plane: DataPlane,
        address: str,
        credentials: grpc.ServerCredentials | None,
        connections: Connections,
    ) -> None:
        self._data_plane = data_plane
        self._queue = cygrpc.CompletionQueue()
        options = tuple((name.encode(), value) for name, value in connections.options())
        self._server = cygrpc.Server(options, False)  # no xDS
        self._server.register_completion_queue(self._queue)
        if credentials is None:
            self._port = int(self._server.add_http2_port(address.encode()))
        else:
            self._port = int(
                self._server.add_http2_port(
                    address.encode(),
                    # The C object behind the public one.
                    credentials._credentials,  # type: ignore[attr-defined]  # noqa: SLF001
                )
            )
        if not self._port:
            raise RuntimeError(f"cannot bind {address}")
        self._server.start()

    @property
    def port(self) -> int:
        """The bound port."""
        return self._port

    def stop(self) -> None:
        """Cancel what is open and have `serve` return."""
        self._server.shutdown(self._queue, _SHUTDOWN)
        self._server.cancel_all_calls()

    def serve(self) -> None:
        """Serve until `stop`."""
        served = threading.Event()
        waker = threading.Thread(target=self._wake_overdue, args=(served,), name="waker")
        waker.start()
        try:
            self._serve()
        finally:
            served.set()
            waker.join()
        queue = self._queue
        queue.shutdown()
        while queue.poll(time.time() + 1.0).completion_type != _QUEUE_SHUTDOWN:
            pass

    def _wake_overdue(self, served: threading.Event) -> None:
        """Have a poll return that waits although a tick is due, as long as there are polls."""
        data_plane = self._data_plane
        while not served.wait(OVERDUE_SECONDS):
            if data_plane.clock() - data_plane.due_at > OVERDUE_SECONDS:
                # The end of a server is an event that any thread can bring about.
                server = cygrpc.Server((), False)
                server.register_completion_queue(self._queue)
                server.start()
                server.shutdown(self._queue, _WAKE)

    def _serve(self) -> None:
        queue, server, data_plane = self._queue, self._server, self._data_plane
        clock, wall_clock, poll = data_plane.clock, time.time, queue.poll
        server.request_call(queue, queue, _CALL)
        while True:
            now = clock()
            timeout = data_plane.timeout(now)
            if timeout <= 0.0:
                data_plane.tick()
                timeout = data_plane.timeout(now)
            # Private: `event.tag` is whatever was given with the operation, None on timeout.
            event = poll(wall_clock() + timeout)
            tag = event.tag
            if tag is None or tag is _WAKE:
                continue
            if tag is _CALL:
                if event.call is not None and event.success:
                    server.request_call(queue, queue, _CALL)
                    self._accept(event)
            elif tag is _SHUTDOWN:
                break
            else:
                tag(event)

    def _accept(self, event: Any) -> None:
        method = event.call_details.method.decode("latin-1")
        if method == PROCESS:
            _Stream(event.call, self._data_plane, calling(event.invocation_metadata))
        elif method == health.CHECK:
            _check(event.call, serving=self._data_plane.serving)
        else:
            _unimplemented(event.call, method)


class _Stream:
    """One Process call."""

    __slots__ = (
        "_answered",
        "_call",
        "_exchange",
        "_half_closed",
        "_over",
        "_receiving",
        "_sending",
    )

    def __init__(self, call: Any, data_plane: DataPlane, filter_: Filter) -> None:
        self._call = call
        self._answered = False
        self._half_closed = False
        self._over = False
        self._receiving = False
        self._sending = False
        self._exchange = data_plane.open(self.pump, call.peer().decode(), filter_)
        self.pump()

    def pump(self) -> None:
        """Start all operations that can start now."""
        if self._over:
            return
        exchange = self._exchange
        if not self._sending:
            outbox = exchange.outbox
            if outbox:
                self._send(outbox.popleft(), last=not outbox)
                if self._over or (exchange.lockstep and self._sending):
                    return
            elif exchange.ended:
                self._end(())
                return
        if not (self._receiving or self._half_closed or self._over):
            self._receiving = True
            self._call.start_server_batch((_Receive(_EMPTY_FLAGS),), self._on_message)

    def _send(self, message: bytes, *, last: bool) -> None:
        operations: tuple[Any, ...] = (*self._metadata(), _Send(message, _EMPTY_FLAGS))
        exchange = self._exchange
        if last and exchange.ended:
            self._end(operations)
            return
        on_done: Callable[[Any], None] = self._on_sent
        if last and exchange.lockstep and not (self._receiving or self._half_closed):
            self._receiving = True
            operations = (*operations, _Receive(_EMPTY_FLAGS))
            on_done = self._on_exchanged
        self._sending = True
        self._call.start_server_batch(operations, on_done)

    def _metadata(self) -> tuple[Any, ...]:
        """Return the operation that has to precede all others that send, the first time."""
        if self._answered:
            return ()
        self._answered = True
        return (cygrpc.SendInitialMetadataOperation(*_SEND_METADATA),)

    def _end(self, operations: tuple[Any, ...]) -> None:
        failure = self._exchange.failure
        code = cygrpc.StatusCode.ok if failure is None else cygrpc.StatusCode.invalid_argument
        status = cygrpc.SendStatusFromServerOperation(
            (), code, (failure or "").encode(), _EMPTY_FLAGS
        )
        self._over = True
        operations = (*self._metadata(), *operations, status)
        if self._half_closed:
            self._call.start_server_batch(operations, _ignore)
        else:
            self._call.start_server_batch((*operations, _Close(_EMPTY_FLAGS)), self._on_close)

    def _on_message(self, event: Any) -> None:
        self._receiving = False
        self._take(event.batch_operations[0].message())

    def _on_exchanged(self, event: Any) -> None:
        self._receiving = self._sending = False
        self._take(event.batch_operations[-1].message())

    def _on_sent(self, _: Any) -> None:
        self._sending = False
        self.pump()

    def _take(self, message: bytes | None) -> None:
        if self._over:
            return
        if message is None:
            self._half_closed = True
            self._call.start_server_batch((_Close(_EMPTY_FLAGS),), self._on_close)
            self._exchange.half_close()
        else:
            self._exchange.receive(message)
        self.pump()

    def _on_close(self, _: Any) -> None:
        self._over = True
        exchange = self._exchange
        exchange.close()
        exchange.on_output = _ignore  # the cycle would keep both until a garbage collection


def _check(call: Any, *, serving: bool) -> None:
    """Answer a health check; what it asks about does not matter."""
    call.start_server_batch((cygrpc.ReceiveCloseOnServerOperation(_EMPTY_FLAGS),), _ignore)

    def on_message(_: Any) -> None:
        call.start_server_batch(
            (
                cygrpc.SendInitialMetadataOperation(*_SEND_METADATA),
                _Send(health.answer(serving=serving), _EMPTY_FLAGS),
                cygrpc.SendStatusFromServerOperation((), cygrpc.StatusCode.ok, b"", _EMPTY_FLAGS),
            ),
            _ignore,
        )

    call.start_server_batch((_Receive(_EMPTY_FLAGS),), on_message)


def _unimplemented(call: Any, method: str) -> None:
    call.start_server_batch((cygrpc.ReceiveCloseOnServerOperation(_EMPTY_FLAGS),), _ignore)
    call.start_server_batch(
        (
            cygrpc.SendInitialMetadataOperation(*_SEND_METADATA),
            cygrpc.SendStatusFromServerOperation(
                (),
                cygrpc.StatusCode.unimplemented,
                f"unknown method {method[:200]}".encode(),
                _EMPTY_FLAGS,
            ),
        ),
        _ignore,
    )
