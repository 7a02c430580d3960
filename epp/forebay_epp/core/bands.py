"""Queues: bands, what waits in them, and when requests expire.

Deciding when to dispatch, and to which endpoint, does not belong here (controller.py), nor which
band and flow a request belongs to (classification.py), nor whose turn it is (flows.py, fairness/).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING
from zlib import crc32

from forebay_control.plan import Between
from forebay_epp.core.fairness import FAIRNESS
from forebay_epp.core.flows import ANYWHERE, Flow, Lane, Site, Turns, earlier
from forebay_epp.core.least import Least
from forebay_epp.core.ordering import ORDERINGS
from forebay_epp.core.terms import NEVER, BandState, Cost, FlowState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from forebay_control.plan import BandPlan, Plan
    from forebay_epp.core.terms import Request, Usage

DRAIN_RATE_SECONDS = 10.0
SPARE_DEADLINES = 64
EPSILON = 1e-9
MAX_TENANT_FLOWS = 4096  # of a band: tenants are names that callers choose
OVERFLOW_FLOWS = 64  # that tenants beyond these share

Path = tuple[str, ...]
Weights = dict[Between, "Mapping[str, int]"]


class Band:
    """The queue of one priority.

    Fairness is between flows, and a flow's requests wait in lanes by subset hint. A lane is open
    until none of its endpoints is found to have a free slot; then it is parked at each of them.
    There it costs nothing until a slot of one becomes free: `wake` names that endpoint, and of all
    lanes, open or parked there, the one whose turn it is comes next.

    `arrival` holds the same requests by age. The band's TTL is the same for all, so the first of it
    is the first to expire by it. Deadlines that requests bring themselves are in a heap.

    Attributes:
        plan: the band's part of the plan.
        draining: whether the plan no longer names the band.
        arrival: what waits, by id, the oldest first.
        flows: those of the innermost level, by the names of the levels. One that has nothing
            waiting stays until the next plan, or until tenants need its place.
        size_bytes: of all that waits.
        sites: those of parked lanes, by address.
        credit: dispatches that its reserved share owes it.
    """

    __slots__ = (
        "_contested",
        "_deadlines",
        "_drained",
        "_drained_at",
        "_fairness",
        "_idle",
        "_levels",
        "_open",
        "_outer",
        "_sequence",
        "_tenanted",
        "_untried",
        "_weights",
        "arrival",
        "credit",
        "draining",
        "flows",
        "plan",
        "sites",
        "size_bytes",
    )

    def __init__(self, plan: BandPlan, weights: Weights) -> None:
        self.plan = plan
        self.draining = False
        self.arrival: OrderedDict[int, Request] = OrderedDict()
        self.flows: dict[Path, Flow] = {}
        self.size_bytes = 0
        self.credit = 0.0
        self._weights = weights
        self._sequence = 0
        self._begin(plan)
        self._deadlines: list[tuple[float, int, Request]] = []
        self._drained = 0.0
        self._drained_at = 0.0

    def _begin(self, plan: BandPlan) -> None:
        """Set up the levels of fairness, with no flow in them."""
        self._levels = 1 if plan.inner is None else 2
        self._tenanted = self._levels == 2 or plan.between is Between.TENANTS
        self._fairness = FAIRNESS[plan.fairness]()
        self._outer: dict[str, Flow] = {}
        self._idle: OrderedDict[Path, Flow] = OrderedDict()  # of tenants, the longest idle first
        self._open: Least[Lane] | Turns = Least(Lane.turn) if self._levels == 1 else Turns(1)
        self._untried = Site(ANYWHERE, self._levels)
        self.sites: dict[str, Site] = {}
        self._contested: Least[Site] = Least(Site.key)

    def reconfigure(self, plan: BandPlan, weights: Weights, now: float) -> None:
        """Take a new plan; waiting requests are reordered where the policies have changed.

        All lanes with a subset hint are parked then, so the caller has to `wake` every endpoint
        that has a free slot. Where the policies stay, so does what flows have had; a new weight
        counts from the next charge on.
        """
        old = self.plan
        self.plan = plan
        self.draining = False
        self._weights = weights
        if _policies(old) != _policies(plan):
            self.flows.clear()
            self._begin(plan)
            for request in self.arrival.values():
                request.path = self._path(request)
                flow = self._join(request, now)
                self._enter(flow, request, parked=request.subset is not None)
            return
        for path, flow in list(self.flows.items()):
            if not flow.requests:
                self._forget(path, flow)
            flow.weight = self._weight(self._levels - 1, flow.name)
        for flow in self._outer.values():
            flow.weight = self._weight(0, flow.name)

    # --- requests

    def full(self, request: Request) -> str | None:
        """Name the cap that this request would exceed, or None; write on it the flows it is in."""
        plan = self.plan
        request.path = self._path(request)
        if len(self.arrival) >= plan.max_requests:
            return f"the queue of band {plan.name} is full ({plan.max_requests} requests)"
        if self.size_bytes + request.size_bytes > plan.max_bytes:
            return f"the queue of band {plan.name} is full ({plan.max_bytes} bytes)"
        flow = self.flows.get(request.path)
        requests, size_bytes = (flow.requests, flow.size_bytes) if flow else (0, 0)
        if self._tenanted and (plan.between is Between.TENANTS) is (plan.inner is None):
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
        flow = self._join(request, now)
        self.size_bytes += request.size_bytes
        self.arrival[request.id] = request
        if request.deadline < NEVER:
            self._note_deadline(request)
        self._enter(flow, request, parked=blocked and request.subset is not None)

    def pop(self, lane: Lane, now: float) -> Request:
        """Take out the lane's next request because it is dispatched now."""
        request = lane.queue.pop()
        self._charge(lane.flow, Cost(1, request.prompt_tokens, request.answer_tokens), now)
        self._drained = self._drained * self._decay(now) + 1.0
        self._drained_at = now
        self._leave(request, lane)
        return request

    def remove(self, request: Request) -> None:
        """Take out this request without dispatching it."""
        lane = self.flows[request.path].lanes[request.subset]
        lane.queue.remove(request)
        self._leave(request, lane)

    def charge(self, request: Request, usage: Usage, now: float) -> None:
        """Correct what the flow of a dispatched request was charged by the tokens it took."""
        flow = self.flows.get(request.path)
        if flow is not None:
            more = Cost(
                0,
                usage.prompt_tokens - request.prompt_tokens,
                usage.completion_tokens - request.answer_tokens,
            )
            self._charge(flow, more, now)

    def _charge(self, flow: Flow, cost: Cost, now: float) -> None:
        outer = flow.outer
        if outer is None:
            self._fairness.charge(flow, cost, now)
        else:
            self._fairness.charge(outer, cost, now)
            if outer.fairness is not None:
                outer.fairness.charge(flow, cost, now)

    # --- flows

    def _path(self, request: Request) -> Path:
        """Return the names of the flows that a request is in, outermost first.

        There are too many tenants when `MAX_TENANT_FLOWS` have something waiting. Then each further
        one shares a flow with those of the same hash.
        """
        model, tenant = request.flow, request.tenant
        if not self._tenanted:
            return (model,)
        path = self._ordered(model, tenant)
        if path in self.flows or len(self.flows) < MAX_TENANT_FLOWS or self._idle:
            return path
        return self._ordered(model, f" overflow-{crc32(tenant.encode()) % OVERFLOW_FLOWS}")

    def _ordered(self, model: str, tenant: str) -> Path:
        """Return the names in the order of the levels."""
        plan = self.plan
        if plan.between is Between.MODELS:
            return model, tenant
        return (tenant,) if plan.inner is None else (tenant, model)

    def _join(self, request: Request, now: float) -> Flow:
        """Count a request in its flow, which is made where there is none, and activate that."""
        path = request.path
        flow = self.flows.get(path) or self._made(path)
        outer = flow.outer
        if not flow.requests:
            if self._tenanted:
                self._idle.pop(path, None)
            if outer is None:
                self._fairness.activate(flow, now)
            else:
                if not outer.requests:
                    self._fairness.activate(outer, now)
                if outer.fairness is not None:
                    outer.fairness.activate(flow, now)
        flow.requests += 1
        flow.size_bytes += request.size_bytes
        if outer is not None:
            outer.requests += 1
        return flow

    def _made(self, path: Path) -> Flow:
        """Return a new flow, which may take the place of one that has been idle longest."""
        if self._idle and len(self.flows) >= MAX_TENANT_FLOWS:
            self._forget(*self._idle.popitem(last=False))
        outer = None
        inner = self.plan.inner
        if inner is not None:
            name = path[0]
            outer = self._outer.get(name)
            if outer is None:
                policy = FAIRNESS[inner.fairness]()
                outer = self._outer[name] = Flow(name, self._weight(0, name), fairness=policy)
            outer.flows += 1
        flow = self.flows[path] = Flow(path[-1], self._weight(self._levels - 1, path[-1]), outer)
        return flow

    def _forget(self, path: Path, flow: Flow) -> None:
        """Forget a flow that has nothing waiting, and the one around it if that was all."""
        del self.flows[path]
        self._idle.pop(path, None)
        outer = flow.outer
        if outer is not None:
            outer.flows -= 1
            if not outer.flows:
                del self._outer[outer.name]

    def _weight(self, level: int, name: str) -> int:
        models = (self.plan.between is Between.MODELS) is (level == 0)
        return self._weights[Between.MODELS if models else Between.TENANTS].get(name, 1)

    # --- lanes

    def _enter(self, flow: Flow, request: Request, *, parked: bool) -> None:
        lane = flow.lanes.get(request.subset)
        if lane is None:
            queue = ORDERINGS[self.plan.ordering]()
            lane = flow.lanes[request.subset] = Lane(flow, request.subset, queue)
            lane.parked = parked
        request.subset = lane.subset  # equal hints are one object
        head = lane.queue.push(request)
        if head != lane.head:
            lane.head = head
            if lane.parked:
                self._wait_at_sites(lane)
            elif lane.subset is None:
                self._open.add(lane, lane.turn())
            else:
                self._untried.add(lane, lane.turn())

    def _leave(self, request: Request, lane: Lane) -> None:
        del self.arrival[request.id]
        self.size_bytes -= request.size_bytes
        flow = lane.flow
        flow.requests -= 1
        flow.size_bytes -= request.size_bytes
        if flow.outer is not None:
            flow.outer.requests -= 1
        if self._tenanted and not flow.requests:
            self._idle[request.path] = flow
        lane.head = lane.queue.rank()
        if lane.head == NEVER:
            if lane.parked:
                self._leave_sites(lane)
                lane.parked = False
            elif lane.subset is None:
                self._open.discard(lane)
            else:
                self._untried.discard(lane)
            if lane.subset is not None:
                del flow.lanes[lane.subset]

    # --- whose turn it is

    def wake(self, addresses: Iterable[str]) -> None:
        """Name endpoints that may have got a free slot."""
        for address in (*addresses, ANYWHERE):
            site = self.sites.get(address)
            if site is not None:
                self._contested.add(site, site.key())

    def next(self, is_open: Callable[[str], bool]) -> Lane | None:
        """Return the lane whose next request is the next of the band, or None.

        Args:
            is_open: says whether the endpoint of this address has a free slot.
        """
        lane = self._open.first()
        if self._untried:
            lane = earlier(self._untried.first(), lane)
        if self.sites:
            lane = earlier(self._first_parked(self._contested, is_open), lane)
        return lane

    def _first_parked(self, contested: Least[Site], is_open: Callable[[str], bool]) -> Lane | None:
        while (site := contested.first()) is not None:
            if site.address == ANYWHERE or is_open(site.address):
                return site.first()
            contested.discard(site)
        return None

    def park(self, lane: Lane) -> None:
        """Let a lane wait until an endpoint that it may go to gets a free slot."""
        if not lane.parked:
            if lane.subset is None:
                self._open.discard(lane)
            else:
                self._untried.discard(lane)
            lane.parked = True
            self._wait_at_sites(lane)
        for address in lane.sites:
            self._contested.discard(self.sites[address])

    def _wait_at_sites(self, lane: Lane) -> None:
        for address in lane.sites:
            site = self.sites.get(address)
            if site is None:
                site = self.sites[address] = Site(address, self._levels)
            site.add(lane, lane.turn())

    def _leave_sites(self, lane: Lane) -> None:
        for address in lane.sites:
            site = self.sites[address]
            site.discard(lane)
            if not site:
                del self.sites[address]

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

    def state(self, now: float) -> BandState:
        """Copy the band's state."""
        oldest = next(iter(self.arrival.values()), None)
        return BandState(
            band=self.plan.name,
            priority=self.plan.priority,
            requests=len(self.arrival),
            size_bytes=self.size_bytes,
            oldest_seconds=now - oldest.enqueued_at if oldest else 0.0,
            drain_rate=self.drain_rate(now),
            draining=self.draining,
            flows=tuple(
                self._state(path, flow) for path, flow in self.flows.items() if flow.requests
            ),
        )

    def _state(self, path: Path, flow: Flow) -> FlowState:
        first, second = path[0], path[1] if len(path) > 1 else None
        model, tenant = (first, second) if self.plan.between is Between.MODELS else (second, first)
        return FlowState(model, flow.requests, flow.size_bytes, tenant)


def _policies(plan: BandPlan) -> tuple[object, ...]:
    return plan.between, plan.fairness, plan.inner, plan.ordering


def _weights(plan: Plan) -> Weights:
    return {
        Between.MODELS: {model.name: model.weight for model in plan.models if model.weight != 1},
        Between.TENANTS: {tenant.name: tenant.weight for tenant in plan.tenants},
    }


class Bands:
    """The bands of a plan.

    Attributes:
        by_name: all of them.
        all: the same, highest priority first.
        reserving: those of them that have a reserved share.
        draining: whether there are some that the plan no longer names.
    """

    def __init__(self, plan: Plan) -> None:
        weights = _weights(plan)
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
        weights = _weights(plan)
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
