"""core/waits.py: how long a request is predicted to wait."""

from __future__ import annotations

from random import Random

import pytest

from forebay_control.plan import BandPlan, ModelPlan, Plan, SaturationMode, SaturationPlan
from forebay_epp.core.controller import FlowController
from forebay_epp.core.terms import Endpoint, Request, Verdict

A = "10.0.0.1:8000"
PLAN = Plan(
    bands=(BandPlan("Critical", 100), BandPlan("Standard", 0), BandPlan("Sheddable", -100)),
    models=(ModelPlan("chat", "Critical"), ModelPlan("batch", "Sheddable")),
    saturation=SaturationPlan(SaturationMode.CONCURRENCY, max_concurrency=4),
)


def busy_controller(verdict=Verdict.GOOD):
    """One whose four slots are taken since second 2, and whose one answer has taken 2 s."""
    controller = FlowController(PLAN, Random(7))
    controller.set_endpoints([Endpoint(A)], 0.0)
    submit(controller, 1, "chat", 0.0)
    controller.complete(1, None, 2.0, verdict)
    for number in range(2, 6):
        submit(controller, number, "batch", 2.0)
    return controller


def submit(controller, number, model, now):
    request = Request(number, model, 1)
    controller.submit(request, now)
    controller.poll(now)
    return request


def test_slots_get_free_at_the_rate_of_littles_law():
    """Four in flight, two seconds each: two a second."""
    controller = busy_controller()

    waits = [submit(controller, number, "chat", 2.0).predicted_seconds for number in range(10, 14)]

    assert waits == [0.5, 1.0, 1.5, 2.0]


def test_what_waits_in_higher_bands_goes_first():
    """What waits in lower ones does not."""
    controller = busy_controller()
    submit(controller, 10, "batch", 2.0)

    critical = submit(controller, 11, "chat", 2.0)
    sheddable = submit(controller, 12, "batch", 2.0)

    assert critical.predicted_seconds == 0.5
    # Three, less what the Critical request of second 0 lets expect: 0.1/s, decayed.
    assert sheddable.predicted_seconds == pytest.approx(3 / (2 - 0.1 * 2.718281828**-0.2))


def test_before_an_answer_has_ended_the_oldest_request_tells():
    """It has kept its slot for a second; what ended without a verdict says nothing."""
    controller = busy_controller(Verdict.UNKNOWN)

    assert submit(controller, 10, "chat", 3.0).predicted_seconds == 0.25


def test_nothing_is_predicted_while_nothing_is_in_flight():
    """It waits for an endpoint, which may come at any time."""
    controller = FlowController(PLAN, Random(7))

    assert submit(controller, 10, "chat", 3.0).predicted_seconds is None


def test_nothing_is_predicted_for_what_goes_at_once():
    """There is a free slot."""
    controller = busy_controller()
    controller.complete(2, None, 3.0, Verdict.GOOD)

    assert submit(controller, 10, "chat", 3.0).predicted_seconds is None
