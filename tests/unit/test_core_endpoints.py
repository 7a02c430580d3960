"""What an endpoint's metrics are believed for, and how long; and who is served before whom."""

from __future__ import annotations

from random import Random

import pytest

from forebay_control.plan import BandPlan, ModelPlan, Plan, SaturationMode, SaturationPlan
from forebay_epp.core.controller import FlowController
from forebay_epp.core.terms import Dispatched, Endpoint, EndpointMetrics, Request
from forebay_epp.core.tracked import STALE_SECONDS

A = "10.0.0.1:8000"
ONE_SLOT = SaturationPlan(SaturationMode.CONCURRENCY, 1)


def controller_of(plan, *addresses):
    controller = FlowController(plan, Random(7))
    controller.set_endpoints([Endpoint(address) for address in addresses], 0.0)
    controller.poll(0.0)
    return controller


def state_of(controller, now):
    (endpoint,) = controller.state(now).endpoints
    return endpoint


def test_an_empty_answer_of_poll_stays_empty():
    """A caller may keep what a poll returned; later decisions are not added to it."""
    controller = controller_of(Plan(), A)
    kept = controller.poll(0.0)
    controller.submit(Request(1, "m", 1), 0.0)
    controller.poll(0.0)

    assert kept == []


def test_a_band_that_was_renamed_is_served_before_its_successor():
    """Who waited under the old name came first, and cannot be overtaken without end."""

    def plan_with(band):
        return Plan(
            bands=(BandPlan(band, 10), BandPlan("Standard", 0)),
            models=(ModelPlan("m", band),),
            saturation=ONE_SLOT,
        )

    controller = controller_of(plan_with("Gold"))
    controller.submit(Request(1, "m", 1), 0.0)
    controller.reconfigure(plan_with("Golden"), 0.0)
    controller.submit(Request(2, "m", 1), 0.0)
    controller.set_endpoints([Endpoint(A)], 0.0)

    (first,) = controller.poll(0.0)

    assert isinstance(first, Dispatched)
    assert first.request_id == 1


def test_a_page_that_is_stale_when_it_comes_is_not_believed():
    """A scrape may hang; what it says at last is history."""
    controller = controller_of(Plan(), A)
    controller.observe(EndpointMetrics(A, 3, 0, 1.0, 1.0), 1.0 + STALE_SECONDS)

    assert not state_of(controller, 3.0).fresh
    assert state_of(controller, 3.0).free == 4


def test_a_page_older_than_the_last_is_ignored_even_when_that_has_expired():
    """Pages may overtake each other; time does not go back."""
    controller = controller_of(Plan(), A)
    controller.observe(EndpointMetrics(A, 1, 0, 0.1, 10.0), 10.0)
    controller.poll(10.0 + STALE_SECONDS)
    controller.observe(EndpointMetrics(A, 9, 0, 0.1, 9.0), 12.0)

    assert not state_of(controller, 12.0).fresh


@pytest.mark.parametrize(("page_at", "fresh"), [(1.0, False), (1.01, True)])
def test_metrics_are_believed_for_two_seconds(page_at, fresh):
    """Counted from when the scrape was sent, whatever other endpoints say meanwhile."""
    other = "10.0.0.2:8000"
    controller = controller_of(Plan(), A, other)
    controller.observe(EndpointMetrics(A, 1, 0, 0.1, page_at), page_at)
    for tenth in range(11, 31):
        now = tenth / 10
        controller.observe(EndpointMetrics(other, 1, 0, 0.1, now), now)
        controller.poll(now)

    states = {state.address: state for state in controller.state(3.0).endpoints}

    assert states[A].fresh == fresh
    assert states[other].fresh


def test_whoever_waits_for_stale_metrics_is_woken_in_time():
    """A full KV cache that is no longer reported closes the endpoint for two seconds only."""
    controller = controller_of(Plan(), A)
    controller.observe(EndpointMetrics(A, 1, 0, 1.0, 1.0), 1.2)
    controller.submit(Request(1, "m", 1), 1.2)
    controller.poll(1.2)

    wakeup = controller.next_wakeup()

    assert wakeup == 1.0 + STALE_SECONDS
    assert [decision.request_id for decision in controller.poll(wakeup)] == [1]


def test_a_full_kv_cache_takes_one_request_whose_end_nobody_reports():
    """An idle server is tried with one request, not with as many as the limit allows."""
    controller = controller_of(Plan(), A)
    controller.observe(EndpointMetrics(A, 0, 0, 1.0, 1.0), 1.0)
    for number in range(3):
        controller.submit(Request(number, "m", 1), 1.0)
    sent = []
    while decisions := controller.poll(1.0):
        for decision in decisions:
            sent.append(decision.request_id)
            controller.complete(decision.request_id, None, 1.0, blind=True)

    assert sent == [0]


@pytest.mark.parametrize(("streamed", "limit"), [(False, 4), (True, 2)])
def test_an_answer_that_is_not_streamed_is_not_stuck(streamed, limit):
    """Two streams begin after 0.1 s and a third request does not; only a stream should have."""
    controller = controller_of(Plan(), A)
    for number in (1, 2):
        controller.submit(Request(number, "m", 1), 0.0)
    controller.submit(Request(3, "m", 1, streamed=streamed), 0.0)
    assert len(controller.poll(0.0)) == 3
    for number in (1, 2):
        controller.first_token(number, 0.1)

    controller.complete(1, None, 1.0)

    assert state_of(controller, 1.0).limit == limit


# --- an address that another pod has taken over


def learned(uid: str) -> FlowController:
    """One endpoint of the pod `uid`, whose limit has been learned as 2; requests 1 and 2 run."""
    controller = FlowController(Plan(), Random(7))
    controller.set_endpoints([Endpoint(A, "old", uid)], 0.0)
    controller.observe(EndpointMetrics(A, running=2, waiting=9, kv_usage=None, started_at=0.5), 0.6)
    controller.observe(EndpointMetrics(A, running=0, waiting=0, kv_usage=None, started_at=0.8), 0.9)
    for number in (1, 2):
        controller.submit(Request(number, "m", 1), 1.0)
    assert len(controller.poll(1.0)) == 2
    assert (state_of(controller, 1.0).limit, state_of(controller, 1.0).in_flight) == (2, 2)
    return controller


def test_another_pod_at_the_address_is_another_endpoint():
    """What was learned of the old one, and what it runs, says nothing about the new one."""
    fresh = state_of(controller_of(Plan(), A), 0.0)
    controller = learned("pod-1")
    controller.set_endpoints([Endpoint(A, "new", "pod-2")], 2.0)

    state = state_of(controller, 2.0)
    assert (state.name, state.limit, state.in_flight) == ("new", fresh.limit, 0)
    assert (state.free, state.fresh) == (fresh.free, False)


def test_a_request_that_ends_on_the_old_pod_frees_no_slot_on_the_new_one():
    """It ends exactly once, also when it is cancelled, and the counters return to zero."""
    controller = learned("pod-1")
    controller.set_endpoints([Endpoint(A, "new", "pod-2")], 2.0)
    limit = state_of(controller, 2.0).limit
    for number in range(3, 3 + limit + 1):
        controller.submit(Request(number, "m", 1), 2.0)
    assert len(controller.poll(2.0)) == limit

    controller.complete(1, None, 3.0)
    controller.cancel(2, 2.0)
    assert controller.poll(2.0) == []
    state = state_of(controller, 2.0)
    assert (state.in_flight, state.free, controller.waiting) == (limit, 0, 1)

    controller.complete(3, None, 2.0)
    assert [decision.request_id for decision in controller.poll(2.0)] == [3 + limit]
    for number in range(4, 3 + limit + 1):
        controller.complete(number, None, 2.0)
    assert controller.state(2.0).in_flight == 0
    assert state_of(controller, 2.0).in_flight == 0


def test_a_scrape_of_the_old_pod_says_nothing_about_the_new_one():
    """It was on its way when the address changed hands."""
    controller = learned("pod-1")
    controller.set_endpoints([Endpoint(A, "new", "pod-2")], 2.0)
    controller.observe(EndpointMetrics(A, running=1, waiting=9, kv_usage=1.0, started_at=1.9), 2.1)
    assert not state_of(controller, 2.1).fresh

    controller.observe(EndpointMetrics(A, running=0, waiting=0, kv_usage=0.0, started_at=2.2), 2.3)
    assert state_of(controller, 2.3).fresh


@pytest.mark.parametrize("uids", [("pod-1", "pod-1"), ("", "pod-1"), ("pod-1", "")])
def test_the_same_pod_keeps_what_was_learned(uids):
    """So does one whose uid an operator or EPP of release 0.1 does not tell."""
    before, after = uids
    controller = learned(before)
    controller.set_endpoints([Endpoint(A, "same", after)], 2.0)

    assert (state_of(controller, 2.0).limit, state_of(controller, 2.0).in_flight) == (2, 2)


def test_a_pod_that_left_with_requests_does_not_lend_them_to_its_successor():
    """The address was gone for a while before it came back with another pod."""
    controller = learned("pod-1")
    controller.set_endpoints([], 2.0)
    controller.set_endpoints([Endpoint(A, "new", "pod-2")], 3.0)
    assert state_of(controller, 3.0).in_flight == 0

    controller.complete(1, None, 3.0)
    controller.complete(2, None, 3.0)
    assert state_of(controller, 3.0).in_flight == 0
    assert controller.state(3.0).in_flight == 0
