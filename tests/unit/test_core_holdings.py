"""core/holdings.py: what an EPP reports of its flows, for slots to be divided by."""

from __future__ import annotations

import random

from forebay_control.plan import BandPlan, FairnessName, ModelPlan, Plan
from forebay_epp.core.controller import FlowController
from forebay_epp.core.holdings import MAX_FLOWS
from forebay_epp.core.terms import Request


def test_of_many_flows_those_with_the_least_requests_count_as_one():
    """A report has a bounded size, and no request is left out of it."""
    names = [f"m{number}" for number in range(MAX_FLOWS + 10)]
    band = BandPlan("Standard", 0, FairnessName.ROUND_ROBIN)
    models = tuple(ModelPlan(name, "Standard") for name in names)
    controller = FlowController(Plan(bands=(band,), models=models), random.Random(1))
    for number, name in enumerate(names):
        for copy in range(2 if number < 5 else 1):
            request = Request(2 * number + copy, name, 100, None, None, 60.0)
            controller.submit(request, 0.0)

    flows = controller.holdings().bands["Standard"].flows

    assert len(flows) == MAX_FLOWS
    assert sum(flow.waiting for flow in flows.values()) == len(names) + 5
    alone = {path for path, flow in flows.items() if flow.waiting == 2 and path}
    assert len(alone) == 5
    assert flows[()].waiting == 11
