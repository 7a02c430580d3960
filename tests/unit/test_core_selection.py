"""Which endpoint a request goes to: scorers, pickers, and a plan that changes them."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from forebay_control.plan import (
    BandPlan,
    PickerName,
    Plan,
    PlanError,
    SaturationMode,
    SaturationPlan,
    ScorerName,
    ScorerPlan,
    SelectionPlan,
)
from forebay_epp.core.controller import FlowController
from forebay_epp.core.endpoints import EndpointSet
from forebay_epp.core.selection.pickers import PowerOfTwo
from forebay_epp.core.selection.scorers import KVCacheUsage
from forebay_epp.core.terms import Dispatched, Endpoint, EndpointMetrics, Request

ADDRESSES = [f"10.0.0.{number}:8000" for number in range(4)]
A, B, C, D = ADDRESSES
KV = SelectionPlan((ScorerPlan(ScorerName.KV_CACHE_USAGE),))
SATURATION = SaturationPlan(SaturationMode.CONCURRENCY, 10)


def page(address, kv_usage, at=0.0):
    return EndpointMetrics(address, 0, 0, kv_usage, at)


def controller_of(selection):
    plan = Plan(bands=(BandPlan("Standard", 0),), saturation=SATURATION, selection=selection)
    controller = FlowController(plan, Random(1))
    controller.set_endpoints(map(Endpoint, ADDRESSES), 0.0)
    return controller


def chosen(controller, number, now=0.0):
    controller.submit(Request(number, "m", 1), now)
    (decision,) = controller.poll(now)
    assert isinstance(decision, Dispatched)
    return decision.endpoint


def test_kv_cache_usage_rates_the_emptiest_best_and_the_unknown_as_full():
    """1 - usage of a scrape that is still believed."""
    pool = EndpointSet(SATURATION)
    pool.replace(map(Endpoint, ADDRESSES), 0.0)
    for address, usage, at in [(A, 0.25, 10.0), (B, 1.0, 10.0), (C, None, 10.0), (D, 0.5, 1.0)]:
        pool.observe(page(address, usage, at), 10.0)
    pool.elapse(10.0)

    scores = KVCacheUsage(pool).score(Request(1, "m", 1), pool.present, 10.0)

    assert scores == [0.75, 0.0, 0.0, 0.0]


def test_a_plan_names_the_scorers_and_may_change_them():
    """By load the endpoint that is in use comes last, by KV cache the one that is the emptiest."""
    controller = controller_of(KV)
    for address in ADDRESSES:
        controller.observe(page(address, 0.1 if address == C else 0.6), 0.0)

    assert [chosen(controller, number) for number in range(3)] == [C, C, C]
    controller.reconfigure(replace(controller.plan, selection=SelectionPlan()), 0.0)

    assert {chosen(controller, number) for number in range(10, 13)} == {A, B, D}


def test_weights_decide_between_scorers():
    """Half of the slots taken weigh as much as half of the cache, times the weights."""
    for weight, expected in [(1, A), (9, B)]:
        scorers = (ScorerPlan(ScorerName.LOAD, 3), ScorerPlan(ScorerName.KV_CACHE_USAGE, weight))
        controller = controller_of(SelectionPlan(scorers))
        controller.set_endpoints([Endpoint(A), Endpoint(B)], 0.0)
        controller.observe(page(A, 0.5), 0.0)
        controller.observe(page(B, 0.0), 0.0)
        for number in range(5):
            controller.submit(Request(number, "m", 1, frozenset({B})), 0.0)
        controller.poll(0.0)

        assert chosen(controller, 9) == expected


def test_power_of_two_takes_the_better_of_two():
    """Never the worst of several, and each of the others in its turn."""
    picker = PowerOfTwo(Random(1))
    scores = [0.1, 0.9, 0.5, 0.0]

    picked = [picker.pick(ADDRESSES, scores) for _ in range(200)]

    assert D not in picked
    assert picked.count(B) > picked.count(C) > picked.count(A) > 0


def test_power_of_two_of_one_is_that():
    """It draws no lot."""
    assert PowerOfTwo(Random(1)).pick([A], [0.0]) == A


@pytest.mark.parametrize(
    ("selection", "path"),
    [
        (SelectionPlan(()), "selection.scorers"),
        (SelectionPlan((ScorerPlan(ScorerName.LOAD), ScorerPlan(ScorerName.LOAD))), "scorers[1]"),
        (SelectionPlan((ScorerPlan(ScorerName.LOAD, 0),)), "selection.scorers[0].weight"),
    ],
)
def test_a_plan_with_a_wrong_selection_is_refused(selection, path):
    """The error names the field."""
    with pytest.raises(PlanError) as refused:
        Plan(selection=selection).validate()

    assert path in str(refused.value)


def test_the_default_picker_draws_among_equals():
    """Over several seeds an idle pool's endpoints all come first at some time."""
    first = set()
    for seed in range(30):
        controller = FlowController(Plan(saturation=SATURATION), Random(seed))
        controller.set_endpoints(map(Endpoint, ADDRESSES), 0.0)
        first.add(chosen(controller, 1))

    assert controller.plan.choice.picker is PickerName.MAX_SCORE
    assert first == set(ADDRESSES)
