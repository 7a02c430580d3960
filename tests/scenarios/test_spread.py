"""Selection and doubt against several model servers in virtual time.

Each server runs up to n requests at once, for a random time each, and keeps the others in a list of
its own. The EPP knows of it what scrapes tell, which may stand still.
"""

from __future__ import annotations

import heapq
from collections import deque
from random import Random

import pytest

from forebay_control.plan import MAX_SECONDS, BandPlan, LimitsPlan, Plan
from forebay_epp.core.controller import FlowController
from forebay_epp.core.terms import Dispatched, Endpoint, EndpointMetrics, Request, Verdict

MANY = 1_000_000
SCRAPE_SECONDS = 0.2
KV_FULL = 0.99


class Server:
    """A batch of `slots`; `foreign` of them are other clients', all the time."""

    def __init__(self, slots, foreign=0):
        self.slots = slots
        self.foreign = foreign
        self.running = 0
        self.waiting = deque()
        self.frozen = None
        self.scraped = True
        self.seconds_running = 0.0

    @property
    def page(self):
        if self.frozen is not None:
            return self.frozen
        return self.running + self.foreign, len(self.waiting), None

    @property
    def held(self):
        return self.running + len(self.waiting) + self.foreign


class Run:
    """Controller and servers on one list of events."""

    def __init__(self, *servers, seed=3):
        plan = Plan(
            bands=(BandPlan("Standard", 0, ttl_seconds=MAX_SECONDS, max_requests=MANY),),
            limits=LimitsPlan(max_requests=MANY),
        )
        self.servers = {f"10.0.0.{n}:8000": server for n, server in enumerate(servers)}
        self.random = Random(seed)
        self.controller = FlowController(plan, Random(seed))
        self.now = 0.0
        self.controller.set_endpoints([Endpoint(address) for address in self.servers], 0.0)
        self.events = []
        self.number = self.next_id = 0
        self.backlog = 0
        self.measured_from = 0.0
        self.most_held = 0
        self.waiting_inside = 0
        self.scrapes = 0
        self.first_dispatch_at = None
        for number, address in enumerate(self.servers):
            self.at(SCRAPE_SECONDS * (1 + number / len(self.servers)), self.scrape, address)

    def at(self, when, action, *arguments):
        self.number += 1
        heapq.heappush(self.events, (when, self.number, action, arguments))

    def arrivals(self, rate, until):
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
            if self.first_dispatch_at is None:
                self.first_dispatch_at = self.now
            server = self.servers[decision.endpoint]
            server.waiting.append(decision.request_id)
            self.most_held = max(self.most_held, server.held)
            server.frozen = None  # a step publishes the gauges
            self.admit(server)

    def admit(self, server):
        while server.waiting and server.running + server.foreign < server.slots:
            server.running += 1
            seconds = self.random.uniform(0.5, 1.5)
            self.at(self.now + seconds, self.finish, server, server.waiting.popleft(), seconds)

    def finish(self, server, request_id, seconds):
        server.running -= 1
        if self.now - seconds >= self.measured_from:
            server.seconds_running += seconds
        self.admit(server)
        self.controller.complete(request_id, None, self.now, Verdict.GOOD)
        self.poll()

    def scrape(self, address):
        server = self.servers[address]
        if server.scraped:
            running, waiting, kv_usage = server.page
            self.controller.observe(
                EndpointMetrics(address, running, waiting, kv_usage, self.now), self.now
            )
            self.scrapes += 1
            self.waiting_inside += waiting
            self.poll()
        self.at(self.now + SCRAPE_SECONDS, self.scrape, address)

    def until(self, end):
        while True:
            wakeup = self.controller.next_wakeup() or float("inf")
            event = self.events[0][0] if self.events else float("inf")
            if min(wakeup, event) > end:
                break
            if wakeup < event:
                self.now = wakeup
                self.poll()
            else:
                self.now, _, action, arguments = heapq.heappop(self.events)
                action(*arguments)
        self.now = end

    def measure(self):
        """Begin to count what the servers do."""
        self.measured_from = self.now
        self.scrapes = self.waiting_inside = 0
        for server in self.servers.values():
            server.seconds_running = 0.0

    @property
    def unevenness(self):
        """The most loaded server's work over that of the least loaded one."""
        work = [server.seconds_running for server in self.servers.values()]
        return max(work) / min(work)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("load", [0.3, 0.9])
def test_equal_servers_are_loaded_equally_from_a_cold_start(load, seed):
    """Four of 64 slots: within 1.3 of each other, whatever slow start has come to."""
    run = Run(*(Server(64) for _ in range(4)), seed=seed)
    run.arrivals(load * 4 * 64, 60)
    run.until(15)
    run.measure()
    run.until(60)

    assert run.unevenness < 1.3


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("load", [0.3, 0.9])
def test_a_server_whose_limit_was_cut_gets_its_share_again(load, seed):
    """A page that shows a batch of 4 with many waiting, half a minute before the measuring."""
    run = Run(*(Server(64) for _ in range(4)), seed=seed)
    run.arrivals(load * 4 * 64, 110)
    run.until(15)
    address = next(iter(run.servers))
    run.controller.observe(EndpointMetrics(address, 4, 500, None, run.now), run.now)
    run.until(60)
    run.measure()
    run.until(110)

    assert run.unevenness < 1.3


def test_requests_one_after_another_leave_no_idle_server_out():
    """24 of them over three idle servers, which publish nothing new meanwhile."""
    run = Run(*(Server(8) for _ in range(3)))
    counts = dict.fromkeys(run.servers, 0)
    for number in range(24):
        run.controller.submit(Request(number, "chat", 1), number)
        (decision,) = run.controller.poll(number)
        counts[decision.endpoint] += 1
        run.controller.complete(number, None, number + 0.5, Verdict.GOOD)

    assert min(counts.values()) >= 3, counts


def test_a_small_server_is_not_flooded_beside_a_large_one():
    """8 and 64 slots at 60 %: next to none waits inside, once limits are known."""
    run = Run(Server(8), Server(64))
    run.arrivals(0.6 * 72, 90)
    run.until(30)
    run.measure()
    run.until(90)

    assert run.waiting_inside / run.scrapes < 1


@pytest.mark.parametrize("frozen", [(106, 15, None), (0, 0, KV_FULL), (3, 0, KV_FULL)])
@pytest.mark.parametrize("servers", [1, 3])
def test_a_gauge_that_stands_still_closes_an_idle_server_for_ten_seconds_at_most(frozen, servers):
    """Also when it is so of every server; the first request moves the page."""
    run = Run(*(Server(16) for _ in range(servers)))
    for server in run.servers.values():
        server.frozen = frozen
    run.until(5)
    run.backlog = 50
    began = run.now
    run.poll()
    run.until(40)

    assert run.first_dispatch_at - began <= 10.5
    assert all(server.running >= 12 for server in run.servers.values())


def test_a_shared_server_is_not_flooded_when_its_metrics_are_gone():
    """24 slots, 12 of them others'; under backlog it never holds more than 28 in two minutes."""
    run = Run(Server(24, foreign=12))
    run.backlog = 100
    run.until(40)
    run.most_held = 0
    run.servers["10.0.0.0:8000"].scraped = False
    run.until(160)

    assert 20 <= run.most_held <= 28


def test_a_page_is_believed_until_the_next_ones_are_overdue():
    """In a pool of 1,000 endpoints each is scraped every 5 s only."""
    run = Run(Server(8))
    run.until(0.1)
    (address,) = run.servers
    run.controller.observe(EndpointMetrics(address, 8, 0, 0.1, 1.0, interval_seconds=5.0), 1.0)
    run.controller.submit(Request(1, "chat", 1), 1.0)
    run.controller.poll(1.0)

    run.controller.poll(9.9)
    assert run.controller.snapshot(9.9).endpoints[0].fresh
    run.controller.poll(12.1)
    assert not run.controller.snapshot(12.1).endpoints[0].fresh
