"""Queues: bands, what waits in them, and when requests expire.

Deciding when to dispatch, and to which endpoint, does not belong here (controller.py), nor which
band and flow a request belongs to (classification.py), nor whose turn it is (levels.py, lanes.py).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from forebay_epp.core.lanes import Lanes
from forebay_epp.core.levels import Levels, weights_of
from forebay_epp.core.terms import NEVER, BandState, Cost

if TYPE_CHECKING:
    from forebay_control.plan import BandPlan, Plan
    from forebay_epp.core.flows import Lane
    from forebay_epp.core.levels import Weights
    from forebay_epp.core.terms import Request, Usage

DRAIN_RATE_SECONDS = 10.0
SPARE_DEADLINES = 64
EPSILON = 1e-9


class Band:
    """The queue of one priority.

    Fairness is between flows, and a flow's requests wait in lanes by subset hint.

    `arrival` holds the same requests by age. The band's TTL is the same for all, so the first of it
    is the first to expire by it. Deadlines that requests bring themselves are in a heap.

    Attributes:
        plan: the band's part of the plan.
        draining: whether the plan no longer names the band.
        arrival: what waits, by id, the oldest first.
        levels: the flows.
        lanes: the order in which what waits is dispatched.
        size_bytes: of all that waits.
        credit: dispatches that its reserved share owes it.
    """

    __slots__ = (
        *("_deadlines", "_drained", "_drained_at", "_sequence"),
        *("arrival", "credit", "draining", "lanes", "levels", "plan", "size_bytes"),
    )

    def __init__(self, plan: BandPlan, weights: Weights) -> None:
        self.plan = plan
        self.draining = False
        self.arrival: OrderedDict[int, Request] = OrderedDict()
        self.levels = Levels(plan, weights)
        self.lanes = Lanes(plan.ordering, self.levels.count)
        self.size_bytes = 0
        self.credit = 0.0
        self._sequence = 0
        self._deadlines: list[tuple[float, int, Request]] = []
        self._drained = 0.0
        self._drained_at = 0.0

    def reconfigure(self, plan: BandPlan, weights: Weights, now: float) -> None:
        """Take a new plan; waiting requests are reordered where the policies have changed.

        All lanes with a subset hint are parked then, so the caller has to `wake` every endpoint
        that has a free slot. Where the policies stay, so does what flows have had.
        """
        old = self.plan
        self.plan = plan
        self.draining = False
        if _policies(old) == _policies(plan):
            self.levels.reweigh(weights)
            return
        self.levels = levels = Levels(plan, weights)
        self.lanes = Lanes(plan.ordering, levels.count)
        for request in self.arrival.values():
            request.path = levels.path(request)
            flow = levels.join(request, now)
            self.lanes.add(flow, request, parked=request.subset is not None)

    # --- requests

    def full(self, request: Request) -> str | None:
        """Name the cap that this request would exceed, or None; write on it the flows it is in."""
        plan = self.plan
        levels = self.levels
        request.path = levels.path(request)
        if len(self.arrival) >= plan.max_requests:
            return f"the queue of band {plan.name} is full ({plan.max_requests} requests)"
        if self.size_bytes + request.size_bytes > plan.max_bytes:
            return f"the queue of band {plan.name} is full ({plan.max_bytes} bytes)"
        flow = levels.flows.get(request.path)
        requests, size_bytes = (flow.requests, flow.size_bytes) if flow else (0, 0)
        if levels.of_tenants:
            whose = "the tenant's queue"
        else:
            whose = "the model's queue" if request.flow else "the queue of unmatched models"
        if requests >= plan.flow_max_requests:
            return f"{whose} is full ({plan.flow_max_requests} requests)"
        if size_bytes + request.size_bytes > plan.flow_max_bytes:
            return f"{whose} is full ({plan.flow_max_bytes} bytes)"
        return None

    def push(self, request: Request, now: float, *, blocked: bool) -> None:
        """Queue the request; `blocked`: no endpoint that it may go to has a free slot."""
        self._sequence += 1
        request.sequence = self._sequence
        flow = self.levels.join(request, now)
        self.size_bytes += request.size_bytes
        self.arrival[request.id] = request
        if request.deadline < NEVER:
            self._note_deadline(request)
        self.lanes.add(flow, request, parked=blocked and request.subset is not None)

    def pop(self, lane: Lane, now: float) -> None:
        """Take out the lane's next request, which has been sent, and charge its flow.

        That is for what its endpoint does not have cached of the prompt, and for an answer as long
        as is to be expected.
        """
        request = lane.queue.pop()
        request.charged_by = self.levels
        cost = Cost(1, request.uncached_tokens, request.answer_tokens)
        self.levels.charge(lane.flow, cost, now)
        self._drained = self._drained * self._decay(now) + 1.0
        self._drained_at = now
        self._leave(request, lane)

    def remove(self, request: Request) -> None:
        """Take out this request without dispatching it."""
        lane = self.levels.flows[request.path].lanes[request.subset]
        lane.queue.remove(request)
        self._leave(request, lane)

    def charge(self, request: Request, usage: Usage, now: float) -> None:
        """Correct what the flow of a dispatched request was charged by the tokens it took.

        What was cached is as it was expected where the usage does not say. Where the policies have
        changed since the dispatch, it was not charged by those of today.
        """
        flow = self.levels.flows.get(request.path)
        if flow is not None and request.charged_by is self.levels:
            cached_tokens = usage.cached_tokens
            if cached_tokens is None:
                cached_tokens = min(request.cached_tokens, usage.prompt_tokens)
            more = Cost(
                0,
                usage.prompt_tokens - cached_tokens - request.uncached_tokens,
                usage.completion_tokens - request.answer_tokens,
            )
            self.levels.charge(flow, more, now)

    def charge_more(self, request: Request, answer_tokens: int, now: float) -> None:
        """Charge the flow of a dispatched request for an answer that is longer than expected.

        From now on so many tokens are expected, which is what `charge` will correct.
        """
        flow = self.levels.flows.get(request.path)
        if flow is not None and request.charged_by is self.levels:
            more = answer_tokens - request.answer_tokens
            self.levels.charge(flow, Cost(0, 0, more), now)
            request.answer_tokens = answer_tokens

    def _leave(self, request: Request, lane: Lane) -> None:
        del self.arrival[request.id]
        self.size_bytes -= request.size_bytes
        self.levels.leave(request, lane.flow)
        self.lanes.left(lane)

    # --- time

    def _note_deadline(self, request: Request) -> None:
        deadlines = self._deadlines
        if len(deadlines) > 2 * len(self.arrival) + SPARE_DEADLINES:
            deadlines[:] = [entry for entry in deadlines if self._waits(entry[2])]
            heapify(deadlines)
        heappush(deadlines, (request.deadline, request.sequence, request))

    def _waits(self, request: Request) -> bool:
        return self.arrival.get(request.id) is request

    def first_deadline(self) -> tuple[float, Request | None]:
        """Return the first deadline that a request has brought itself, and that request."""
        deadlines = self._deadlines
        while deadlines:
            deadline, _, request = deadlines[0]
            if self._waits(request):
                return deadline, request
            heappop(deadlines)
        return NEVER, None

    def _decay(self, now: float) -> float:
        return math.exp((self._drained_at - now) / DRAIN_RATE_SECONDS)

    def drain_rate(self, now: float) -> float:
        """Dispatches per second, exponentially averaged over about 10 s."""
        return self._drained * self._decay(now) / DRAIN_RATE_SECONDS

    def state(self, now: float, max_flows: int | None = None) -> BandState:
        """Copy the band's state, of the longest flows only if there is a maximum."""
        flow_count, flows = self.levels.states(max_flows)
        oldest = next(iter(self.arrival.values()), None)
        return BandState(
            band=self.plan.name,
            priority=self.plan.priority,
            requests=len(self.arrival),
            size_bytes=self.size_bytes,
            oldest_seconds=now - oldest.enqueued_at if oldest else 0.0,
            drain_rate=self.drain_rate(now),
            draining=self.draining,
            flows=flows,
            flow_count=flow_count,
        )


def _policies(plan: BandPlan) -> tuple[object, ...]:
    return plan.between, plan.fairness, plan.inner, plan.ordering


class Bands:
    """The bands of a plan.

    Attributes:
        by_name: all of them.
        all: the same, highest priority first.
        reserving: those of them that have a reserved share.
        draining: whether there are some that the plan no longer names.
    """

    def __init__(self, plan: Plan) -> None:
        weights = weights_of(plan)
        self.by_name = {band.name: Band(band, weights) for band in plan.bands}
        self.all: tuple[Band, ...] = ()
        self.reserving: tuple[Band, ...] = ()
        self.draining = False
        self._sort()

    def reconfigure(self, plan: Plan, now: float) -> None:
        """Take a new, valid plan.

        A band that it no longer names drains in its old position, before a new one of the same
        priority: who waits there came first, and there are no more of them.
        """
        wanted = {band.name for band in plan.bands}
        for name, band in self.by_name.items():
            if name not in wanted:
                band.draining = True
        weights = weights_of(plan)
        for band_plan in plan.bands:
            existing = self.by_name.get(band_plan.name)
            if existing is None:
                self.by_name[band_plan.name] = Band(band_plan, weights)
            else:
                existing.reconfigure(band_plan, weights, now)
        self._sort()

    def _sort(self) -> None:
        for name, band in list(self.by_name.items()):
            if band.draining and not band.arrival:
                del self.by_name[name]
        self.draining = any(band.draining for band in self.by_name.values())
        self.all = tuple(
            sorted(self.by_name.values(), key=lambda band: (-band.plan.priority, not band.draining))
        )
        self.reserving = tuple(band for band in self.all if band.plan.reserved_percent)

    # --- reserved shares

    def account(self, served: Band) -> None:
        """Note a dispatch: each band that waits has earned its share of it, and one has had it.

        A band that waits all the time so gets at least its percentage of the dispatches, less one,
        and none saves up what it did not need.
        """
        for band in self.reserving:
            if not band.arrival:
                band.credit = 0.0
                continue
            band.credit += band.plan.reserved_percent / 100
            if band is served:
                band.credit = max(0.0, band.credit - 1.0)

    def due(self) -> Band | None:
        """Return the band that its reserved share gives the next dispatch, if there is one."""
        for band in self.reserving:
            if band.credit >= 1.0 - EPSILON and band.arrival:
                return band
        return None

    def sweep(self) -> None:
        """Forget bands that have drained."""
        if self.draining and any(band.draining and not band.arrival for band in self.all):
            self._sort()
