"""Small facts of the core: plans, flow names, Retry-After, ties, slots, cost."""

from __future__ import annotations

import sys
from random import Random

import pytest

from forebay_control.plan import (
    BandPlan,
    FairnessName,
    LimitsPlan,
    ModelPlan,
    Plan,
    PlanError,
    SaturationMode,
    SaturationPlan,
    SelectionPlan,
)
from forebay_epp.core.classification import UNMATCHED_FLOW
from forebay_epp.core.controller import MAX_RETRY_AFTER_SECONDS, FlowController
from forebay_epp.core.endpoints import EndpointSet
from forebay_epp.core.selection import Miss, Selection
from forebay_epp.core.terms import (
    Dispatched,
    Endpoint,
    EndpointMetrics,
    Outcome,
    Refused,
    Request,
    Verdict,
)
from forebay_epp.core.tracked import TrackedEndpoint

A = "10.0.0.1:8000"
B = "10.0.0.2:8000"
ONE_BAND = (BandPlan("Standard", 0),)


def concurrency(limit):
    return SaturationPlan(SaturationMode.CONCURRENCY, limit)


def controller_of(plan, *addresses):
    controller = FlowController(plan, Random(7))
    controller.set_endpoints([Endpoint(address) for address in addresses], 0.0)
    controller.poll(0.0)
    return controller


def test_an_invalid_plan_leaves_the_one_in_force():
    """A reconfiguration is whole or not at all."""
    controller = controller_of(Plan())

    with pytest.raises(PlanError):
        controller.reconfigure(Plan(bands=()), 0.0)

    assert controller.plan == Plan()


def test_an_id_in_use_is_refused():
    """Two requests of one id could not be told apart in decisions."""
    controller = controller_of(Plan())
    controller.submit(Request(1, "m", 1), 0.0)

    with pytest.raises(ValueError, match="request id 1 is in use"):
        controller.submit(Request(1, "m", 1), 0.0)


def test_completing_what_is_not_in_flight_is_an_error():
    """A caller that completes twice has lost count."""
    controller = controller_of(Plan(), A)
    controller.submit(Request(1, "m", 1), 0.0)
    controller.poll(0.0)
    controller.complete(1, None, 0.0)

    with pytest.raises(KeyError):
        controller.complete(1, None, 0.0)


def test_invented_names_are_one_flow_whatever_they_are():
    """Model names are the clients' choice: they make no flows, and none is like a model's."""
    plan = Plan(bands=ONE_BAND, models=(ModelPlan("chat", "Standard"),))
    controller = controller_of(plan)
    names = ["", "\ud800", "unmatched", "CHAT", *(f"model-{number}" for number in range(1000))]
    for number, name in enumerate(names):
        controller.submit(Request(number, name, 1), 0.0)
    controller.submit(Request(len(names), "chat", 1), 0.0)

    flows = controller.state(0.0).bands[0].flows
    assert {flow.model: flow.requests for flow in flows} == {UNMATCHED_FLOW: len(names), "chat": 1}


def test_a_model_that_leaves_the_plan_keeps_what_waits_in_its_flow():
    """New requests of that name are unmatched."""
    with_chat = Plan(bands=ONE_BAND, models=(ModelPlan("chat", "Standard"),))
    controller = controller_of(with_chat)
    controller.submit(Request(1, "chat", 1), 0.0)
    controller.reconfigure(Plan(bands=ONE_BAND), 0.0)
    controller.submit(Request(2, "chat", 1), 0.0)

    flows = controller.state(0.0).bands[0].flows
    assert {flow.model: flow.requests for flow in flows} == {"chat": 1, UNMATCHED_FLOW: 1}


@pytest.mark.parametrize(
    ("slot_seconds", "expected"),
    [
        (None, 1),  # all have just begun
        (0.01, 1),  # less than a second
        (9.5, 50),  # 0.4/s
        (100.0, MAX_RETRY_AFTER_SECONDS),  # 525 s
    ],
)
def test_retry_after_is_the_predicted_wait(slot_seconds, expected):
    """Behind twenty, with four slots that each answer keeps for so long; 1 to 60."""
    plan = Plan(bands=(BandPlan("Standard", 0, max_requests=20),), saturation=concurrency(4))
    controller = controller_of(plan, A)
    if slot_seconds is not None:
        controller.submit(Request(1, "m", 1), 0.0)
        controller.poll(0.0)
        controller.complete(1, None, slot_seconds, Verdict.GOOD)
    now = slot_seconds or 0.0
    for number in range(2000, 2024):
        controller.submit(Request(number, "m", 1), now)
        controller.poll(now)
    controller.submit(Request(3000, "m", 1), now)

    (refused,) = controller.poll(now)

    assert refused.retry_after_seconds == expected


def test_retry_after_of_an_empty_band_is_one_second():
    """A request that is too large for an empty queue gets the shortest Retry-After."""
    plan = Plan(bands=(BandPlan("Standard", 0, max_bytes=10),))
    controller = controller_of(plan, A)
    controller.submit(Request(1, "m", 11), 0.0)

    (refused,) = controller.poll(0.0)

    assert refused.retry_after_seconds == 1


class Lots:
    """Draws what it was told, and remembers among how many."""

    def __init__(self, drawn):
        self.drawn = drawn
        self.stops = []

    def randrange(self, stop, /):
        self.stops.append(stop)
        return self.drawn


def endpoint_with(address, limit, taken):
    state = TrackedEndpoint(Endpoint(address), concurrency(limit), 0.0)
    for _ in range(taken):
        state.dispatched(Request(1, "m", 1), 0.0)
    return state


class Pool(EndpointSet):
    """Endpoints as the test has made them, in a pool whose largest limit is 8."""

    def __init__(self, states):
        super().__init__(SaturationPlan())
        for state in states:
            self._moved(state)
        self.largest_limit = 8


def picked(*states, lot=0):
    lots = Lots(lot)
    state = Selection(Pool(states), SelectionPlan(), lots).pick(Request(1, "m", 1), 0.0)
    return getattr(state, "address", state), lots.stops


def test_the_relatively_least_occupied_endpoint_is_picked():
    """3 of 8 slots are less than 1 of 2, although the other has taken fewer."""
    assert picked(endpoint_with(A, 2, 1), endpoint_with(B, 8, 3)) == (B, [])


def test_an_idle_pool_with_unequal_limits_is_used_evenly():
    """No slot is taken anywhere, so all are equal, however many slots each has."""
    assert picked(endpoint_with(A, 2, 0), endpoint_with(B, 8, 0), lot=1) == (B, [2])


def test_only_the_equal_draw_lots():
    """Two of three are as free as each other."""
    states = (endpoint_with("c", 4, 3), endpoint_with(A, 2, 1), endpoint_with(B, 4, 2))

    assert picked(*states, lot=1) == (B, [2])


def test_a_limit_that_is_not_settled_counts_as_the_largest():
    """Nothing is known of the server's size, so the lower number of requests decides."""
    unknown = TrackedEndpoint(Endpoint(A), SaturationPlan(SaturationMode.ADAPTIVE), 0.0)
    unknown.dispatched(Request(1, "m", 1), 0.0)

    assert picked(unknown, endpoint_with(B, 8, 2)) == (A, [])
    assert picked(unknown, endpoint_with(B, 8, 0)) == (B, [])


def test_no_endpoint_is_picked_without_a_free_slot():
    """Nor among none at all."""
    assert picked(endpoint_with(A, 1, 1)) == (Miss.UNFIT, [])
    assert picked() == (Miss.UNFIT, [])


@pytest.mark.parametrize(("kv_usage", "free"), [(0.9, 0), (0.89, 3)])
def test_a_cache_at_its_threshold_closes(kv_usage, free):
    """A busy endpoint; just below it does not."""
    controller = controller_of(Plan(saturation=SaturationPlan(kv_cache_usage_threshold=0.9)), A)
    controller.submit(Request(1, "m", 1), 1.0)
    controller.poll(1.0)
    controller.observe(EndpointMetrics(A, 1, 0, kv_usage, 1.0), 1.0)

    (endpoint,) = controller.state(1.0).endpoints

    assert endpoint.free == free


def test_foreign_load_is_forgotten_when_limits_are_given():
    """In mode Concurrency scrapes do not count, so neither does what one said before."""
    controller = controller_of(Plan(), A)
    controller.observe(EndpointMetrics(A, 3, 0, 0.1, 1.0), 1.0)
    controller.reconfigure(Plan(saturation=concurrency(4)), 1.0)

    (endpoint,) = controller.state(1.0).endpoints

    assert (endpoint.foreign, endpoint.free) == (0, 4)


def test_places_held_blindly_are_free_when_limits_are_given():
    """The same for requests whose end is not reported."""
    controller = controller_of(Plan(), A)
    controller.observe(EndpointMetrics(A, 0, 0, 0.1, 1.0), 1.0)
    controller.submit(Request(1, "m", 1), 1.0)
    controller.poll(1.0)
    controller.complete(1, None, 1.0, blind=True)
    controller.reconfigure(Plan(saturation=concurrency(4)), 1.0)

    (endpoint,) = controller.state(1.0).endpoints

    assert endpoint.free == 4


def test_a_burst_completed_blindly_still_counts_once_the_server_reports_it():
    """Four sent and closed at once still run: the scrape that shows them does not free theirs."""
    controller = controller_of(Plan(), A)
    controller.observe(EndpointMetrics(A, 0, 0, 0.1, 1.0), 1.0)
    for number in range(4):
        controller.submit(Request(number, "m", 1), 1.0)
    for decision in controller.poll(1.0):
        controller.complete(decision.request_id, None, 1.0, blind=True)
    controller.observe(EndpointMetrics(A, 4, 1, 0.1, 1.2), 1.2)

    (endpoint,) = controller.state(1.2).endpoints

    assert (endpoint.foreign, endpoint.free) == (5, endpoint.limit - 5)


def test_metrics_become_stale_while_an_endpoint_is_out_of_the_pool():
    """One that returns is not judged by what it said before it left."""
    controller = controller_of(Plan(), A, B)
    controller.submit(Request(1, "m", 1, frozenset({A})), 0.0)
    controller.poll(0.0)
    controller.observe(EndpointMetrics(A, 1, 0, 1.0, 0.0), 0.0)
    controller.set_endpoints([Endpoint(B)], 0.5)
    for tenths in range(100):
        controller.poll(0.5 + tenths / 10)
    controller.set_endpoints([Endpoint(A)], 100.0)
    controller.poll(100.0)

    (endpoint,) = controller.state(100.0).endpoints

    assert not endpoint.fresh
    assert endpoint.free == 3


@pytest.mark.parametrize("ending", ["dispatched", "cancelled", "flushed", "expired"])
def test_a_removed_band_is_gone_with_its_last_request(ending):
    """However the last request leaves."""
    with_gold = (*ONE_BAND, BandPlan("Gold", 10, ttl_seconds=5))
    plan = Plan(bands=with_gold, models=(ModelPlan("m", "Gold"),), saturation=concurrency(1))
    controller = controller_of(plan)
    controller.submit(Request(1, "m", 1), 0.0)
    controller.submit(Request(2, "of another band", 1), 0.0)
    controller.reconfigure(Plan(bands=ONE_BAND, saturation=concurrency(1)), 0.0)
    controller.poll(0.0)
    before = [band.band for band in controller.state(0.0).bands]
    now = 0.0
    if ending == "dispatched":
        controller.set_endpoints([Endpoint(A)], now)
    elif ending == "cancelled":
        controller.cancel(1, now)
    elif ending == "flushed":
        controller.flush(now)
    else:
        now = 61.0
    controller.poll(now)

    assert before == ["Gold", "Standard"]
    assert [band.band for band in controller.state(now).bands] == ["Standard"]


def calls_of_one_life(queued, fairness, hints=0):
    """Count the Python calls of one more request's submit, poll and completion."""
    plan = Plan(
        bands=(BandPlan("Standard", 0, fairness, max_requests=50_000, flow_max_requests=50_000),),
        limits=LimitsPlan(max_requests=50_000),
        saturation=concurrency(1),
    )
    controller = controller_of(plan, A)
    controller.submit(Request(1_000_000, "m", 1), 0.0)
    controller.poll(0.0)
    for number in range(queued):
        subset = frozenset({A, f"10.9.9.9:{number % hints}"}) if hints else None
        controller.submit(Request(number, f"model-{number % 100}", 1, subset), 0.0)
    controller.poll(0.0)
    request = Request(queued, "model-1", 1)
    calls = 0

    def count(_frame, event, _argument):
        nonlocal calls
        calls += event in {"call", "c_call"}

    previous = sys.getprofile()
    sys.setprofile(count)
    try:
        controller.submit(request, 1.0)
        controller.poll(1.0)
        controller.complete(1_000_000, None, 1.0)
        decisions = controller.poll(1.0)
    finally:
        sys.setprofile(previous)
    assert isinstance(decisions[0], Dispatched)
    return calls


@pytest.mark.parametrize("fairness", list(FairnessName))
def test_the_cost_of_one_request_does_not_grow_with_the_queue(fairness):
    """Calls are counted, not seconds: the machine may be busy."""
    few = calls_of_one_life(100, fairness)
    many = calls_of_one_life(20_000, fairness)

    assert many <= few * 1.5


@pytest.mark.parametrize("fairness", list(FairnessName))
def test_the_cost_of_one_request_does_not_grow_with_the_number_of_hints(fairness):
    """Five thousand lanes that wait for the same endpoint, or one."""
    one = calls_of_one_life(10_000, fairness, hints=1)
    many = calls_of_one_life(10_000, fairness, hints=5_000)

    assert many <= one * 1.5


def test_an_endpoint_that_alone_has_room_is_found_among_many_open_ones():
    """The budgets leave none of those that are looked at first."""
    full = [endpoint_with(f"10.0.1.{number}:8000", 8, 1) for number in range(99)]
    for state in full:
        state.kv_room_tokens = 1
    lots = Lots(0)
    request = Request(1, "m", 1)
    request.kv_tokens = 1000

    state = Selection(Pool([*full, endpoint_with(A, 8, 7)]), SelectionPlan(), lots).pick(
        request, 0.0
    )

    assert state.address == A
    assert lots.stops == [100]


@pytest.mark.parametrize(("lot", "best"), [(30, 30), (95, 0)])
def test_a_choice_looks_at_few_of_many_open_endpoints(lot, best):
    """Neighbours from a random one on, past the end to the beginning."""
    states = [endpoint_with(f"10.0.1.{number}:8000", 200, number) for number in range(100)]

    assert picked(*states, lot=lot) == (f"10.0.1.{best}:8000", [100])


def test_who_drains_refuses_what_a_ceiling_keeps_from_a_free_slot():
    """A new request is sent at once or not at all, whatever it would wait for."""
    band = BandPlan("Standard", 0, max_saturation_percent=50)
    controller = controller_of(Plan(bands=(band,), saturation=concurrency(2)), A)
    controller.submit(Request(1, "m", 1), 0.0)
    controller.poll(0.0)
    controller.drain()
    controller.submit(Request(2, "m", 1), 1.0)

    (decision,) = controller.poll(1.0)

    assert isinstance(decision, Refused)
    assert decision.outcome is Outcome.REJECTED_SHUTTING_DOWN
    assert controller.waiting == 0
