"""Controller and simulated model servers on one list of events, in virtual time.

A server runs up to so many requests at once and keeps the others in a list of its own. The EPP
knows of it only what scrapes tell, which may stand still. Nothing here sleeps or reads a clock.
"""

from __future__ import annotations

import heapq
from collections import deque
from random import Random

from forebay_control.plan import BandPlan, LimitsPlan, Plan
from forebay_epp.core.controller import FlowController
from forebay_epp.core.terms import Dispatched, Endpoint, EndpointMetrics, Request, Verdict

MANY = 1_000_000
SCRAPE_SECONDS = 0.2


class Server:
    """A model server.

    Args:
        slots: the size of its batch.
        foreign: how many of them are other clients', all the time.
        service_seconds: mean time of a request in the batch.
        step: seconds between two steps of the engine, which admit what has arrived; 0: at once.
    """

    def __init__(self, slots, foreign=0, service_seconds=1.0, step=0.0):
        self.slots = slots
        self.foreign = foreign
        self.service_seconds = service_seconds
        self.step = step
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
    """A controller, its servers, and the moment it is.

    Args:
        servers: of the pool.
        seed: of arrivals, service times and ties.
        spread: service times are this part of their mean shorter or longer, evenly distributed.
    """

    def __init__(self, *servers, seed=3, spread=0.5):
        plan = Plan(
            bands=(BandPlan("Standard", 0, ttl_seconds=3600.0, max_requests=MANY),),
            limits=LimitsPlan(max_requests=MANY),
        )
        self.servers = {f"10.0.0.{n}:8000": server for n, server in enumerate(servers)}
        self.random = Random(seed)
        self.spread = spread
        self.controller = FlowController(plan, Random(seed))
        self.now = 0.0
        self.controller.set_endpoints([Endpoint(address) for address in self.servers], 0.0)
        self.events = []
        self.number = self.next_id = 0
        self.backlog = 0
        self.measured_from = 0.0
        self.most_held = 0
        self.completed = []
        self.limits = []
        self.waiting_inside = []
        self.first_dispatch_at = None
        for number, (address, server) in enumerate(self.servers.items()):
            self.at(SCRAPE_SECONDS * (1 + number / len(self.servers)), self.scrape, address)
            if server.step:
                self.at(server.step, self.engine_step, server)

    def at(self, when, action, *arguments):
        self.number += 1
        heapq.heappush(self.events, (when, self.number, action, arguments))

    def arrivals(self, rate, until):
        """Let requests come at random, `rate` a second."""
        when = self.now
        while (when := when + self.random.expovariate(rate)) < until:
            self.at(when, self.submit)

    def keep_backlog(self, requests):
        """Let there always be this many waiting in the EPP."""
        self.backlog = requests
        self.poll()

    def submit(self):
        self.enqueue()
        self.poll()

    def enqueue(self):
        self.next_id += 1
        self.controller.submit(Request(self.next_id, "chat", 1), self.now)

    def poll(self):
        while self.controller.waiting < self.backlog:
            self.enqueue()
        for decision in self.controller.poll(self.now):
            assert isinstance(decision, Dispatched)
            if self.first_dispatch_at is None:
                self.first_dispatch_at = self.now
            server = self.servers[decision.endpoint]
            server.waiting.append(decision.request_id)
            self.most_held = max(self.most_held, server.held)
            server.frozen = None  # a step publishes the gauges
            if not server.step:
                self.admit(server)

    def admit(self, server):
        while server.waiting and server.running + server.foreign < server.slots:
            server.running += 1
            factor = self.random.uniform(1 - self.spread, 1 + self.spread)
            seconds = server.service_seconds * factor
            self.at(self.now + seconds, self.finish, server, server.waiting.popleft(), seconds)

    def engine_step(self, server):
        self.admit(server)
        self.at(self.now + server.step, self.engine_step, server)

    def finish(self, server, request_id, seconds):
        server.running -= 1
        self.completed.append(self.now)
        if self.now - seconds >= self.measured_from:
            server.seconds_running += seconds
        if not server.step:
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
            self.waiting_inside.append((self.now, waiting))
            self.poll()
            endpoint = self.controller.state(self.now).endpoints[0]
            self.limits.append((self.now, endpoint.limit))
        self.at(self.now + SCRAPE_SECONDS, self.scrape, address)

    def until(self, end):
        """Go on to a moment; the controller is polled at each wakeup on the way."""
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
        for server in self.servers.values():
            server.seconds_running = 0.0

    @property
    def unevenness(self):
        """The most loaded server's work over that of the least loaded one."""
        work = [server.seconds_running for server in self.servers.values()]
        return max(work) / min(work)

    @property
    def limit(self):
        """The first server's limit at the last scrape."""
        return self.limits[-1][1]

    def mean_waiting_inside(self, since):
        """How many waited inside a server, on the average of scrapes."""
        seen = [waiting for when, waiting in self.waiting_inside if when >= since]
        return sum(seen) / len(seen)

    def throughput(self, since):
        """Requests a second."""
        return sum(when >= since for when in self.completed) / (self.now - since)
