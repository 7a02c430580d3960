"""Where a cap or a deadline begins to count, and what the core notes of an answer."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from forebay_control.plan import (
    BandPlan,
    Between,
    FairnessName,
    LimitsPlan,
    ModelPlan,
    Plan,
    SaturationMode,
    SaturationPlan,
)
from forebay_epp.core import levels
from forebay_epp.core.bands import SPARE_DEADLINES
from forebay_epp.core.controller import FlowController
from forebay_epp.core.terms import Dispatched, Endpoint, Outcome, Request

A = "10.0.0.1:8000"
B = "10.0.0.2:8000"
ONE_SLOT = SaturationPlan(SaturationMode.CONCURRENCY, 1)


def controller_of(*addresses, band=None, limits=None, **fields):
    plan = Plan(
        bands=(band or BandPlan("Standard", 0),),
        limits=limits or LimitsPlan(),
        saturation=ONE_SLOT,
        **fields,
    )
    controller = FlowController(plan, Random(1))
    controller.set_endpoints([Endpoint(address) for address in addresses], 0.0)
    controller.poll(0.0)
    return controller


def refusals(controller, now):
    return [
        (decision.request_id, decision.outcome)
        for decision in controller.poll(now)
        if not isinstance(decision, Dispatched)
    ]


@pytest.mark.parametrize(
    "caps",
    [
        {"limits": LimitsPlan(max_bytes=100)},
        {"band": BandPlan("Standard", 0, max_bytes=100)},
        {"band": BandPlan("Standard", 0, flow_max_bytes=100)},
    ],
    ids=["pool", "band", "flow"],
)
def test_a_cap_of_bytes_is_reached_exactly(caps):
    """A hundred bytes fit under a cap of a hundred, and not one more."""
    controller = controller_of(**caps)
    controller.submit(Request(1, "m", 60), 0.0)
    controller.submit(Request(2, "m", 40), 0.0)
    controller.submit(Request(3, "m", 1), 0.0)

    assert refusals(controller, 0.0) == [(3, Outcome.REJECTED_QUEUE_FULL)]


@pytest.mark.parametrize(
    "caps",
    [
        {"limits": LimitsPlan(max_requests=2)},
        {"band": BandPlan("Standard", 0, max_requests=2)},
        {"band": BandPlan("Standard", 0, flow_max_requests=2)},
    ],
    ids=["pool", "band", "flow"],
)
def test_a_cap_of_requests_is_reached_exactly(caps):
    """Two fit under a cap of two, and not one more."""
    controller = controller_of(**caps)
    for number in (1, 2, 3):
        controller.submit(Request(number, "m", 1), 0.0)

    assert refusals(controller, 0.0) == [(3, Outcome.REJECTED_QUEUE_FULL)]


def test_a_band_that_drains_stays_while_a_request_waits_in_it():
    """Neither an empty band of the plan nor a full one that drains is forgotten by a poll."""
    both = (BandPlan("Gold", 10), BandPlan("Standard", 0))
    plan = Plan(bands=both, models=(ModelPlan("m", "Gold"),), saturation=ONE_SLOT)
    controller = FlowController(plan, Random(1))
    for number in (1, 2):
        controller.submit(Request(number, "m", 1), 0.0)
    controller.reconfigure(Plan(bands=both[1:], saturation=ONE_SLOT), 0.0)
    controller.cancel(1, 0.0)
    controller.poll(0.0)

    bands = [(band.band, band.requests) for band in controller.state(0.0).bands]
    assert bands == [("Gold", 1), ("Standard", 0)]


# --- deadlines


def test_a_request_is_evicted_at_its_own_deadline():
    """Before the band's TTL, whatever came before it."""
    controller = controller_of(A)
    controller.submit(Request(1, "m", 1), 0.0)
    controller.submit(Request(2, "m", 1), 0.0)
    controller.submit(Request(3, "m", 1, deadline=5.0), 1.0)
    controller.poll(1.0)

    assert controller.next_wakeup() == 5.0
    assert refusals(controller, 4.9) == []
    (refused,) = controller.poll(5.0)
    assert (refused.request_id, refused.outcome) == (3, Outcome.EVICTED_TTL)
    assert refused.message == "waited 4.0 s for a free slot, longer than its deadline allows"
    assert controller.next_wakeup() == 60.0


def test_deadlines_are_kept_in_order_of_time_not_of_arrival():
    """Ten requests, each with an earlier deadline than the one before."""
    controller = controller_of()
    for number in range(10):
        controller.submit(Request(number, "m", 1, deadline=20.0 - number), 0.0)
    controller.poll(0.0)

    expired = []
    while controller.waiting:
        now = controller.next_wakeup()
        expired += [(now, number) for number, _ in refusals(controller, now)]

    assert expired == [(20.0 - number, number) for number in reversed(range(10))]


def test_a_deadline_does_not_lengthen_the_ttl():
    """The band's TTL ends the wait first."""
    controller = controller_of(A, band=BandPlan("Standard", 0, ttl_seconds=3.0))
    controller.submit(Request(1, "m", 1), 0.0)
    controller.submit(Request(2, "m", 1, deadline=100.0), 0.0)
    controller.poll(0.0)

    assert refusals(controller, 3.0) == [(2, Outcome.EVICTED_TTL)]


def test_a_deadline_that_has_passed_costs_no_slot():
    """The request is evicted although a slot is free."""
    controller = controller_of(A)
    controller.submit(Request(1, "m", 1, deadline=9.0), 10.0)

    assert refusals(controller, 10.0) == [(1, Outcome.EVICTED_TTL)]
    assert controller.state(10.0).in_flight == 0


def test_deadlines_of_requests_that_have_gone_take_no_memory():
    """However many were cancelled long before they would have expired."""
    controller = controller_of()
    controller.submit(Request(0, "m", 1), 0.0)
    for number in range(1, 1000):
        controller.submit(Request(number, "m", 1, deadline=1e6), 0.0)
        controller.cancel(number, 0.0)
    controller.poll(0.0)

    (band,) = controller._bands.all
    assert len(band._deadlines) <= SPARE_DEADLINES + 4


def test_hints_of_requests_that_have_gone_take_no_memory():
    """Nor do the lanes that waited at an endpoint."""
    controller = controller_of(A)
    controller.submit(Request(0, "m", 1), 0.0)
    controller.poll(0.0)
    for number in range(1, 1000):
        hint = frozenset({A, f"10.9.9.9:{number}"})
        controller.submit(Request(number, "m", 1, hint), 0.0)
        controller.cancel(number, 0.0)
    controller.poll(0.0)

    (band,) = controller._bands.all
    assert not band.lanes.sites
    assert all(set(flow.lanes) <= {None} for flow in band.levels.flows.values())


def test_flows_of_models_that_have_gone_take_no_memory():
    """A plan after the other, each with a model of its own that has been used."""
    controller = controller_of(A)
    for number in range(100):
        plan = Plan(bands=(BandPlan("Standard", 0),), models=(ModelPlan(f"m{number}", "Standard"),))
        controller.reconfigure(plan, 0.0)
        controller.submit(Request(number, f"m{number}", 1), 0.0)
        controller.cancel(number, 0.0)
        controller.poll(0.0)

    (band,) = controller._bands.all
    assert len(band.levels.flows) <= 2


def test_a_slot_that_a_higher_band_took_hides_no_other():
    """Two endpoints get a slot at once, and the first that Standard waits for is taken."""
    controller = FlowController(
        Plan(
            bands=(BandPlan("Critical", 1), BandPlan("Standard", 0)),
            saturation=ONE_SLOT,
            models=(ModelPlan("urgent", "Critical"),),
        ),
        Random(1),
    )
    controller.set_endpoints([Endpoint(A), Endpoint(B)], 0.0)
    for number, address in enumerate([A, B, A, B]):
        controller.submit(Request(number, "m", 1, frozenset({address})), 0.0)
        controller.poll(0.0)
    controller.submit(Request(4, "urgent", 1, frozenset({A})), 0.0)
    controller.complete(0, None, 0.0)
    controller.complete(1, None, 0.0)

    assert [decision.request_id for decision in controller.poll(0.0)] == [4, 3]


def test_slots_that_became_free_are_forgotten_once_given_away():
    """A hundred requests, one after the other."""
    controller = controller_of(A)
    for number in range(100):
        controller.submit(Request(number, "m", 1), 0.0)
        controller.poll(0.0)
        controller.complete(number, None, 0.0)
    controller.poll(0.0)

    assert controller._endpoints.opened == []


# --- what the core notes of an answer


def test_the_first_of_two_first_tokens_counts():
    """A caller that says so twice changes nothing."""
    controller = controller_of(A)
    request = Request(1, "m", 1)
    controller.submit(request, 0.0)
    controller.poll(0.0)
    controller.first_token(1, 2.0)
    controller.first_token(1, 3.0)

    assert request.first_token_at == 2.0
    controller.complete(1, None, 4.0)
    with pytest.raises(KeyError):
        controller.first_token(1, 5.0)


def test_tenants_beyond_the_cap_share_flows(monkeypatch):
    """Invented names take no memory: who waits keeps a flow, and an idle one makes room."""
    monkeypatch.setattr(levels, "MAX_TENANT_FLOWS", 10)
    plan = Plan(
        bands=(BandPlan("Standard", 0, FairnessName.ROUND_ROBIN, between=Between.TENANTS),),
        saturation=ONE_SLOT,
    )
    controller = FlowController(plan, Random(1))
    controller.set_endpoints([Endpoint(A)], 0.0)
    for number in range(2000):
        controller.submit(Request(number, "m", 1, tenant=f"t{number}"), 0.0)
    controller.poll(0.0)
    (band,) = controller._bands.all
    assert len(band.levels.flows) == 10 + levels.OVERFLOW_FLOWS
    assert sum(flow.requests for flow in band.levels.flows.values()) == 1999

    for number in range(1, 2000):
        controller.cancel(number, 0.0)
    for number in range(2000, 4000):
        controller.submit(Request(number, "m", 1, tenant=f"t{number}"), 0.0)
        controller.cancel(number, 0.0)
        controller.poll(0.0)

    assert len(band.levels.flows) <= 10 + levels.OVERFLOW_FLOWS
    assert len(band.levels._idle) == len(band.levels.flows)


def test_a_band_that_the_plan_drops_goes_before_one_that_comes_down_to_its_priority():
    """No more requests come to it, so it is over soon."""
    high = BandPlan("High", 10)
    low = BandPlan("Standard", 0)
    models = (ModelPlan("h", "High"), ModelPlan("s", "Standard"))
    plan = Plan(bands=(high, low), models=models, saturation=ONE_SLOT)
    controller = FlowController(plan, Random(1))
    controller.submit(Request(1, "h", 1, None, None, 60.0), 0.0)
    controller.submit(Request(2, "s", 1, None, None, 60.0), 0.0)
    lowered = replace(
        plan,
        bands=(replace(high, priority=0),),
        models=(ModelPlan("h", "High"), ModelPlan("s", "High")),
        unmatched=replace(plan.unmatched, band="High"),
    )
    controller.reconfigure(lowered, 1.0)

    controller.set_endpoints([Endpoint(A)], 2.0)

    assert [decision.request_id for decision in controller.poll(2.0)] == [2]
