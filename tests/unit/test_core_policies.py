"""A policy is added as CONTRIBUTING.md says: one class and a line in a table."""
# ruff: noqa: ARG002  # a toy is told more than it uses

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from forebay_control.plan import (
    BandPlan,
    FairnessName,
    ModelPlan,
    Plan,
    SaturationMode,
    SaturationPlan,
    ScorerName,
    ScorerPlan,
    SelectionPlan,
    UnmatchedPlan,
)
from forebay_epp.core import selection
from forebay_epp.core.controller import FlowController
from forebay_epp.core.fairness import FAIRNESS
from forebay_epp.core.terms import Dispatched, Endpoint, Request, Usage

A, B = "10.0.0.1:8000", "10.0.0.2:8000"


class FewestTokens:
    """A toy fairness policy: the flow that has produced the fewest tokens is next."""

    def __init__(self):
        self._tokens = {}

    def activate(self, flow, now):
        flow.rank = self._tokens.get(flow.name, 0)

    def charge(self, flow, cost, now):
        self._tokens[flow.name] = self._tokens.get(flow.name, 0) + cost.completion_tokens
        flow.rank = self._tokens[flow.name]


def controller_of(*models, slots=1, addresses=(A,)):
    plan = Plan(
        bands=(BandPlan("Standard", 0, FairnessName.ROUND_ROBIN),),
        models=tuple(ModelPlan(name, "Standard") for name in models),
        saturation=SaturationPlan(SaturationMode.CONCURRENCY, slots),
    )
    controller = FlowController(plan, Random(1))
    controller.set_endpoints([Endpoint(address) for address in addresses], 0.0)
    return controller


def test_a_toy_fairness_policy_is_one_class_and_a_line(monkeypatch):
    """Ten tokens an answer of one model, one of the other: ten answers of that for one of this."""
    monkeypatch.setitem(FAIRNESS, FairnessName.ROUND_ROBIN, FewestTokens)
    controller = controller_of("long", "short")
    for number in range(60):
        controller.submit(Request(number, "long" if number < 30 else "short", 1), 0.0)
    served = []
    for _ in range(33):
        (decision,) = controller.poll(0.0)
        model = "long" if decision.request_id < 30 else "short"
        served.append(model)
        tokens = 10 if model == "long" else 1
        controller.complete(decision.request_id, Usage(5, tokens), 0.0)

    assert served[:13] == ["long", *["short"] * 10, "long", "short"]
    assert served.count("long") == 3


def test_a_flow_is_charged_when_nothing_of_it_waits(monkeypatch):
    """Its answer ends later, and its next request comes after that."""
    monkeypatch.setitem(FAIRNESS, FairnessName.ROUND_ROBIN, FewestTokens)
    controller = controller_of("long", "short")
    controller.submit(Request(1, "long", 1), 0.0)
    controller.poll(0.0)
    controller.submit(Request(2, "long", 1), 0.0)
    controller.cancel(2, 0.0)
    controller.complete(1, Usage(1, 100), 0.0)
    controller.submit(Request(3, "short", 1), 0.0)
    controller.submit(Request(4, "long", 1), 0.0)
    controller.submit(Request(5, "short", 1), 0.0)

    order = []
    for _ in range(2):
        decisions = [d for d in controller.poll(0.0) if isinstance(d, Dispatched)]
        order += [decision.request_id for decision in decisions]
        controller.complete(order[-1], Usage(1, 1), 0.0)

    assert order == [3, 5]


def test_tokens_do_not_cost_a_turn_of_round_robin():
    """Of two flows with one dispatch each, the one that was first is, whatever it was charged."""
    controller = controller_of("a", "b", slots=2)
    for number, model in enumerate(["a", "b", "a", "b"]):
        controller.submit(Request(number, model, 1), 0.0)
    controller.poll(0.0)

    controller.complete(0, Usage(100, 100), 0.0)

    assert [decision.request_id for decision in controller.poll(0.0)] == [2]


def test_a_charge_for_a_band_that_is_gone_is_dropped():
    """The plan changed while the answer was on its way."""
    controller = controller_of("m")
    controller.submit(Request(1, "m", 1), 0.0)
    controller.poll(0.0)
    other = Plan(bands=(BandPlan("Other", 0),), unmatched=UnmatchedPlan(band="Other"))
    controller.reconfigure(other, 0.0)
    controller.poll(0.0)

    controller.complete(1, Usage(1, 1), 0.0)

    assert controller.state(0.0).in_flight == 0


def test_answers_to_what_another_policy_dispatched_earn_nothing():
    """Of two flows that wait when TokenFair begins, both get as much from then on.

    Answers of the one are on their way, and shorter than was expected when FCFS dispatched them.
    """
    controller = controller_of("a", "b", slots=8)
    (band,) = controller.plan.bands
    first, then = (
        replace(controller.plan, bands=(replace(band, fairness=fairness),))
        for fairness in (FairnessName.FCFS, FairnessName.TOKEN_FAIR)
    )
    controller.reconfigure(first, 0.0)
    for number in range(60):
        controller.submit(Request(number, "a" if number < 30 else "b", 1), 0.0)
    assert [decision.request_id for decision in controller.poll(0.0)] == list(range(8))

    controller.reconfigure(then, 0.0)
    for number in range(8):
        controller.complete(number, Usage(0, 1), 0.0)

    order = [decision.request_id for decision in controller.poll(0.0)]
    assert order == [8, 30, 9, 31, 10, 32, 11, 33]


class Second:
    """A toy scorer: likes the second server, and sees the request."""

    def __init__(self, pool):
        """It has no use for the pool."""

    def score(self, request, endpoints, now):
        liked = B if request.model == "b" else A
        return [float(endpoint.address == liked) for endpoint in endpoints]


@pytest.mark.parametrize(("weight", "expected"), [(1, A), (50, B)])
def test_a_toy_scorer_is_one_class_and_a_line(monkeypatch, weight, expected):
    """Against an endpoint that is half full, its weight decides."""
    monkeypatch.setitem(selection.SCORERS, ScorerName.KV_CACHE_USAGE, Second)
    controller = controller_of("b", slots=2, addresses=(A, B))
    weights = {ScorerName.LOAD: 10, ScorerName.KV_CACHE_USAGE: weight}
    scorers = tuple(ScorerPlan(*pair) for pair in weights.items())
    controller.reconfigure(replace(controller.plan, selection=SelectionPlan(scorers)), 0.0)
    controller.submit(Request(1, "b", 1, frozenset({B})), 0.0)
    controller.submit(Request(2, "b", 1), 0.0)

    _, decision = controller.poll(0.0)

    assert decision.endpoint == expected


class NotForBatch:
    """A toy filter: keeps one server free of batch."""

    def keep(self, request, endpoints, now):
        return [e for e in endpoints if request.model != "batch" or e.address != A]


def test_a_toy_filter_is_one_class_and_a_line(monkeypatch):
    """A request that it keeps from every free endpoint waits for the next slot, in no one's way."""
    monkeypatch.setattr(selection, "FILTERS", (NotForBatch,))
    controller = controller_of("batch", "chat", addresses=(A, B))
    for number in range(2):
        controller.submit(Request(number, "batch", 1), 0.0)
    (decision,) = controller.poll(0.0)
    assert (decision.request_id, decision.endpoint) == (0, B)

    controller.submit(Request(2, "chat", 1), 0.0)
    (decision,) = controller.poll(0.0)
    assert (decision.request_id, decision.endpoint) == (2, A)

    controller.complete(0, None, 0.0)
    (decision,) = controller.poll(0.0)
    assert (decision.request_id, decision.endpoint) == (1, B)
