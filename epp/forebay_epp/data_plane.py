"""The single writer: feeds the flow controller from streams and applies its decisions to them.

A transport owns the thread and the sockets. It opens an `Exchange` per ext_proc stream, hands it
what arrives, sends what it has to say, and calls `tick` when `timeout` has passed. Everything here
and in the core runs on that one thread, so there is no lock; other threads `post` what they know.
Moving bytes belongs in transport/, their meaning in codec/, bounds on what is read in intake.py,
counting in observers.
"""

from __future__ import annotations

import time
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from forebay_control.plan import ScorerName
from forebay_epp.codec.answers import verdict
from forebay_epp.codec.callers import CallerHeaders
from forebay_epp.codec.extproc.events import (
    Abandoned,
    Arrived,
    Finished,
    FirstChunk,
    HeadersOnly,
    Progress,
    Rejected,
    Untied,
)
from forebay_epp.codec.extproc.stream import ExtProcStream
from forebay_epp.codec.extproc.watching import PLAIN
from forebay_epp.codec.openai import Catalogue
from forebay_epp.core.terms import Dispatched, Outcome, Request
from forebay_epp.exchange import Exchange
from forebay_epp.intake import Intake
from forebay_epp.observers import Watch
from forebay_epp.ties import Ties

if TYPE_CHECKING:
    from collections.abc import Callable

    from forebay_control.plan import Plan
    from forebay_control.shares import Shares
    from forebay_epp.codec.extproc.events import Event
    from forebay_epp.codec.extproc.watching import Filter
    from forebay_epp.core.holdings import Holdings
    from forebay_epp.core.observation.shadowed import ShadowedController
    from forebay_epp.core.terms import Decision
    from forebay_epp.observers import Observer
    from forebay_epp.reading import Unread

BUSY_TICK_SECONDS = 0.005
IDLE_TICK_SECONDS = 0.05
SHARED_TICK_SECONDS = 0.01  # other EPPs wait for what this one gives back
STOPPED_SECONDS = 1.0  # without a tick; the operator takes an EPP for lost after 1.5 s of silence
TIMEOUT_MARGIN_SECONDS = 10.0
# A proxy that shows headers only ends its stream right behind them. One that would show trailers,
# too, ends it with the answer, and a stream of events takes longer.
HEADERS_ONLY_SECONDS = 0.05
UNSEEN = Finished(0, blind=True)


def _nothing() -> None:
    """Have no one to tell."""


class DataPlane:
    """Binds streams to the controller.

    Args:
        controller: the pool's flow controller; from now on only the data plane calls it.
        observer: called for everything that happens.
        max_streams: how many may bring a request at a time; see `Intake`.
        clock: monotonic seconds.
        address: host:port where a proxy that knows several EPPs finds this one.

    Attributes:
        catalogue: the models that clients may ask for.
        on_urgent: called when whoever divides the slots should hear of a change at once.
    """

    def __init__(
        self,
        controller: ShadowedController,
        observer: Observer,
        max_streams: int = 40_000,
        clock: Callable[[], float] = time.monotonic,
        address: str = "",
    ) -> None:
        self.controller = controller
        self.clock = clock
        self._observer = observer
        self.on_urgent: Callable[[], None] = _nothing
        self._welcome = False
        self._inbox: SimpleQueue[Callable[[float], None]] = SimpleQueue()
        self._next_id = 0
        self._intake = Intake(observer, max_streams, clock)
        self._submitted: dict[int, Exchange] = {}
        self._ties = Ties(address)
        self._current: Exchange | None = None
        self._tick_at = 0.0
        self.catalogue = Catalogue(controller.plan, int(time.time()))
        self._patience_seconds = 0.0
        self._configure(controller.plan)

    @property
    def serving(self) -> bool:
        """Whether requests are welcome; any thread may ask."""
        return self._welcome and not self.controller.pool_deleted

    @serving.setter
    def serving(self, welcome: bool) -> None:
        self._welcome = welcome

    # --- for transports

    def open(
        self, on_output: Callable[[], None], peer: str = "", filter_: Filter = PLAIN
    ) -> Exchange:
        """Begin a stream of the connection `peer`. It may already have a refusal to send."""
        self._next_id += 1
        plan = self.controller.plan
        stream = ExtProcStream(
            *(plan.limits.max_body_bytes, plan.default_model, self._headers),
            reads_prefix=self._reads_prefix,
            observed=filter_.observed,
        )
        exchange = Exchange(self, self._next_id, stream, on_output)
        self._observer.stream_opened()
        if filter_.secret is not None:
            self._watch(exchange, filter_.secret)
            self._intake.watch(exchange)
        else:
            self._intake.ask(exchange, peer)
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
            late = max(0.0, now - self._tick_at)
            self._observer.stalled(late)
            if late > STOPPED_SECONDS:
                self.controller.give_back_shares(now)
        while True:
            try:
                call = self._inbox.get_nowait()
            except Empty:
                break
            call(now)
        self._time_out(now)
        self._settle(now)
        for request, usage in self.controller.take_estimates():
            self._observer.estimated(request, usage)
        for change in self.controller.take_health_changes():
            self._observer.health_changed(change)
        for shadowed in self.controller.take_shadowed(now):
            self._observer.shadowed(shadowed)
        seconds = SHARED_TICK_SECONDS if self.controller.shared else IDLE_TICK_SECONDS
        self._tick_at = now + (BUSY_TICK_SECONDS if self.controller.waiting else seconds)

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
        self._configure(plan)

    @property
    def open_streams(self) -> int:
        """How many streams are open."""
        return len(self._intake)

    @property
    def unfinished(self) -> int:
        """How many requests wait or are in flight."""
        return len(self._submitted)

    def share(self, shares: Shares, now: float) -> Holdings:
        """Put shares into force, dispatch what they allow, and return what is held then."""
        self.controller.set_shares(shares, now)
        self._settle(now)
        return self.controller.holdings()

    def drain(self) -> None:
        """Become unready, dispatch what waits, queue nothing new."""
        self.serving = False
        self.controller.drain()

    def flush(self, now: float) -> None:
        """Answer everything that waits with 503."""
        self.controller.flush(now)
        self._settle(now)

    def read(self, exchange: Exchange, unread: Unread, event: Event | None) -> None:
        """Account for a message of a request that was not yet complete when it came."""
        max_bytes = self.controller.plan.limits.max_bytes
        complete = self._intake.read(exchange, unread, event, max_bytes)
        if complete is not None:
            self.handle(exchange, complete)

    def handle(self, exchange: Exchange, event: Event) -> None:
        """Pass a stream's event to the controller, and the decisions to the streams."""
        now = self.clock()
        if isinstance(event, FirstChunk | HeadersOnly | Progress):
            self._note(exchange, event, now)
            return
        self._current = exchange
        match event:
            case Arrived():
                self._arrive(exchange, event, now)
            case Finished():
                self._complete(exchange.watches or exchange, event, now)
            case Untied():
                self._observer.watched(Watch.UNTIED)
            case Abandoned():
                self.controller.cancel(exchange.id, now)
            case Rejected():
                self._observer.answered(exchange.id, event.outcome, now)
        self._settle(now)
        self._current = None

    def forget(self, exchange: Exchange) -> None:
        """A stream is gone."""
        self._intake.forget(exchange)

    def stop_reading(self, exchange: Exchange) -> None:
        """A request is complete, or not wanted any more."""
        self._intake.end(exchange)

    # --- inside

    def _configure(self, plan: Plan) -> None:
        longest = max((band.ttl_seconds for band in plan.bands), default=0.0)
        self._headers = CallerHeaders(plan)
        self._reads_prefix = plan.choice.rates(ScorerName.PREFIX_CACHE)
        self._patience_seconds = longest + plan.no_endpoints_ttl_seconds + TIMEOUT_MARGIN_SECONDS
        self._observer.reconfigured(plan)

    def _arrive(self, exchange: Exchange, event: Arrived, now: float) -> None:
        self._observer.arrived(exchange.id, event, now)
        asked = event.asked_model
        if asked is not None and not self.controller.pool_deleted:
            outcome = self._answer_from_catalogue(exchange.stream, asked)
            if outcome is not None:
                self._observer.answered(exchange.id, outcome, now)
                return
        caller = event.caller
        request = Request(
            *(exchange.id, event.model, event.size_bytes, event.subset, caller.objective),
            now + caller.ttl_seconds,
            caller.tenant,
            caller.due_in_seconds,
            event.prefix,
            event.streamed and not exchange.stream.observed,
        )
        exchange.request = request
        self._submitted[exchange.id] = exchange
        self.controller.submit(request, now)
        self._settle(now)
        if not request.endpoint:
            exchange.stream.extend_timeout(self._patience_seconds)

    def _answer_from_catalogue(self, stream: ExtProcStream, name: str) -> Outcome | None:
        """Answer with models or 404; None where a server must answer."""
        answer = self.catalogue.answer(name)
        if answer is not None:
            stream.answer(answer)
            return Outcome.ANSWERED
        if self.catalogue.complete:
            outcome = Outcome.REJECTED_UNKNOWN_MODEL
            stream.refuse(outcome, "the pool does not serve this model", param="model")
            return outcome
        return None

    def _note(
        self, exchange: Exchange, event: FirstChunk | HeadersOnly | Progress, now: float
    ) -> None:
        """Take what a part of an answer tells; it decides nothing."""
        request = exchange.request
        if request is None or exchange.id not in self._submitted:
            return
        match event:
            case FirstChunk():
                self.controller.first_token(exchange.id, now)
                self._observer.first_token(request, now)
            case HeadersOnly():
                exchange.headers_at = now
            case Progress():
                self.controller.progress(exchange.id, event.answer_tokens, now)

    def _complete(self, exchange: Exchange, event: Finished, now: float) -> None:
        request = exchange.request
        if self._submitted.pop(exchange.id, None) is None or request is None:
            return
        judged = verdict(event.status, whole=event.whole)
        at_once = event.headers_only and now < exchange.headers_at + HEADERS_ONLY_SECONDS
        blind = event.blind or at_once
        self.controller.complete(exchange.id, event.usage, now, judged, blind=blind)
        self._observer.completed(request, event, now)

    def _watch(self, exchange: Exchange, secret: str) -> None:
        """Find out whose answer a stream shows; one that shows none of ours ends."""
        request_id = self._ties.claim(secret)
        watched = None if request_id is None else self._submitted.get(request_id)
        exchange.watches = watched
        if watched is not None:
            exchange.stream.watch()
            self._observer.watched(Watch.TIED)
        else:
            exchange.stream.ignore()
            self._observer.watched(Watch.UNKNOWN if secret else Watch.UNTIED)

    def _settle(self, now: float) -> None:
        """Apply decisions until there are none; one may free a slot and so bring the next."""
        poll = self.controller.poll
        while decisions := poll(now):
            for decision in decisions:
                self._apply(decision, now)
        if self.controller.take_urgent():
            self.on_urgent()

    def _apply(self, decision: Decision, now: float) -> None:
        exchange = self._submitted[decision.request_id]
        request = exchange.request
        if request is None:
            raise AssertionError("a decision on a request that was not submitted")
        self._observer.decided(request, decision, now)
        if isinstance(decision, Dispatched):
            stream = exchange.stream
            tie = self._ties.give(exchange.id, now) if stream.observed else None
            finished = stream.dispatch(decision.endpoint, decision.target_model, tie)
            if finished is not None:
                self._complete(exchange, finished, now)
        else:
            del self._submitted[exchange.id]
            exchange.stream.refuse(decision.outcome, decision.message, decision.retry_after_seconds)
        if exchange is not self._current:
            exchange.on_output()

    def _time_out(self, now: float) -> None:
        """End requests that are not read or not answered in time."""
        while (request_id := self._ties.lose(now)) is not None:
            lost = self._submitted.get(request_id)
            if lost is not None:
                self._observer.watched(Watch.MISSING)
                self._complete(lost, UNSEEN, now)
        self._intake.time_out(now)
