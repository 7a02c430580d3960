"""One list of events for arrivals, engines, scrapes and the one who decides."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from forebay_epp.core.terms import NEVER, EndpointMetrics
from forebay_sim.stepping import StepEngine
from forebay_sim.terms import EngineRequest, Finished, FirstToken, NotReadyError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from forebay_replay.load import Arrival
    from forebay_replay.routing import Routing
    from forebay_sim.hardware import Hardware

HOP_SECONDS = 0.001
SCRAPE_SECONDS = 0.2
RETRY_SECONDS = 1.0


@dataclass(slots=True)
class Answer:
    """What became of one attempt at a request. Times are seconds after the start, or infinity.

    Attributes:
        arrival: the request.
        server: the number of the one that it was sent to.
        sent_at: when it left the queue.
        first_at: when its answer began.
        ended_at: when its answer ended.
        failed: whether it was broken off; its client has tried again `RETRY_SECONDS` later.
    """

    arrival: Arrival
    server: int = -1
    sent_at: float = NEVER
    first_at: float = NEVER
    ended_at: float = NEVER
    failed: bool = False

    @property
    def ttft_seconds(self) -> float:
        """From arrival to the first token."""
        return self.first_at - self.arrival.at


@dataclass(slots=True)
class Server:
    """An engine and what it has been seen to do while `Replay.measured` says so.

    Attributes:
        engine: the engine.
        scrape_seconds: how long reading its metrics takes.
        page: replaces what its metrics say; None leaves them true.
        slots: the size of its batch.
        waiting_seconds: requests waiting inside, integrated over time.
        running_seconds: requests in the batch, integrated over time.
        idle_seconds: time with room in the batch and nothing inside to fill it while a request
            waited in the queue.
        longest_idle_seconds: the longest such stretch.
        most_excess: the most requests that it held beyond its batch.
    """

    engine: StepEngine
    scrape_seconds: float = 0.0
    page: Callable[[EndpointMetrics], EndpointMetrics | None] | None = None
    on_the_way: int = 0
    waiting_seconds: float = 0.0
    running_seconds: float = 0.0
    idle_seconds: float = 0.0
    longest_idle_seconds: float = 0.0
    most_excess: int = 0
    looked_at: float = 0.0
    idle_since: float = NEVER
    waking_at: float = NEVER
    slots: int = field(init=False)

    def __post_init__(self) -> None:
        """Note the size of the batch."""
        self.slots = self.engine.hardware.max_num_seqs


class Replay:
    """A run.

    Args:
        engines: what each server is.
        routing: decides.
        arrivals: the load, in order of time.
        measured: from when to when servers are measured; answers are measured always.
    """

    def __init__(
        self,
        engines: Sequence[Hardware],
        routing: Routing,
        arrivals: Sequence[Arrival],
        measured: tuple[float, float] = (0.0, NEVER),
    ) -> None:
        self.now = 0.0
        self.servers = [Server(StepEngine(hardware)) for hardware in engines]
        self.routing = routing
        self.answers = [Answer(arrival) for arrival in arrivals]
        self.measured = measured
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._number = 0
        self._arrivals = self._open = len(self.answers)
        self._next = 0
        for number in range(len(self.servers)):
            phase = (1 + number) / len(self.servers)
            self.at(SCRAPE_SECONDS * phase, self._scrape, number)

    def at(self, when: float, action: Callable[..., None], *arguments: object) -> None:
        """Do something at a moment."""
        self._number += 1
        heapq.heappush(self._events, (when, self._number, action, arguments))

    def run(self, until: float = NEVER) -> None:
        """Go on until all requests are answered, or a moment has come."""
        answers = self.answers
        while self._open:
            arrival = answers[self._next].arrival.at if self._next < self._arrivals else NEVER
            wakeup = self.routing.next_wakeup()
            event = self._events[0][0]
            when = min(arrival, event, NEVER if wakeup is None else wakeup)
            if when > until:
                self.now = until
                return
            self.now = max(self.now, when)
            if arrival <= when:
                number = self._next
                self._next += 1
                self.send(self.routing.arrive(number, answers[number].arrival, self.now))
            elif event <= when:
                _, _, action, arguments = heapq.heappop(self._events)
                action(*arguments)
            else:
                self.send(self.routing.wake(self.now))

    def resize(self, servers: int) -> None:
        """Let the pool consist of the first so many servers; the others answer what they have."""
        self.send(self.routing.replace(servers, self.now))

    def restart(self, number: int, away_seconds: float) -> None:
        """Kill a server; its successor is empty, and takes requests after so many seconds."""
        server = self.servers[number]
        self._look(server)
        hardware = replace(server.engine.hardware, startup_seconds=away_seconds)
        server.engine = StepEngine(hardware, self.now)
        server.waking_at = NEVER
        for request, answer in enumerate(self.answers):
            if answer.server == number and not answer.failed and answer.ended_at == NEVER:
                self._fail(request)

    def _fail(self, number: int) -> None:
        answer = self.answers[number]
        answer.failed = True
        self.send(self.routing.fail(number, self.now))
        self.at(self.now + RETRY_SECONDS, self._retry, answer.arrival)

    def _retry(self, arrival: Arrival) -> None:
        self.answers.append(Answer(arrival))
        number = len(self.answers) - 1
        self.send(self.routing.arrive(number, arrival, self.now))

    def send(self, sent: list[tuple[int, int]]) -> None:
        """Bring dispatched requests to their servers."""
        for number, server in sent:
            answer = self.answers[number]
            answer.server = server
            answer.sent_at = self.now
            self.servers[server].on_the_way += 1
            self.at(self.now + HOP_SECONDS, self._submit, number, server)

    def _submit(self, number: int, server: int) -> None:
        self._look(self.servers[server])
        self.servers[server].on_the_way -= 1
        if self.answers[number].failed:  # its server was killed while it was on the way
            return
        arrival = self.answers[number].arrival
        request = EngineRequest(
            number, arrival.prompt_tokens, arrival.answer_tokens, arrival.blocks, arrival.adapter
        )
        try:
            self.servers[server].engine.submit(request, self.now)
        except NotReadyError:
            self._fail(number)
            return
        self._advance(server)

    def _advance(self, number: int) -> None:
        server = self.servers[number]
        self._look(server)
        for event in server.engine.advance(self.now):
            if isinstance(event, FirstToken):
                self.at(self.now + HOP_SECONDS, self._first_token, event.request_id)
            elif isinstance(event, Finished):
                self.at(self.now + HOP_SECONDS, self._end, event.request_id)
        wakeup = server.engine.next_wakeup()
        server.waking_at = NEVER if wakeup is None else wakeup
        if wakeup is not None:
            self.at(wakeup, self._wake_engine, number, wakeup)

    def _wake_engine(self, number: int, when: float) -> None:
        if self.servers[number].waking_at == when:
            self._advance(number)

    def _first_token(self, number: int) -> None:
        if self.answers[number].failed:
            return
        self.answers[number].first_at = self.now
        self.send(self.routing.first_token(number, self.now))

    def _end(self, number: int) -> None:
        answer = self.answers[number]
        if answer.failed:
            return
        answer.ended_at = self.now
        self._open -= 1
        self.send(self.routing.end(number, answer.arrival, self.now))

    def _scrape(self, number: int) -> None:
        server = self.servers[number]
        page: EndpointMetrics | None = None
        if self.now >= server.engine.ready_at:
            page = self._page(number)
        else:
            self.send(self.routing.scrape_refused(number, self.now))
        if server.page is not None and page is not None:
            page = server.page(page)
        if page is not None:
            self.at(self.now + server.scrape_seconds, self._scraped, number, page)
        self.at(self.now + max(SCRAPE_SECONDS, server.scrape_seconds), self._scrape, number)

    def _page(self, number: int) -> EndpointMetrics:
        engine = self.servers[number].engine
        gauges, hardware = engine.published, engine.hardware
        return EndpointMetrics(
            f"10.0.0.{number}:8000",
            gauges.running,
            gauges.waiting,
            gauges.kv_usage,
            self.now,
            SCRAPE_SECONDS,
            gauges.steps,
            gauges.step_tokens,
            hardware.kv_blocks * hardware.block_size_tokens,
            gauges.prefix_hits,
        )

    def _scraped(self, number: int, page: EndpointMetrics) -> None:
        self.send(self.routing.scrape(number, page, self.now))

    def _look(self, server: Server) -> None:
        """Account for the time since the last change of an engine."""
        start, end = self.measured
        engine = server.engine
        seconds = max(0.0, min(self.now, end) - max(server.looked_at, start))
        server.looked_at = self.now
        if seconds:
            server.waiting_seconds += seconds * engine.waiting
            server.running_seconds += seconds * engine.running
            excess = engine.running + engine.waiting - server.slots
            server.most_excess = max(server.most_excess, excess)
            held = engine.running + engine.waiting + server.on_the_way
            up = self.now - seconds >= engine.ready_at
            if up and self.routing.waiting and held < server.slots:
                server.idle_seconds += seconds
