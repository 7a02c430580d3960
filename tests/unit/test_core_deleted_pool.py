"""Requests of a pool that is deleted, and created again."""

from __future__ import annotations

from random import Random

import pytest

from forebay_control.plan import BandPlan, Plan, SaturationMode, SaturationPlan
from forebay_epp.core.controller import DELETED_POOL_SECONDS, FlowController
from forebay_epp.core.terms import Dispatched, Endpoint, Outcome, Refused, Request

A = "10.0.0.1:8000"
TTL_SECONDS = 600.0


@pytest.fixture
def controller():
    """One slot, taken by request 1; requests 2 and 3 wait when the pool is deleted at 10.0."""
    plan = Plan(
        bands=(BandPlan("Standard", 0, ttl_seconds=TTL_SECONDS),),
        saturation=SaturationPlan(SaturationMode.CONCURRENCY, 1),
    )
    made = FlowController(plan, Random(7))
    made.set_endpoints([Endpoint(A)], 0.0)
    for number in (1, 2, 3):
        made.submit(Request(number, "m", 1), 0.0)
    made.poll(0.0)
    made.delete_pool(10.0)
    return made


def decisions(controller, now) -> dict[int, Outcome]:
    return {
        d.request_id: Outcome.DISPATCHED if isinstance(d, Dispatched) else d.outcome
        for d in controller.poll(now)
    }


def test_a_new_request_is_refused(controller):
    """At once and for the reason that it is, also while there is a free slot."""
    controller.complete(1, None, 5.0)
    controller.submit(Request(4, "m", 1), 11.0)
    refused = [d for d in controller.poll(11.0) if isinstance(d, Refused)]

    assert [d.outcome for d in refused] == [Outcome.REJECTED_POOL_DELETED]
    assert "deleted" in refused[0].message


def test_what_waits_is_dispatched_for_a_while(controller):
    """Slots that become free go to it."""
    controller.complete(1, None, 5.0)

    assert decisions(controller, 11.0) == {2: Outcome.DISPATCHED}


def test_what_still_waits_in_the_end_is_evicted(controller):
    """A minute of patience elsewhere does not help; what runs is left alone."""
    end = 10.0 + DELETED_POOL_SECONDS
    assert decisions(controller, end - 0.1) == {}
    assert controller.next_wakeup() == end

    assert decisions(controller, end) == {
        2: Outcome.EVICTED_POOL_DELETED,
        3: Outcome.EVICTED_POOL_DELETED,
    }
    assert controller.state(end).in_flight == 1
    controller.complete(1, None, 5.0)


def test_being_told_again_gives_no_more_time(controller):
    """The operator may repeat itself."""
    controller.delete_pool(30.0)

    assert len(decisions(controller, 10.0 + DELETED_POOL_SECONDS)) == 2


def test_a_pool_that_is_created_again_takes_requests(controller):
    """And what has waited since before keeps its deadline."""
    controller.restore_pool(20.0)
    controller.submit(Request(4, "m", 1), 20.0)
    assert decisions(controller, 100.0) == {}
    assert not controller.pool_deleted

    assert decisions(controller, TTL_SECONDS) == {2: Outcome.EVICTED_TTL, 3: Outcome.EVICTED_TTL}
