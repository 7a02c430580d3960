"""Events of one request leave the others alone, however many wait."""

from __future__ import annotations

from random import Random

import pytest

from forebay_control.plan import (
    BandPlan,
    FairnessName,
    LimitsPlan,
    Plan,
    SaturationMode,
    SaturationPlan,
)
from forebay_epp.core.controller import FlowController
from forebay_epp.core.terms import Endpoint, Request

A = "10.0.0.1:8000"
MANY = 20_000


class Watched(Request):
    """Notes the id of each request of which any attribute is read."""

    __slots__ = ()
    touched: set[int] = set()  # noqa: RUF012  # one set for all of them

    def __getattribute__(self, name):
        Watched.touched.add(object.__getattribute__(self, "id"))
        return object.__getattribute__(self, name)


@pytest.fixture(params=list(FairnessName))
def queue(request):
    """A full endpoint and many who wait, one more each millisecond."""
    band = BandPlan("Standard", 0, request.param, max_requests=2 * MANY, flow_max_requests=2 * MANY)
    plan = Plan(
        bands=(band,),
        limits=LimitsPlan(max_requests=2 * MANY),
        saturation=SaturationPlan(SaturationMode.CONCURRENCY, 1),
    )
    controller = FlowController(plan, Random(1))
    controller.set_endpoints([Endpoint(A)], 0.0)
    for number in range(MANY):
        controller.submit(Watched(number, f"model-{number % 50}", 1), number / 1000)
        controller.poll(number / 1000)
    Watched.touched.clear()
    return controller


def test_cancelling_one_in_the_middle_touches_no_other(queue):
    """Its position in the queue closes by itself."""
    queue.cancel(MANY // 2, 20.0)
    (decision,) = queue.poll(20.0)

    assert decision.request_id == MANY // 2
    assert Watched.touched == {MANY // 2}


def test_expiring_one_touches_it_and_the_next_to_expire(queue):
    """Number 1 has waited longest, and number 2 says when to come again.

    Number 0 is in flight and tells how long slots are kept.
    """
    (decision,) = queue.poll(60.0015)

    assert decision.request_id == 1
    assert Watched.touched == {0, 1, 2}
    assert queue.next_wakeup() == pytest.approx(60.002)


def test_a_completion_touches_the_one_that_ends_and_the_one_that_follows(queue):
    """The slot passes from one to the next."""
    queue.complete(0, None, 20.0)
    (decision,) = queue.poll(20.0)

    assert Watched.touched == {0, decision.request_id}


def test_requests_that_are_blocked_elsewhere_are_not_looked_at():
    """A thousand lanes wait for the second server when the first one gets a slot."""
    other = "10.0.0.2:8000"
    plan = Plan(saturation=SaturationPlan(SaturationMode.CONCURRENCY, 1))
    controller = FlowController(plan, Random(1))
    controller.set_endpoints([Endpoint(A), Endpoint(other)], 0.0)
    controller.submit(Watched(0, "m", 1, frozenset({A})), 0.0)
    controller.submit(Watched(1, "m", 1, frozenset({other})), 0.0)
    controller.poll(0.0)
    for number in range(2, 1002):
        controller.submit(Watched(number, "m", 1, frozenset({other, f"10.9.9.9:{number}"})), 0.0)
    controller.submit(Watched(1002, "m", 1), 0.0)
    controller.poll(0.0)
    Watched.touched.clear()

    controller.complete(0, None, 1.0)
    (decision,) = controller.poll(1.0)

    assert decision.request_id == 1002
    assert Watched.touched == {0, 1002}
