"""Queues: bands, the flows in them, their lanes, and when requests expire.

Deciding when to dispatch, and to which endpoint, does not belong here (controller.py), nor which
band and flow a request belongs to (classification.py).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from forebay_epp.core.fairness import FAIRNESS
from forebay_epp.core.least import Least
from forebay_epp.core.ordering import ORDERINGS
from forebay_epp.core.terms import NEVER, BandState, Cost, FlowState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from forebay_control.plan import BandPlan, Plan
    from forebay_epp.core.ordering import Ordering
    from forebay_epp.core.terms import Request, Usage

DRAIN_RATE_SECONDS = 10.0
SPARE_DEADLINES = 64

_ONE_REQUEST = Cost(requests=1)
_ANYWHERE = ""  # the site of a lane that any endpoint will do for

Subset = frozenset[str] | None


class Flow:
    """What one flow has in one band.

    Attributes:
        name: the model's, or `UNMATCHED_FLOW`.
        rank: written by the band's fairness policy.
        requests: how many wait.
        size_bytes: of those that wait.
        lanes: those in which a request waits, by subset hint; the one without a hint stays.
    """

    __slots__ = ("lanes", "name", "rank", "requests", "size_bytes")

    def __init__(self, name: str) -> None:
        self.name = name
        self.rank = 0.0
        self.requests = 0
        self.size_bytes = 0
        self.lanes: dict[Subset, Lane] = {}


class Lane:
    """The requests of one flow that may go to the same endpoints.

    Attributes:
        flow: whose they are.
        subset: addresses of the endpoints, or None for all.
        sites: the same in a fixed order; `_ANYWHERE` for all.
        queue: the requests.
        head: the rank of the first of them by the ordering; infinity without any.
        parked: whether the lane waits at its sites because none of them had a free slot.
    """

    __slots__ = ("flow", "head", "parked", "queue", "sites", "subset")

    def __init__(self, flow: Flow, subset: Subset, queue: Ordering) -> None:
        self.flow = flow
        self.subset = subset
        self.sites = (_ANYWHERE,) if subset is None else tuple(sorted(subset))
        self.queue = queue
        self.head = NEVER
        self.parked = False

    def key(self) -> tuple[float, float]:
        """Return what decides between lanes of all flows: the flow's turn, then the ordering."""
        return self.flow.rank, self.head

    def rank(self) -> float:
        """Return what decides between lanes of one flow."""
        return self.head


class Site:
    """The lanes that wait for a slot of one endpoint, flow by flow.

    Two levels, because a charge changes the turn of all lanes of a flow at once.

    Attributes:
        address: of the endpoint.
        flows: the lanes, by flow.
    """

    __slots__ = ("_next", "address", "flows")

    def __init__(self, address: str) -> None:
        self.address = address
        self.flows: dict[Flow, Least[Lane]] = {}
        self._next: Least[Flow] = Least(self._flow_key)

    def _flow_key(self, flow: Flow) -> tuple[float, float] | None:
        lane = self.flows[flow].first()
        return None if lane is None else lane.key()

    def add(self, lane: Lane) -> None:
        """Let a lane wait here, or take note that its next request has become another."""
        lanes = self.flows.get(lane.flow)
        if lanes is None:
            lanes = self.flows[lane.flow] = Least(Lane.rank)
        lanes.add(lane, lane.head)
        self._next.add(lane.flow, self._flow_key(lane.flow))

    def discard(self, lane: Lane) -> None:
        """Let a lane wait here no longer."""
        lanes = self.flows[lane.flow]
        lanes.discard(lane)
        if not lanes:
            self._next.discard(lane.flow)
            del self.flows[lane.flow]

    def first(self) -> Lane | None:
        """Return the lane whose turn it is, or None if none waits here."""
        flow = self._next.first()
        return None if flow is None else self.flows[flow].first()

    def key(self) -> tuple[tuple[float, float], str] | None:
        """Return what decides between sites."""
        lane = self.first()
        return None if lane is None else (lane.key(), self.address)


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
        flows: by name; one that has nothing waiting stays until the next plan.
        size_bytes: of all that waits.
        sites: those of parked lanes, by address.
    """

    __slots__ = (
        "_contested",
        "_deadlines",
        "_drained",
        "_drained_at",
        "_fairness",
        "_open",
        "_sequence",
        "_untried",
        "arrival",
        "draining",
        "flows",
        "plan",
        "sites",
        "size_bytes",
    )

    def __init__(self, plan: BandPlan) -> None:
        self.plan = plan
        self.draining = False
        self.arrival: OrderedDict[int, Request] = OrderedDict()
        self.flows: dict[str, Flow] = {}
        self.size_bytes = 0
        self._fairness = FAIRNESS[plan.fairness]()
        self._sequence = 0
        self._open: Least[Lane] = Least(Lane.key)
        self._untried = Site(_ANYWHERE)
        self.sites: dict[str, Site] = {}
        self._contested: Least[Site] = Least(Site.key)
        self._deadlines: list[tuple[float, int, Request]] = []
        self._drained = 0.0
        self._drained_at = 0.0

    def reconfigure(self, plan: BandPlan, now: float) -> None:
        """Take a new plan; waiting requests are reordered where the policies have changed.

        All lanes with a subset hint are parked then, so the caller has to `wake` every endpoint
        that has a free slot.
        """
        old = self.plan
        self.plan = plan
        self.draining = False
        self.flows = {name: flow for name, flow in self.flows.items() if flow.requests}
        if (old.fairness, old.ordering) != (plan.fairness, plan.ordering):
            self._fairness = FAIRNESS[plan.fairness]()
            self._open = Least(Lane.key)
            self._untried = Site(_ANYWHERE)
            self.sites.clear()
            for flow in self.flows.values():
                flow.rank = 0.0
                flow.lanes.clear()
            for request in self.arrival.values():
                flow = self.flows[request.flow]
                if not flow.lanes:
                    self._fairness.activate(flow, now)
                self._enter(flow, request, parked=request.subset is not None)

    # --- requests

    def full(self, request: Request) -> str | None:
        """Name the cap that this request would exceed, or None."""
        plan = self.plan
        if len(self.arrival) >= plan.max_requests:
            return f"the queue of band {plan.name} is full ({plan.max_requests} requests)"
        if self.size_bytes + request.size_bytes > plan.max_bytes:
            return f"the queue of band {plan.name} is full ({plan.max_bytes} bytes)"
        flow = self.flows.get(request.flow)
        requests, size_bytes = (flow.requests, flow.size_bytes) if flow else (0, 0)
        whose = "the model's queue" if request.flow else "the queue of unmatched models"
        if requests >= plan.flow_max_requests:
            return f"{whose} is full ({plan.flow_max_requests} requests)"
        if size_bytes + request.size_bytes > plan.flow_max_bytes:
            return f"{whose} is full ({plan.flow_max_bytes} bytes)"
        return None

    def push(self, request: Request, now: float, *, blocked: bool) -> None:
        """Queue the request; `blocked`: no endpoint that it may go to has a free slot."""
        flow = self.flows.get(request.flow)
        if flow is None:
            flow = self.flows[request.flow] = Flow(request.flow)
        if not flow.requests:
            self._fairness.activate(flow, now)
        flow.requests += 1
        flow.size_bytes += request.size_bytes
        self.size_bytes += request.size_bytes
        self._sequence += 1
        request.sequence = self._sequence
        self.arrival[request.id] = request
        if request.deadline < NEVER:
            self._note_deadline(request)
        self._enter(flow, request, parked=blocked and request.subset is not None)

    def pop(self, lane: Lane, now: float) -> Request:
        """Take out the lane's next request because it is dispatched now."""
        request = lane.queue.pop()
        flow = lane.flow
        self._fairness.charge(flow, _ONE_REQUEST, now)
        self._drained = self._drained * self._decay(now) + 1.0
        self._drained_at = now
        self._leave(request, lane)
        return request

    def remove(self, request: Request) -> None:
        """Take out this request without dispatching it."""
        lane = self.flows[request.flow].lanes[request.subset]
        lane.queue.remove(request)
        self._leave(request, lane)

    def charge(self, request: Request, usage: Usage, now: float) -> None:
        """Charge the flow of a request that was dispatched for the tokens it took."""
        flow = self.flows.get(request.flow) or Flow(request.flow)
        self._fairness.charge(flow, Cost(0, usage.prompt_tokens, usage.completion_tokens), now)

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
                self._open.add(lane, (flow.rank, head))
            else:
                self._untried.add(lane)

    def _leave(self, request: Request, lane: Lane) -> None:
        del self.arrival[request.id]
        self.size_bytes -= request.size_bytes
        flow = lane.flow
        flow.requests -= 1
        flow.size_bytes -= request.size_bytes
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
        """Name the endpoints that may have got a free slot since the last call."""
        self._contested = Least(Site.key)
        for address in (*addresses, _ANYWHERE):
            site = self.sites.get(address)
            if site is not None:
                self._contested.add(site, site.key())

    def next(self, is_open: Callable[[str], bool]) -> Lane | None:
        """Return the lane whose next request is the next of the band, or None.

        Args:
            is_open: says whether the endpoint of this address has a free slot.
        """
        lane = self._open.first()
        if self._untried.flows:
            lane = _before(self._untried.first(), lane)
        if self.sites:
            lane = _before(self._first_parked(self._contested, is_open), lane)
        return lane

    def _first_parked(self, contested: Least[Site], is_open: Callable[[str], bool]) -> Lane | None:
        while (site := contested.first()) is not None:
            if site.address == _ANYWHERE or is_open(site.address):
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
                site = self.sites[address] = Site(address)
            site.add(lane)

    def _leave_sites(self, lane: Lane) -> None:
        for address in lane.sites:
            site = self.sites[address]
            site.discard(lane)
            if not site.flows:
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
                FlowState(flow.name, flow.requests, flow.size_bytes)
                for flow in self.flows.values()
                if flow.requests
            ),
        )


def _before(lane: Lane | None, other: Lane | None) -> Lane | None:
    """Return the one of two lanes whose turn is first."""
    if lane is None or (other is not None and other.key() < lane.key()):
        return other
    return lane


class Bands:
    """The bands of a plan.

    Attributes:
        by_name: all of them.
        all: the same, highest priority first.
        draining: whether there are some that the plan no longer names.
    """

    def __init__(self, plan: Plan) -> None:
        self.by_name = {band.name: Band(band) for band in plan.bands}
        self.all: tuple[Band, ...] = ()
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
        for band_plan in plan.bands:
            existing = self.by_name.get(band_plan.name)
            if existing is None:
                self.by_name[band_plan.name] = Band(band_plan)
            else:
                existing.reconfigure(band_plan, now)
        self._sort()

    def _sort(self) -> None:
        for name, band in list(self.by_name.items()):
            if band.draining and not band.arrival:
                del self.by_name[name]
        self.draining = any(band.draining for band in self.by_name.values())
        self.all = tuple(
            sorted(self.by_name.values(), key=lambda band: (-band.plan.priority, not band.draining))
        )

    def sweep(self) -> None:
        """Forget bands that have drained."""
        if self.draining and any(band.draining and not band.arrival for band in self.all):
            self._sort()
