"""RoundRobin against an allocation computed another way."""

from __future__ import annotations

from fractions import Fraction
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from forebay_control.plan import (
    BandPlan,
    FairnessName,
    ModelPlan,
    Plan,
    SaturationMode,
    SaturationPlan,
)
from forebay_epp.core.controller import FlowController
from forebay_epp.core.terms import Dispatched, Endpoint, Request

ADDRESS = "10.0.0.1:8000"


def max_min(demands: list[int], capacity: int) -> list[Fraction]:
    """Fill all flows at the same speed and stop each at its demand (water filling).

    Goes over the flows by size of demand: each takes an equal share of what is left, or all it
    wants when that is less. Not how RoundRobin works, so that it can judge it.
    """
    shares = [Fraction(0)] * len(demands)
    left = Fraction(capacity)
    by_demand = sorted(range(len(demands)), key=lambda flow: demands[flow])
    for position, flow in enumerate(by_demand):
        shares[flow] = min(Fraction(demands[flow]), left / (len(demands) - position))
        left -= shares[flow]
    return shares


def dispatched_by_flow(
    arrivals: list[int], flows: int, capacity: int, slots: int, fairness: FairnessName
) -> list[int]:
    """Queue everything, then give `capacity` slots away, `slots` at a time."""
    plan = Plan(
        bands=(BandPlan("Standard", 0, fairness=fairness),),
        models=tuple(ModelPlan(f"model-{flow}", "Standard") for flow in range(flows)),
        saturation=SaturationPlan(SaturationMode.CONCURRENCY, max_concurrency=slots),
    )
    controller = FlowController(plan, Random(1))
    for number, flow in enumerate(arrivals):
        controller.submit(Request(number, f"model-{flow}", 1), 0.0)
    counts = [0] * flows
    controller.poll(0.0)
    controller.set_endpoints([Endpoint(ADDRESS)], 0.0)
    while capacity > 0:
        # The last round must not give away more than the capacity that is left.
        if slots > capacity:
            controller.reconfigure(
                Plan(
                    bands=plan.bands,
                    saturation=SaturationPlan(SaturationMode.CONCURRENCY, capacity),
                ),
                0.0,
            )
        decisions = controller.poll(0.0)
        if not decisions:
            break
        for decision in decisions:
            assert isinstance(decision, Dispatched)
            counts[arrivals[decision.request_id]] += 1
            controller.complete(decision.request_id, None, 0.0)
        capacity -= len(decisions)
    return counts


@settings(max_examples=150, deadline=None)
@given(
    demands=st.lists(st.integers(0, 30), min_size=1, max_size=8),
    capacity=st.integers(0, 150),
    slots=st.integers(1, 12),
    shuffle=st.randoms(use_true_random=False),
)
def test_round_robin_dispatches_the_max_min_share_of_each_flow(demands, capacity, slots, shuffle):
    """Within one request, whatever the order of arrival and the number of slots."""
    arrivals = [flow for flow, demand in enumerate(demands) for _ in range(demand)]
    shuffle.shuffle(arrivals)

    counts = dispatched_by_flow(arrivals, len(demands), capacity, slots, FairnessName.ROUND_ROBIN)

    assert sum(counts) == min(capacity, len(arrivals))
    for count, share in zip(counts, max_min(demands, capacity), strict=True):
        assert abs(count - share) < 1


def test_first_come_first_served_is_not_max_min():
    """The judge tells the policies apart: under FCFS the flood takes everything."""
    arrivals = [0] * 20 + [1] * 20

    counts = dispatched_by_flow(arrivals, 2, 20, 4, FairnessName.FCFS)

    assert counts == [20, 0]
    assert max_min([20, 20], 20) == [10, 10]


def served(arrivals: list[tuple[str, frozenset[str] | None]], *addresses: str) -> list[str]:
    """Queue requests of these models and hints, give one slot after another away, return whose."""
    plan = Plan(
        bands=(BandPlan("Standard", 0, fairness=FairnessName.ROUND_ROBIN),),
        models=tuple(
            ModelPlan(name, "Standard") for name in sorted({name for name, _ in arrivals})
        ),
        saturation=SaturationPlan(SaturationMode.CONCURRENCY, max_concurrency=1),
    )
    controller = FlowController(plan, Random(1))
    for number, (name, subset) in enumerate(arrivals):
        controller.submit(Request(number, name, 1, subset), 0.0)
    controller.poll(0.0)
    controller.set_endpoints([Endpoint(address) for address in addresses], 0.0)
    names = []
    while decisions := controller.poll(0.0):
        for decision in decisions:
            assert isinstance(decision, Dispatched)
            names.append(arrivals[decision.request_id][0])
            controller.complete(decision.request_id, None, 0.0)
    return names


def test_a_flood_with_a_subset_hint_does_not_push_in_before_another_flow():
    """The hint splits the queue into lanes, and fairness is between flows all the same."""
    names = served([("flood", frozenset({ADDRESS}))] * 50 + [("chat", None)] * 5, ADDRESS)

    assert names[:10] == ["flood", "chat"] * 5


def test_a_flow_gets_no_more_turns_for_having_many_different_hints():
    """Fifty lanes of one flow against one lane of the other."""
    flood = [("flood", frozenset({ADDRESS, f"10.9.9.{number}:8000"})) for number in range(50)]

    assert served([*flood, *[("chat", None)] * 5], ADDRESS)[:10] == ["flood", "chat"] * 5
