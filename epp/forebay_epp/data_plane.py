"""The single writer: feeds the flow controller from streams and applies its decisions to them.

A transport owns the thread and the sockets. It opens an `Exchange` per ext_proc stream, hands it
what arrives, sends what it has to say, and calls `tick` when `timeout` has passed. Everything here
and in the core runs on that one thread, so there is no lock; other threads `post` what they know.
How bytes travel (transport/) and what they mean (codec/) does not belong here.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from itertools import islice
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from forebay_epp.codec.answers import verdict
from forebay_epp.codec.extproc.stream import Event, ExtProcStream, State
from forebay_epp.codec.openai import Catalogue
from forebay_epp.core.terms import Dispatched, Outcome, Request

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable

    from forebay_control.plan import Plan
    from forebay_epp.core.controller import FlowController
    from forebay_epp.core.terms import Decision, HealthChange
    from forebay_epp.traffic import Traffic

SILENT_STREAM_SECONDS = 10.0
READ_REQUEST_SECONDS = 30.0
BUSY_TICK_SECONDS = 0.005
IDLE_TICK_SECONDS = 0.05
TIMEOUT_MARGIN_SECONDS = 10.0

# So many of the oldest unfinished bodies are compared to find the one to give up. More would not
# find a better one, and a connection can hold thousands.
COMPARED_BODIES = 64


class Exchange:
    """One ext_proc stream and its request.

    The transport calls `receive`, `half_close` and `close`, then sends what `outbox` holds and, if
    `ended`, closes its side. `on_output` tells it that there is something to send although nothing
    has arrived. `close` is owed exactly once, whatever happened before.
    """

    __slots__ = (
        *("_data_plane", "id", "on_output", "opened_at", "peer"),
        *("read_bytes", "reading", "refused", "request", "stream"),
    )

    def __init__(
        self,
        data_plane: DataPlane,
        exchange_id: int,
        on_output: Callable[[], None],
        peer: str,
        opened_at: float,
    ) -> None:
        self._data_plane = data_plane
        self.id = exchange_id
        self.on_output = on_output
        self.peer = peer
        self.opened_at = opened_at
        self.stream = ExtProcStream(
            data_plane.max_body_bytes, data_plane.controller.plan.default_model
        )
        self.request: Request | None = None
        self.reading = True
        self.refused = False
        self.read_bytes = 0

    @property
    def outbox(self) -> deque[bytes]:
        """Messages to send, in order; the transport takes them out."""
        return self.stream.outbox

    @property
    def ended(self) -> bool:
        """Whether the stream is to be closed once the outbox is sent."""
        return self.stream.ended

    @property
    def failure(self) -> str | None:
        """The text of the error status to close with, or None for OK."""
        return self.stream.failure

    @property
    def lockstep(self) -> bool:
        """Whether nothing will be sent before the next message has come."""
        return self.stream.state is State.RESPONSE

    def receive(self, data: bytes) -> None:
        """Take a message."""
        event = self.stream.receive(data)
        if self.reading:
            self._data_plane.read(self, event)
        elif event is not None:
            self._data_plane.handle(self, event)

    def half_close(self) -> None:
        """The peer will send nothing more."""
        event = self.stream.half_close()
        if self.ended:
            self._data_plane.stop_reading(self)
        if event is not None:
            self._data_plane.handle(self, event)

    def close(self) -> None:
        """The stream is gone."""
        event = self.stream.reset()
        self._data_plane.forget(self)
        if event is not None:
            self._data_plane.handle(self, event)


class _Unread:
    """What one connection holds of requests that are not complete.

    Attributes:
        exchanges: theirs, the oldest first; a dict for its order.
        size_bytes: of the bodies so far.
    """

    __slots__ = ("exchanges", "size_bytes")

    def __init__(self) -> None:
        self.exchanges: dict[Exchange, None] = {}
        self.size_bytes = 0

    def slowest(self, now: float) -> Exchange:
        """Return the body that has kept most bytes for longest, of the oldest ones."""
        oldest = islice(self.exchanges, COMPARED_BODIES)
        return max(oldest, key=lambda e: e.read_bytes * (now - e.opened_at))


class DataPlane:
    """Binds streams to the controller.

    Args:
        controller: the pool's flow controller; from now on only the data plane calls it.
        traffic: counters to feed.
        max_streams: how many may be open. One more costs the slowest unread request of the
            connection that has most of them its stream; where there is none it is refused with 429.
        clock: monotonic seconds.
        health_changed: called for every endpoint that is left out or comes back.

    Attributes:
        catalogue: the models that clients may ask for.
    """

    def __init__(
        self,
        controller: FlowController,
        traffic: Traffic,
        max_streams: int = 40_000,
        clock: Callable[[], float] = time.monotonic,
        health_changed: Callable[[HealthChange], None] = lambda _: None,
    ) -> None:
        self.controller = controller
        self.traffic = traffic
        self.clock = clock
        self._welcome = False
        self._health_changed = health_changed
        self._max_streams = max_streams
        self._inbox: SimpleQueue[Callable[[float], None]] = SimpleQueue()
        self._next_id = 0
        self._open: dict[int, Exchange] = {}
        self._queued_or_sent: dict[int, Exchange] = {}
        self._silent: OrderedDict[Exchange, float] = OrderedDict()
        self._reading: OrderedDict[Exchange, float] = OrderedDict()
        self._unread: dict[str, _Unread] = {}
        self._read_bytes = 0
        self._refused = 0
        self._current: Exchange | None = None
        self._tick_at = 0.0
        self.catalogue = Catalogue(controller.plan, int(time.time()))
        traffic.configure(model.name for model in controller.plan.models)

    @property
    def serving(self) -> bool:
        """Whether requests are welcome; any thread may ask."""
        return self._welcome and not self.controller.pool_deleted

    @serving.setter
    def serving(self, welcome: bool) -> None:
        self._welcome = welcome

    # --- for transports

    @property
    def max_body_bytes(self) -> int:
        """The largest request body that is read."""
        return self.controller.plan.limits.max_body_bytes

    def open(self, on_output: Callable[[], None], peer: str = "") -> Exchange:
        """Begin a stream of the connection `peer`. It may already have a refusal to send."""
        now = self.clock()
        self._next_id += 1
        exchange = Exchange(self, self._next_id, on_output, peer, now)
        full = len(self._open) - self._refused >= self._max_streams and not self._give_up_stream()
        self._open[exchange.id] = exchange
        self.traffic.stream_opened()
        unread = self._unread.get(peer)
        if unread is None:
            unread = self._unread[peer] = _Unread()
        unread.exchanges[exchange] = None
        if full:
            self.traffic.stream_refused()
            self._refuse_unread(
                exchange,
                Outcome.REJECTED_QUEUE_FULL,
                f"{self._max_streams} requests are open at this endpoint picker",
            )
        else:
            self._silent[exchange] = now + SILENT_STREAM_SECONDS
        return exchange

    def timeout(self, now: float) -> float:
        """Return the seconds after which `tick` is due.

        News of other threads cannot wake the transport, so while requests wait the interval is
        short: a scrape may have made room.
        """
        if self.controller.waiting:
            self._tick_at = min(self._tick_at, now + BUSY_TICK_SECONDS)
        return max(0.0, self._tick_at - now)

    @property
    def due_at(self) -> float:
        """When the next `tick` is due, in the clock's seconds."""
        return self._tick_at

    def tick(self) -> None:
        """Take in what other threads posted and what time brings."""
        now = self.clock()
        if self._tick_at:
            self.traffic.stalled(max(0.0, now - self._tick_at))
        while True:
            try:
                call = self._inbox.get_nowait()
            except Empty:
                break
            call(now)
        self._time_out(now)
        self._settle(now)
        for change in self.controller.take_health_changes():
            self.traffic.health_changed(change)
            self._health_changed(change)
        self._tick_at = now + (BUSY_TICK_SECONDS if self.controller.waiting else IDLE_TICK_SECONDS)

    # --- for other threads

    def post(self, call: Callable[[float], None]) -> None:
        """Have `call(now)` run on the data-plane thread at its next tick."""
        self._inbox.put(call)

    # --- for the data-plane thread

    def reconfigure(self, plan: Plan, now: float) -> None:
        """Put a new plan in force.

        Raises:
            PlanError: it is not valid; the one in force stays.
        """
        self.controller.reconfigure(plan, now)
        self.catalogue.configure(plan)
        self.traffic.configure(model.name for model in plan.models)

    @property
    def open_streams(self) -> int:
        """How many streams are open."""
        return len(self._open)

    @property
    def unfinished(self) -> int:
        """How many requests wait or are in flight."""
        return len(self._queued_or_sent)

    def drain(self) -> None:
        """Be unready, dispatch what waits, queue nothing new."""
        self.serving = False
        self.controller.drain()

    def flush(self, now: float) -> None:
        """Answer everything that waits with 503."""
        self.controller.flush(now)
        self._settle(now)

    def read(self, exchange: Exchange, event: Event | None) -> None:
        """Account for a message of a request that was not yet complete when it came."""
        if self._silent.pop(exchange, None) is not None:
            self._reading[exchange] = self.clock() + READ_REQUEST_SECONDS
        if event is not None or exchange.ended:
            self.stop_reading(exchange)
            if event is not None:
                self.handle(exchange, event)
            return
        grown = exchange.stream.size_bytes - exchange.read_bytes
        exchange.read_bytes += grown
        self._unread[exchange.peer].size_bytes += grown
        self._read_bytes += grown
        while self._read_bytes > self.controller.plan.limits.max_bytes:
            self._give_up_body(exchange)

    def handle(self, exchange: Exchange, event: Event) -> None:
        """Tell the controller what has happened on a stream, and the streams what follows."""
        now = self.clock()
        self._current = exchange
        match event:
            case Event.ARRIVED:
                self._submit(exchange, now)
            case Event.FIRST_CHUNK:
                request = exchange.request
                if request is not None and exchange.id in self._queued_or_sent:
                    self.controller.first_token(exchange.id, now)
                    self.traffic.first_token(request.band, now - request.dispatched_at)
                self._current = None
                return
            case Event.FINISHED:
                self._complete(exchange, now, blind=False)
            case Event.FINISHED_BLIND:
                self._complete(exchange, now, blind=True)
            case Event.ABANDONED:
                self.controller.cancel(exchange.id, now)
            case Event.REFUSED:
                refusal = exchange.stream.refusal
                if refusal is not None:
                    self.traffic.decided("", None, refusal, 0.0)
        self._settle(now)
        self._current = None

    def forget(self, exchange: Exchange) -> None:
        """A stream is gone."""
        if self._open.pop(exchange.id, None) is not None:
            self.traffic.stream_closed()
            self._refused -= exchange.refused
        self.stop_reading(exchange)

    def stop_reading(self, exchange: Exchange) -> None:
        """A request is complete, or not wanted any more."""
        if not exchange.reading:
            return
        exchange.reading = False
        unread = self._unread[exchange.peer]
        del unread.exchanges[exchange]
        unread.size_bytes -= exchange.read_bytes
        self._read_bytes -= exchange.read_bytes
        if not unread.exchanges:
            del self._unread[exchange.peer]
        self._silent.pop(exchange, None)
        self._reading.pop(exchange, None)

    # --- inside

    def _submit(self, exchange: Exchange, now: float) -> None:
        stream = exchange.stream
        self.traffic.body_read(stream.size_bytes)
        asked = stream.asked_model
        deleted = self.controller.pool_deleted
        if asked is not None and not deleted and self._answer_from_catalogue(stream, asked):
            return
        request = Request(
            exchange.id, stream.model, stream.size_bytes, stream.subset, stream.objective
        )
        exchange.request = request
        self._queued_or_sent[exchange.id] = exchange
        self.controller.submit(request, now)
        self._settle(now)
        if stream.state is State.QUEUED:
            plan = self.controller.plan
            longest = max(band.ttl_seconds for band in plan.bands)
            stream.extend_timeout(longest + plan.no_endpoints_ttl_seconds + TIMEOUT_MARGIN_SECONDS)

    def _answer_from_catalogue(self, stream: ExtProcStream, name: str) -> bool:
        """Tell of models, or that there is none of this name; False where a server has to."""
        catalogue = self.catalogue
        answer = catalogue.answer(name)
        if answer is not None:
            outcome = Outcome.ANSWERED
            stream.answer(answer)
        elif catalogue.complete:
            outcome = Outcome.REJECTED_UNKNOWN_MODEL
            stream.refuse(outcome, "the pool does not serve this model", param="model")
        else:
            return False
        self.traffic.decided("", None, outcome, 0.0)
        return True

    def _complete(self, exchange: Exchange, now: float, *, blind: bool) -> None:
        request = exchange.request
        if self._queued_or_sent.pop(exchange.id, None) is None or request is None:
            return
        stream = exchange.stream
        usage = stream.usage()
        judged = verdict(stream.status, whole=stream.answered)
        self.controller.complete(exchange.id, usage, now, judged, blind=blind)
        self.traffic.completed(
            request.band,
            request.flow,
            stream.status,
            now - request.enqueued_at,
            usage.prompt_tokens if usage else 0,
            usage.completion_tokens if usage else 0,
        )

    def _settle(self, now: float) -> None:
        """Apply decisions until there are none; one may free a slot and so bring the next."""
        poll = self.controller.poll
        while decisions := poll(now):
            for decision in decisions:
                self._apply(decision, now)

    def _apply(self, decision: Decision, now: float) -> None:
        exchange = self._queued_or_sent[decision.request_id]
        request = exchange.request
        stream = exchange.stream
        if request is None:
            raise AssertionError("a decision on a request that was not submitted")
        if isinstance(decision, Dispatched):
            self.traffic.decided(
                request.band, request.flow, Outcome.DISPATCHED, decision.waited_seconds
            )
            ended = stream.dispatch(decision.endpoint, decision.target_model)
            if ended is not None:
                self._complete(exchange, now, blind=ended is Event.FINISHED_BLIND)
        else:
            del self._queued_or_sent[exchange.id]
            self.traffic.decided(
                request.band, request.flow, decision.outcome, decision.waited_seconds
            )
            if stream.state is State.QUEUED:
                stream.refuse(decision.outcome, decision.message, decision.retry_after_seconds)
        if exchange is not self._current:
            exchange.on_output()

    def _refuse_unread(self, exchange: Exchange, outcome: Outcome, message: str) -> None:
        self.stop_reading(exchange)
        # Its proxy may be slow to close it, or frozen; that must not keep others out.
        exchange.refused = True
        self._refused += 1
        retry_after = 1 if outcome is Outcome.REJECTED_QUEUE_FULL else None
        exchange.stream.refuse(outcome, message, retry_after)
        self.traffic.decided("", None, outcome, 0.0)

    def _give_up_body(self, current: Exchange) -> None:
        """Refuse the slowest body of the connection whose unfinished bodies are largest."""
        unread = max(self._unread.values(), key=lambda unread: unread.size_bytes)
        slowest = unread.slowest(self.clock())
        self._refuse_unread(
            slowest,
            Outcome.REJECTED_QUEUE_FULL,
            "too many request bodies are being read, and this one was the slowest",
        )
        if slowest is not current:
            slowest.on_output()

    def _give_up_stream(self) -> bool:
        """Refuse the oldest unread request of the connection that has most; False if none has."""
        if not self._unread:
            return False
        unread = max(self._unread.values(), key=lambda unread: len(unread.exchanges))
        oldest = next(iter(unread.exchanges))
        self._refuse_unread(
            oldest,
            Outcome.REJECTED_QUEUE_FULL,
            f"{self._max_streams} requests are open, and this one was slow to arrive",
        )
        oldest.on_output()
        return True

    def _time_out(self, now: float) -> None:
        """End streams that say nothing and requests that do not come to an end."""
        while self._silent:
            exchange, deadline = next(iter(self._silent.items()))
            if deadline > now:
                break
            self.stop_reading(exchange)
            exchange.stream.fail(f"no request within {SILENT_STREAM_SECONDS:.0f} s")
            exchange.on_output()
        while self._reading:
            exchange, deadline = next(iter(self._reading.items()))
            if deadline > now:
                break
            self._refuse_unread(
                exchange,
                Outcome.REJECTED_INCOMPLETE,
                f"the request body did not arrive within {READ_REQUEST_SECONDS:.0f} s",
            )
            exchange.on_output()
