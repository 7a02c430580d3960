"""Several cores, a ledger and servers in virtual time, with a delay between EPPs and leader."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from forebay_control.plan import (
    BandPlan,
    LimitsPlan,
    Plan,
    SaturationMode,
    SaturationPlan,
    UnmatchedPlan,
)
from forebay_control.v1 import control_pb2 as pb
from forebay_epp.adapters.control.slots import REPORT_SECONDS, URGENT_SECONDS
from forebay_epp.codec.shares import Reports
from forebay_epp.core.controller import FlowController
from forebay_epp.core.terms import Dispatched, Endpoint, Request, Verdict
from forebay_operator.channel.shares import messages
from forebay_operator.channel.shares.ledger import SETTLING_SECONDS, Ledger
from forebay_operator.channel.sharing import ALLOT_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TICK_SECONDS = 0.005  # until an EPP's data plane takes what has come for it


@dataclass(slots=True)
class Sent:
    """A request that was dispatched: when it came, when it left, and for how long it runs."""

    model: str
    tenant: str
    epp: int
    arrived_at: float
    sent_at: float
    server: str


class EPPs:
    """A pool of servers with fixed slots, served by several EPPs.

    Args:
        plan: of the pool; its limit is the slots of each server.
        epps: how many.
        servers: how many.
        seconds: that an answer takes on average; it varies by half.
        rtt_seconds: between an EPP and the leader, there and back.
    """

    def __init__(
        self, plan: Plan, epps: int, servers: int, seconds: float, rtt_seconds: float = 0.002
    ) -> None:
        self.now = 0.0
        self.random = Random(7)
        self.plan = plan
        self.servers = [f"10.0.0.{number}:8000" for number in range(servers)]
        self.running = dict.fromkeys(self.servers, 0)
        self.most_running = dict.fromkeys(self.servers, 0)
        self.busy_seconds = 0.0
        self.sent: list[Sent] = []
        self.cores = [FlowController(plan, Random(number)) for number in range(epps)]
        self.ledger = Ledger(-SETTLING_SECONDS)
        self.operator = True
        self._seconds = seconds
        self._delay = rtt_seconds / 2
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._number = 0
        self._requests: dict[int, tuple[Request, int]] = {}
        self._reports = [Reports() for _ in range(epps)]
        self._said_at = [0.0] * epps
        self._hurried = [False] * epps
        self.reports = 0
        self.report_bytes = 0
        self._allotting = False
        self._allot_at = 0.0
        self._busy_at = 0.0
        self.measured_from = 0.0
        for number, core in enumerate(self.cores):
            core.set_endpoints([Endpoint(address) for address in self.servers], 0.0)
            self.ledger.join(str(number), 0.0)
            self.at(REPORT_SECONDS * number / epps, self._tick, number)

    def at(self, when: float, action: Callable[..., None], *arguments: object) -> None:
        """Do something at a moment."""
        self._number += 1
        heapq.heappush(self._events, (when, self._number, action, arguments))

    def load(self, arrivals: Sequence[tuple[float, int, str, str]]) -> None:
        """Have requests come: when, at which EPP, for which model, of which tenant."""
        for when, epp, model, tenant in arrivals:
            self.at(when, self._arrive, epp, model, tenant)

    def run(self, until: float) -> None:
        """Let time pass."""
        while self._events and self._events[0][0] <= until:
            self.now, _, action, arguments = heapq.heappop(self._events)
            action(*arguments)
        self.now = until
        self._look()

    def occupancy(self) -> float:
        """Return the part of the slots that was used since `measured_from`."""
        slots = self.plan.saturation.max_concurrency * len(self.servers)
        return self.busy_seconds / (self.now - self.measured_from) / slots

    def _look(self) -> None:
        since = max(self._busy_at, self.measured_from)
        if self.now > since:
            self.busy_seconds += (self.now - since) * sum(self.running.values())
        self._busy_at = self.now

    # --- requests

    def _arrive(self, epp: int, model: str, tenant: str) -> None:
        self._number += 1
        request = Request(self._number, model, 100, tenant=tenant)
        self._requests[request.id] = (request, epp)
        self.cores[epp].submit(request, self.now)
        self._poll(epp)

    def _poll(self, epp: int) -> None:
        for decision in self.cores[epp].poll(self.now):
            request, _ = self._requests[decision.request_id]
            if isinstance(decision, Dispatched):
                self._look()
                self.running[decision.endpoint] += 1
                running = self.running[decision.endpoint]
                self.most_running[decision.endpoint] = max(
                    self.most_running[decision.endpoint], running
                )
                self.sent.append(
                    Sent(
                        *(request.model, request.tenant, epp),
                        *(request.enqueued_at, self.now, decision.endpoint),
                    )
                )
                seconds = self._seconds * self.random.uniform(0.5, 1.5)
                self.at(self.now + seconds, self._end, epp, request.id, decision.endpoint)
        if self.cores[epp].take_urgent() and not self._hurried[epp]:
            self._hurried[epp] = True
            when = max(self.now, self._said_at[epp] + URGENT_SECONDS)
            self.at(when + TICK_SECONDS, self._hurry, epp)

    def _end(self, epp: int, request_id: int, server: str) -> None:
        self._look()
        self.running[server] -= 1
        self.cores[epp].complete(request_id, None, self.now, Verdict.GOOD)
        self._poll(epp)

    # --- the channel

    def _tick(self, epp: int) -> None:
        if self.now - self._said_at[epp] >= REPORT_SECONDS / 2:
            self._report(epp)
        self.at(self.now + REPORT_SECONDS, self._tick, epp)

    def _hurry(self, epp: int) -> None:
        self._hurried[epp] = False
        self._report(epp)

    def _report(self, epp: int) -> None:
        report = self._reports[epp].report(self.cores[epp].holdings(), anyway=True)
        if report is not None and self.operator:
            self._said_at[epp] = self.now
            data = report.SerializeToString()
            self.reports += 1
            self.report_bytes += len(data)
            self.at(self.now + self._delay, self._hear, epp, data)

    def _hear(self, epp: int, report: bytes) -> None:
        message = pb.Demand.FromString(report)
        self.ledger.report(str(epp), messages.demand(message), self.now)
        if not self._allotting:
            self._allotting = True
            self.at(max(self.now, self._allot_at + ALLOT_SECONDS), self._allot)

    def _allot(self) -> None:
        self._allotting = False
        self._allot_at = self.now
        for name, shares in self.ledger.allot(self.now).items():
            message = messages.shares(shares)
            self.at(self.now + self._delay + TICK_SECONDS, self._take, int(name), message)

    def _take(self, epp: int, message: pb.Shares) -> None:
        shares = self._reports[epp].take(message)
        if shares is not None:
            self.cores[epp].set_shares(shares, self.now)
            self._poll(epp)
            self._report(epp)


def plan(*bands: BandPlan, slots: int, **more: object) -> Plan:
    """Return a plan of these bands with fixed slots."""
    saturation = SaturationPlan(mode=SaturationMode.CONCURRENCY, max_concurrency=slots)
    return Plan(
        pool="ns/pool",
        bands=bands,
        limits=LimitsPlan(max_requests=100_000),
        saturation=saturation,
        unmatched=UnmatchedPlan(band=bands[-1].name),
        **more,  # type: ignore[arg-type]  # the plan's own fields
    )
