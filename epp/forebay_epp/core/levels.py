"""The flows of a band on one or two levels, and the fairness between them.

Whose turn it is by their ranks does not belong here (lanes.py), nor how ranks come about
(fairness/).
"""

from __future__ import annotations

from collections import OrderedDict
from heapq import nlargest
from typing import TYPE_CHECKING
from zlib import crc32

from forebay_control.plan import Between
from forebay_epp.core.fairness import FAIRNESS
from forebay_epp.core.flows import Flow
from forebay_epp.core.terms import FlowState

if TYPE_CHECKING:
    from collections.abc import Mapping

    from forebay_control.plan import BandPlan, Plan
    from forebay_epp.core.terms import Cost, Request

MAX_TENANT_FLOWS = 4096  # of a band: tenants are names that callers choose
OVERFLOW_FLOWS = 64  # that tenants beyond these share

Path = tuple[str, ...]
Weights = dict[Between, "Mapping[str, int]"]


def weights_of(plan: Plan) -> Weights:
    """Return the weights that are not 1, by name."""
    return {
        Between.MODELS: {model.name: model.weight for model in plan.models if model.weight != 1},
        Between.TENANTS: {tenant.name: tenant.weight for tenant in plan.tenants},
    }


class Levels:
    """The flows of one band.

    Args:
        plan: the band's.
        weights: of models and tenants.

    Attributes:
        count: of levels, one or two.
        flows: those of the innermost level, by the names of the levels. One that has nothing
            waiting stays until the next plan, or until tenants need its place.
        of_tenants: whether the flows of the innermost level are tenants.
    """

    __slots__ = (
        *("_between", "_fairness", "_idle", "_inner", "_outer", "_tenanted", "_weights"),
        *("count", "flows", "of_tenants"),
    )

    def __init__(self, plan: BandPlan, weights: Weights) -> None:
        self.count = 1 if plan.inner is None else 2
        self.flows: dict[Path, Flow] = {}
        self.of_tenants = (plan.between is Between.TENANTS) is (plan.inner is None)
        self._tenanted = self.of_tenants or self.count == 2
        self._between = plan.between
        self._fairness = FAIRNESS[plan.fairness]()
        self._inner = plan.inner
        self._weights = weights
        self._outer: dict[str, Flow] = {}
        self._idle: OrderedDict[Path, Flow] = OrderedDict()  # of tenants, the longest idle first

    def reweigh(self, weights: Weights) -> None:
        """Take new weights, which count from the next charge on; forget flows that are idle."""
        self._weights = weights
        for path, flow in list(self.flows.items()):
            if not flow.requests:
                self._forget(path, flow)
            flow.weight = self._weight(self.count - 1, flow.name)
        for flow in self._outer.values():
            flow.weight = self._weight(0, flow.name)

    def path(self, request: Request) -> Path:
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

    def join(self, request: Request, now: float) -> Flow:
        """Count a request in the flow of its path, made where there is none, and activate that."""
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

    def leave(self, request: Request, flow: Flow) -> None:
        """Count a request in its flow no more."""
        flow.requests -= 1
        flow.size_bytes -= request.size_bytes
        if flow.outer is not None:
            flow.outer.requests -= 1
        if self._tenanted and not flow.requests:
            self._idle[request.path] = flow

    def charge(self, flow: Flow, cost: Cost, now: float) -> None:
        """Charge a flow, and the one around it."""
        outer = flow.outer
        if outer is None:
            self._fairness.charge(flow, cost, now)
        else:
            self._fairness.charge(outer, cost, now)
            if outer.fairness is not None:
                outer.fairness.charge(flow, cost, now)

    def states(self, maximum: int | None = None) -> tuple[int, tuple[FlowState, ...]]:
        """Return in how many flows something waits, and a copy of their state.

        Where there are more than the maximum, the state of the longest.
        """
        waiting = [entry for entry in self.flows.items() if entry[1].requests]
        chosen = waiting
        if maximum is not None and len(waiting) > maximum:
            chosen = nlargest(maximum, waiting, key=lambda entry: entry[1].requests)
        return len(waiting), tuple(self._state(path, flow) for path, flow in chosen)

    def _state(self, path: Path, flow: Flow) -> FlowState:
        first, second = path[0], path[1] if len(path) > 1 else None
        model, tenant = (first, second) if self._between is Between.MODELS else (second, first)
        return FlowState(model, flow.requests, flow.size_bytes, tenant)

    def _ordered(self, model: str, tenant: str) -> Path:
        """Return the names in the order of the levels."""
        if self._between is Between.MODELS:
            return model, tenant
        return (tenant,) if self._inner is None else (tenant, model)

    def _made(self, path: Path) -> Flow:
        """Return a new flow, which may take the place of the one that has been idle longest."""
        if self._idle and len(self.flows) >= MAX_TENANT_FLOWS:
            self._forget(*self._idle.popitem(last=False))
        outer = None
        if self._inner is not None:
            name = path[0]
            outer = self._outer.get(name)
            if outer is None:
                policy = FAIRNESS[self._inner.fairness]()
                outer = self._outer[name] = Flow(name, self._weight(0, name), fairness=policy)
            outer.flows += 1
        flow = self.flows[path] = Flow(path[-1], self._weight(self.count - 1, path[-1]), outer)
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
        models = (self._between is Between.MODELS) is (level == 0)
        return self._weights[Between.MODELS if models else Between.TENANTS].get(name, 1)
