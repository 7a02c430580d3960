"""core/observation: what a shadow takes over from the pool that it observes."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from forebay_control.plan import BandPlan, Mode, Plan, SaturationMode, SaturationPlan
from forebay_epp.core.observation.shadowed import ShadowedController
from forebay_epp.core.terms import Dispatched, Endpoint, EndpointMetrics, Outcome, Request

A, B = "10.0.0.1:8000", "10.0.0.2:8000"
OBSERVED = Plan(
    mode=Mode.OBSERVE,
    bands=(BandPlan("Standard", 0, max_requests=2),),
    saturation=SaturationPlan(SaturationMode.CONCURRENCY, 1),
)


def controller(*addresses: str, plan: Plan = OBSERVED) -> ShadowedController:
    made = ShadowedController(plan, Random(1))
    made.set_endpoints([Endpoint(address) for address in addresses], 0.0)
    return made


def submit(observed: ShadowedController, *numbers: int) -> None:
    for number in numbers:
        observed.submit(Request(number, "m", 100, None, None, 60.0), 1.0)
        observed.poll(1.0)


def told(observed: ShadowedController, now: float) -> dict[int, str]:
    """What the plan would have done, by request: an endpoint or an outcome."""
    return {
        decision.request_id: decision.endpoint
        if isinstance(decision, Dispatched)
        else decision.outcome.value
        for decision in (shadowed.decision for shadowed in observed.take_shadowed(now))
    }


def test_a_new_plan_counts_for_what_comes_then():
    """The cap is raised while one request runs and two wait in the shadow."""
    observed = controller(A)
    submit(observed, 1, 2, 3, 4)
    assert told(observed, 1.0) == {1: A, 4: Outcome.REJECTED_QUEUE_FULL.value}

    observed.reconfigure(replace(OBSERVED, bands=(BandPlan("Standard", 0, max_requests=3),)), 2.0)
    submit(observed, 5, 6)

    assert told(observed, 2.0) == {6: Outcome.REJECTED_QUEUE_FULL.value}


def test_an_endpoint_whose_scrape_fails_is_out_for_the_shadow_too():
    """Its health is not told twice: real and shadow see the same server."""
    observed = controller(A, B)

    observed.scrape_failed(A, 0.5, refused=True)
    submit(observed, 1)

    assert told(observed, 1.0) == {1: B}
    assert [change.address for change in observed.take_health_changes()] == [A]


def test_a_shadow_takes_the_pages_of_an_adaptive_pool():
    """A page that shows requests of other EPPs leaves the shadow fewer slots."""
    adaptive = replace(OBSERVED, saturation=SaturationPlan(SaturationMode.ADAPTIVE))
    observed = controller(A, plan=adaptive)

    observed.observe(EndpointMetrics(A, 50, 0, 0.5, 0.5), 0.6)

    (endpoint,) = observed.state(1.0).shadow.endpoints
    assert (endpoint.foreign, endpoint.fresh) == (50, True)


def test_a_request_whose_client_leaves_is_not_told_of():
    """It would have left the queue of the plan, too, whatever the plan."""
    observed = controller(A)
    submit(observed, 1, 2)
    assert told(observed, 1.0) == {1: A}

    observed.cancel(2, 2.0)

    assert told(observed, 100.0) == {}
