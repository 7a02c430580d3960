"""The adaptive limit against a small model server in virtual time.

The server runs up to n requests at once, each for a fixed time, and keeps the others in a FIFO
list of its own. It knows nothing of the limit; the EPP knows of it what a scrape tells.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from random import Random

import pytest

from forebay_control.plan import MAX_SECONDS, BandPlan, LimitsPlan, Plan
from forebay_epp.core.controller import FlowController
from forebay_epp.core.terms import Dispatched, Endpoint, EndpointMetrics, Request

ADDRESS = "10.0.0.1:8000"
SCRAPE_SECONDS = 0.2
SERVICE_SECONDS = 1.0
LEARNING_SECONDS = 60.0
MANY = 1_000_000


@dataclass
class Server:
    """`step` is how often the engine admits what has arrived: 0 means at once."""

    slots: int
    service_seconds: float = SERVICE_SECONDS
    step: float = 0.0
    running: int = 0
    waiting: deque[int] = field(default_factory=deque)

    def admit(self):
        """Return what starts now."""
        started = []
        while self.waiting and self.running < self.slots:
            self.running += 1
            started.append(self.waiting.popleft())
        return started


class Run:
    """Controller and server on one list of events, ordered by virtual time."""

    def __init__(self, server, seed=3, spread=0.0):
        plan = Plan(
            bands=(BandPlan("Standard", 0, ttl_seconds=MAX_SECONDS, max_requests=MANY),),
            limits=LimitsPlan(max_requests=MANY),
        )
        self.server = server
        self.random = Random(seed)
        self.spread = spread
        self.controller = FlowController(plan, Random(seed))
        self.controller.set_endpoints([Endpoint(ADDRESS)], 0.0)
        self.now = 0.0
        self.events = []
        self.number = 0
        self.completed = []
        self.limits = []
        self.waiting_inside = []
        self.backlog = 0
        self.next_id = 0
        self.at(SCRAPE_SECONDS, self.scrape)
        if server.step:
            self.at(server.step, self.engine_step)

    def at(self, when, action, *arguments):
        self.number += 1
        heapq.heappush(self.events, (when, self.number, action, arguments))

    def keep_backlog(self, requests):
        """Let there always be this many waiting in the EPP."""
        self.backlog = requests
        self.poll()

    def arrivals(self, rate, until):
        """Let requests come at random, `rate` a second."""
        when = self.now
        while (when := when + self.random.expovariate(rate)) < until:
            self.at(when, self.submit)

    def submit(self):
        self.next_id += 1
        self.controller.submit(Request(self.next_id, "chat", 1), self.now)
        self.poll()

    def poll(self):
        while self.controller.waiting < self.backlog:
            self.next_id += 1
            self.controller.submit(Request(self.next_id, "chat", 1), self.now)
        for decision in self.controller.poll(self.now):
            assert isinstance(decision, Dispatched)
            self.server.waiting.append(decision.request_id)
        if not self.server.step:
            self.start()

    def start(self):
        for request_id in self.server.admit():
            seconds = self.server.service_seconds * self.random.uniform(
                1 - self.spread, 1 + self.spread
            )
            self.at(self.now + seconds, self.finish, request_id)

    def finish(self, request_id):
        self.server.running -= 1
        self.completed.append(self.now)
        self.controller.complete(request_id, None, self.now)
        if not self.server.step:
            self.start()
        self.poll()

    def engine_step(self):
        self.start()
        self.at(self.now + self.server.step, self.engine_step)

    def scrape(self):
        server = self.server
        metrics = EndpointMetrics(ADDRESS, server.running, len(server.waiting), None, self.now)
        self.waiting_inside.append((self.now, len(server.waiting)))
        self.controller.observe(metrics, self.now)
        self.poll()
        (endpoint,) = self.controller.snapshot(self.now).endpoints
        self.limits.append((self.now, endpoint.limit))
        self.at(self.now + SCRAPE_SECONDS, self.scrape)

    def until(self, end):
        while self.events and self.events[0][0] <= end:
            self.now, _, action, arguments = heapq.heappop(self.events)
            action(*arguments)
        self.now = end

    @property
    def limit(self):
        return self.limits[-1][1]

    def mean_waiting_inside(self, since):
        seen = [waiting for when, waiting in self.waiting_inside if when >= since]
        return sum(seen) / len(seen)

    def throughput(self, since):
        return sum(when >= since for when in self.completed) / (self.now - since)


def backlogged(slots, seconds, spread=0.1):
    run = Run(Server(slots), spread=spread)
    run.keep_backlog(100)
    run.until(seconds)
    return run


@pytest.mark.parametrize("slots", range(1, 65))
def test_the_limit_ends_at_the_capacity_of_the_server(slots):
    """Within one, for every size of batch."""
    run = backlogged(slots, LEARNING_SECONDS)

    assert abs(run.limit - slots) <= 1


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8, 16, 33, 64])
def test_hardly_anybody_waits_inside_the_server_after_learning(slots):
    """The queue stays where priority is known."""
    run = backlogged(slots, 2 * LEARNING_SECONDS)

    assert run.mean_waiting_inside(LEARNING_SECONDS) < 1


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8, 16, 33, 64])
def test_throughput_is_that_of_an_omniscient_limit(slots):
    """An oracle keeps all n slots busy all the time: n over the service time."""
    run = backlogged(slots, 2 * LEARNING_SECONDS)

    assert run.throughput(LEARNING_SECONDS) >= 0.97 * slots / SERVICE_SECONDS


@pytest.mark.parametrize(("before", "after"), [(16, 4), (64, 8), (8, 1)])
def test_the_limit_follows_a_capacity_that_shrinks(before, after):
    """Longer prompts fit fewer at once."""
    run = backlogged(before, LEARNING_SECONDS)
    run.server.slots = after
    run.until(LEARNING_SECONDS + 30)

    assert abs(run.limit - after) <= 1


@pytest.mark.parametrize(("before", "after"), [(4, 16), (8, 64), (1, 8)])
def test_the_limit_follows_a_capacity_that_grows(before, after):
    """One more slot at a time, faster while it succeeds."""
    run = backlogged(before, LEARNING_SECONDS)
    run.server.slots = after
    run.until(2 * LEARNING_SECONDS)

    assert abs(run.limit - after) <= 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rate", [2.0, 5.0, 10.0])
def test_single_waiting_requests_under_light_load_do_not_collapse_the_limit(rate, seed):
    """An engine that admits every 30 ms shows new arrivals as waiting although slots are free."""
    run = Run(Server(64, step=0.03), seed=seed, spread=0.5)
    run.arrivals(rate, 300)
    run.until(300)
    seen = sum(waiting > 0 for _, waiting in run.waiting_inside)

    assert seen > 5
    assert min(limit for _, limit in run.limits) >= 4


@pytest.mark.parametrize("service_seconds", [0.3, 1.0])
@pytest.mark.parametrize("slots", [4, 16, 64])
def test_an_engine_that_admits_by_steps_is_kept_full(slots, service_seconds):
    """Under backlog nearly every scrape shows a request that only waits for the next step."""
    step = 0.03
    run = Run(Server(slots, service_seconds, step), spread=0.3)
    run.keep_backlog(200)
    run.until(2 * LEARNING_SECONDS)

    assert abs(run.limit - slots) <= 2
    assert run.throughput(LEARNING_SECONDS) >= 0.9 * slots / (service_seconds + step / 2)
