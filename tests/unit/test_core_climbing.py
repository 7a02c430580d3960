"""Limits of servers of which only the ends of answers are known, in virtual time."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from random import Random

import pytest

from forebay_control.plan import Plan
from forebay_epp.core.controller import FlowController
from forebay_epp.core.limits.adaptive import FIRST_WINDOW
from forebay_epp.core.limits.climbing import HOLD_SECONDS
from forebay_epp.core.terms import Dispatched, Endpoint, EndpointMetrics, Request, Verdict

SERVICE_SECONDS = 0.05


class Load:
    """Clients that always ask, and servers that each answer so many at once; first in, first out.

    Attributes:
        most: requests that were ever in flight.
    """

    def __init__(self, servers: int, at_once: int, clients: int, verdict: Verdict) -> None:
        self.controller = FlowController(Plan(), Random(1))
        addresses = [f"10.0.0.{number}:8000" for number in range(servers)]
        self.controller.set_endpoints([Endpoint(address) for address in addresses], 0.0)
        self._at_once, self._verdict = at_once, verdict
        self._queues: dict[str, deque[int]] = {address: deque() for address in addresses}
        self._running: Counter[str] = Counter()
        self._ends: list[tuple[float, int, str]] = []
        self._random = Random(2)
        self._next = 0
        self.most = 0
        for _ in range(clients):
            self._ask(0.0)

    def run(self, until: float) -> None:
        while self._ends and self._ends[0][0] < until:
            now, number, address = heapq.heappop(self._ends)
            self._running[address] -= 1
            self.controller.complete(number, None, now, self._verdict)
            self._ask(now)
            self._serve(address, now)

    def in_flight(self) -> int:
        return self.controller.state(0.0).in_flight

    def limits(self) -> list[int]:
        return [each.limit for each in self.controller.state(0.0).endpoints]

    def _ask(self, now: float) -> None:
        self._next += 1
        self.controller.submit(Request(self._next, "m", 100), now)
        for decision in self.controller.poll(now):
            assert isinstance(decision, Dispatched)
            self._queues[decision.endpoint].append(decision.request_id)
            self._serve(decision.endpoint, now)
        self.most = max(self.most, self.in_flight())

    def _serve(self, address: str, now: float) -> None:
        queue = self._queues[address]
        while queue and self._running[address] < self._at_once:
            self._running[address] += 1
            seconds = SERVICE_SECONDS * self._random.uniform(0.9, 1.1)
            heapq.heappush(self._ends, (now + seconds, queue.popleft(), address))


def load(servers=1, at_once=1000, clients=256, verdict=Verdict.GOOD) -> Load:
    return Load(servers, at_once, clients, verdict)


def test_servers_that_report_nothing_take_what_comes():
    """256 clients, four servers that answer all at once: not 16 in flight, but all of them."""
    running = load(servers=4)
    assert running.in_flight() == 4 * FIRST_WINDOW

    running.run(until=3.0)

    assert running.in_flight() == 256


@pytest.mark.parametrize("at_once", [2, 8, 13, 48, 100])
def test_a_limit_that_brings_no_more_answers_is_taken_back(at_once):
    """Settled it is enough for 4 of 5 answers, and never more than four times what runs at once."""
    running = load(at_once=at_once, clients=1000)

    running.run(until=HOLD_SECONDS / 2)
    (limit,) = running.limits()

    assert max(FIRST_WINDOW, 0.8 * at_once) <= limit <= max(FIRST_WINDOW, 2 * at_once)
    assert running.most <= max(2 * FIRST_WINDOW, 4 * at_once)


def test_an_endpoint_that_is_never_full_keeps_its_limit():
    """What was not tried is not known."""
    running = load(clients=FIRST_WINDOW - 1)
    running.run(until=3.0)
    assert running.limits() == [FIRST_WINDOW]


def test_what_is_no_answer_moves_nothing():
    """A server whose clients leave is not given more for it."""
    left = load(clients=64, verdict=Verdict.UNKNOWN)
    left.run(until=1.0)
    assert left.limits() == [FIRST_WINDOW]


def test_a_page_that_shows_something_ends_the_climb():
    """From then on pages decide."""
    running = load(clients=64)
    running.controller.observe(EndpointMetrics("10.0.0.0:8000", 4, 0, 0.1, 0.01), 0.01)
    (limit,) = running.limits()

    running.run(until=3.0)

    assert running.limits() == [limit]
