"""Who waits where: bands, the flows in them, and which request belongs to which.

Counts, caps and deadlines of queues; deciding when to dispatch, and to where, is the controller's.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TYPE_CHECKING

from forebay_control.plan import UnmatchedAction
from forebay_epp.core import fairness, ordering
from forebay_epp.core.terms import BandSnapshot, FlowSnapshot

if TYPE_CHECKING:
    from collections.abc import Collection

    from forebay_control.plan import BandPlan, ModelPlan, Plan
    from forebay_epp.core.terms import RandomSource, Request

UNMATCHED_FLOW = ""  # no model has this name
DRAIN_RATE_SECONDS = 10.0
MAX_RETRY_AFTER_SECONDS = 60

Subset = frozenset[str] | None


class Flow:
    """What one flow holds in one band."""

    __slots__ = ("requests", "size_bytes")

    def __init__(self) -> None:
        self.requests = 0
        self.size_bytes = 0


class Band:
    """The queue of one priority.

    Requests that may go to the same endpoints compete in one lane, which the band's fairness
    policy orders; there is one lane but for requests with a subset hint. `arrival` holds the same
    requests by age: deadlines are the same time after arrival for all, so the first of it is the
    first to expire and no timer structure is needed.
    """

    __slots__ = (
        "_drained",
        "_drained_at",
        "_lanes",
        "arrival",
        "draining",
        "flows",
        "plan",
        "size_bytes",
    )

    def __init__(self, plan: BandPlan) -> None:
        self.plan = plan
        self.draining = False
        self.arrival: OrderedDict[int, Request] = OrderedDict()
        self.flows: dict[str, Flow] = {}
        self.size_bytes = 0
        self._lanes: dict[Subset, fairness.Fairness] = {}
        self._drained = 0.0
        self._drained_at = 0.0

    def reconfigure(self, plan: BandPlan) -> None:
        """Take a new plan; waiting requests are reordered where the policies have changed."""
        policies = (self.plan.fairness, self.plan.ordering)
        self.plan = plan
        self.draining = False
        if policies != (plan.fairness, plan.ordering):
            self._lanes.clear()
            for request in self.arrival.values():
                self._lane(request.subset).push(request)

    def _lane(self, subset: Subset) -> fairness.Fairness:
        lane = self._lanes.get(subset)
        if lane is None:
            order = ordering.ORDERINGS[self.plan.ordering]
            lane = self._lanes[subset] = fairness.FAIRNESS[self.plan.fairness](order)
        return lane

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

    def push(self, request: Request) -> None:
        """Queue the request."""
        flow = self.flows.get(request.flow)
        if flow is None:
            flow = self.flows[request.flow] = Flow()
        flow.requests += 1
        flow.size_bytes += request.size_bytes
        self.size_bytes += request.size_bytes
        self.arrival[request.id] = request
        self._lane(request.subset).push(request)

    def candidates(self) -> list[tuple[Request, Subset]]:
        """Return the next request of each lane, oldest first."""
        if len(self._lanes) == 1:
            ((subset, lane),) = self._lanes.items()
            return [(lane.head(), subset)]
        heads = [(lane.head(), subset) for subset, lane in self._lanes.items()]
        heads.sort(key=lambda head: (head[0].enqueued_at, head[0].id))
        return heads

    def pop(self, subset: Subset, now: float) -> Request:
        """Take out the lane's next request because it is dispatched now."""
        lane = self._lanes[subset]
        request = lane.pop()
        if not lane:
            del self._lanes[subset]
        self._drained = self._drained * self._decay(now) + 1.0
        self._drained_at = now
        self._forget(request)
        return request

    def remove(self, request: Request) -> None:
        """Take out this request without dispatching it."""
        lane = self._lanes[request.subset]
        lane.remove(request)
        if not lane:
            del self._lanes[request.subset]
        self._forget(request)

    def _forget(self, request: Request) -> None:
        del self.arrival[request.id]
        self.size_bytes -= request.size_bytes
        flow = self.flows[request.flow]
        flow.requests -= 1
        flow.size_bytes -= request.size_bytes
        if not flow.requests:
            del self.flows[request.flow]

    def _decay(self, now: float) -> float:
        return math.exp((self._drained_at - now) / DRAIN_RATE_SECONDS)

    def drain_rate(self, now: float) -> float:
        """Dispatches per second, exponentially averaged over about 10 s."""
        return self._drained * self._decay(now) / DRAIN_RATE_SECONDS

    def retry_after_seconds(self, now: float) -> int:
        """Return the seconds until what waits now has drained at the measured rate, 1 to 60."""
        waiting = len(self.arrival)
        if not waiting:
            return 1
        rate = self.drain_rate(now)
        if rate * MAX_RETRY_AFTER_SECONDS <= waiting:
            return MAX_RETRY_AFTER_SECONDS
        return max(1, math.ceil(waiting / rate))

    def snapshot(self, now: float) -> BandSnapshot:
        """Copy the band's state."""
        oldest = next(iter(self.arrival.values()), None)
        return BandSnapshot(
            band=self.plan.name,
            priority=self.plan.priority,
            requests=len(self.arrival),
            size_bytes=self.size_bytes,
            oldest_seconds=now - oldest.enqueued_at if oldest else 0.0,
            drain_rate=self.drain_rate(now),
            draining=self.draining,
            flows=tuple(
                FlowSnapshot(name, flow.requests, flow.size_bytes)
                for name, flow in self.flows.items()
            ),
        )


class Registry:
    """The bands of a plan, highest priority first, and the models that lead to them."""

    def __init__(self, plan: Plan, random: RandomSource) -> None:
        self._random = random
        self._by_name: dict[str, Band] = {}
        self._models: dict[str, ModelPlan] = {}
        self._targeting: dict[str, ModelPlan] = {}
        self._objectives: dict[str, str] = {}
        self.bands: tuple[Band, ...] = ()
        self.reconfigure(plan)

    def reconfigure(self, plan: Plan) -> None:
        """Take a new, valid plan.

        A band that it no longer names drains in its old place, before a new one of the same
        priority: who waits there came first, and there are no more of them.
        """
        self._unmatched_band = (
            plan.unmatched.band if plan.unmatched.action is UnmatchedAction.QUEUE else None
        )
        self._models = {model.name: model for model in plan.models}
        self._targeting = _targeting(plan)
        self._objectives = (
            {objective.name: objective.band for objective in plan.objectives}
            if plan.trust_objective_header
            else {}
        )
        wanted = {band.name for band in plan.bands}
        for name, band in list(self._by_name.items()):
            if name not in wanted:
                band.draining = True
        for band_plan in plan.bands:
            existing = self._by_name.get(band_plan.name)
            if existing is None:
                self._by_name[band_plan.name] = Band(band_plan)
            else:
                existing.reconfigure(band_plan)
        self._sort()

    def _sort(self) -> None:
        for name, band in list(self._by_name.items()):
            if band.draining and not band.arrival:
                del self._by_name[name]
        self.bands = tuple(
            sorted(
                self._by_name.values(), key=lambda band: (-band.plan.priority, not band.draining)
            )
        )

    def sweep(self) -> None:
        """Forget bands that have drained."""
        if any(band.draining and not band.arrival for band in self.bands):
            self._sort()

    def band(self, name: str) -> Band:
        """Return the band of this name."""
        return self._by_name[name]

    def classify(self, request: Request) -> Band | None:
        """Find the request's band and flow, and write them on it.

        A model of the plan is a flow of its own. A name that models of the plan are rewritten to
        joins the least critical of them: whoever asks for it directly gets no better band than
        those it is configured for. Every other name, and none, is in one flow: names come from
        callers, and invented ones must not take turns.

        Returns:
            The band, or None when the plan rejects unmatched models and this is one.
        """
        model = self._models.get(request.model) or self._targeting.get(request.model)
        if model is not None:
            name, request.flow = model.band, model.name
        else:
            if self._unmatched_band is None:
                return None
            name, request.flow = self._unmatched_band, UNMATCHED_FLOW
        if request.objective:
            name = self._objectives.get(request.objective, name)
        request.band = name
        return self._by_name[name]

    def draw_target(self, model_name: str) -> str | None:
        """Draw the name to send upstream by weight, or None to keep the client's.

        A name that is only a target is kept: the client has chosen already.
        """
        model = self._models.get(model_name)
        if model is None or not model.targets:
            return None
        drawn = self._random.randrange(sum(target.weight for target in model.targets))
        for target in model.targets:
            drawn -= target.weight
            if drawn < 0:
                return target.name if target.name != model_name else None
        raise AssertionError("weights are positive")

    def waiting(self) -> Collection[Band]:
        """Return the bands with waiting requests, highest priority first."""
        return [band for band in self.bands if band.arrival]


def _targeting(plan: Plan) -> dict[str, ModelPlan]:
    """Return by target name the model of the lowest band that targets it, the first of equals."""
    priorities = {band.name: band.priority for band in plan.bands}
    found: dict[str, ModelPlan] = {}
    for model in sorted(plan.models, key=lambda model: priorities[model.band]):
        for target in model.targets:
            found.setdefault(target.name, model)
    return found
