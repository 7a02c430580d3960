"""Outlier ejection: which evidence takes an endpoint out, and what brings it back."""

from __future__ import annotations

from random import Random

import pytest

from forebay_control.plan import Plan, SaturationMode, SaturationPlan
from forebay_epp.codec.answers import verdict
from forebay_epp.core.controller import FlowController
from forebay_epp.core.health import ERRORS, MAX_ERRORS, SCRAPE, UNREACHABLE, WELL_SECONDS, Health
from forebay_epp.core.terms import Dispatched, Endpoint, EndpointMetrics, Request, Verdict

A, B, C = (f"10.0.0.{number}:8000" for number in (1, 2, 3))


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (0, Verdict.UNKNOWN),
        *((status, Verdict.GOOD) for status in (101, 200, 204, 302, 400, 404, 408, 413, 429, 501)),
        (500, Verdict.ERROR),
        *((status, Verdict.UNREACHABLE) for status in (502, 503, 504)),
    ],
)
def test_an_answer_is_judged_by_its_status(status, expected):
    """What the request has earned itself says nothing against the server."""
    assert verdict(status) is expected


def test_an_answer_that_breaks_off_says_nothing():
    """The client may have left; but a server that says 503 has said it."""
    assert verdict(200, whole=False) is Verdict.UNKNOWN
    assert verdict(503, whole=False) is Verdict.UNREACHABLE


class TestEvidence:
    """One endpoint's health on its own; requests are sent when they are answered."""

    def test_one_unreachable_answer_takes_it_out_for_a_second(self):
        """After which one trial is due."""
        health = Health()
        health.answered(Verdict.UNREACHABLE, 1.0, 1.0)

        assert (health.out, health.cause, health.trial_at) == (True, UNREACHABLE, 2.0)
        health.elapse(1.9)
        assert not health.trial_due
        health.elapse(2.0)
        assert health.trial_due

    def test_only_a_burst_of_errors_takes_it_out(self):
        """A better answer in between starts the count again."""
        health = Health()
        for status in (*[Verdict.ERROR] * (MAX_ERRORS - 1), Verdict.GOOD):
            health.answered(status, 1.0, 1.0)
        for _ in range(MAX_ERRORS - 1):
            health.answered(Verdict.ERROR, 1.0, 1.0)
        assert not health.out

        health.answered(Verdict.ERROR, 1.0, 1.0)
        assert (health.out, health.cause) == (True, ERRORS)

    def test_the_period_doubles_to_a_minute(self):
        """Each trial that fails begins a longer one."""
        health, now, periods = Health(), 0.0, []
        for _ in range(8):
            health.answered(Verdict.UNREACHABLE, now, now)
            periods.append(health.trial_at - now)
            now = health.trial_at
            health.elapse(now)
            health.dispatched()

        assert periods == [1, 2, 4, 8, 16, 32, 60, 60]

    def test_requests_from_before_prove_nothing(self):
        """Eight that break off together are one failure; old answers that end well no recovery."""
        health = Health()
        for _ in range(8):
            health.answered(Verdict.UNREACHABLE, 0.5, 1.0)
        health.answered(Verdict.GOOD, 0.5, 1.5)

        assert (health.out, health.failures, health.trial_at) == (True, 1, 2.0)

    def test_a_trial_that_succeeds_brings_it_back(self):
        """And no second one is due while it runs."""
        health = Health()
        health.answered(Verdict.UNREACHABLE, 0.5, 1.0)
        health.elapse(2.0)
        health.dispatched()
        health.elapse(2.5)
        assert not health.trial_due

        health.answered(Verdict.GOOD, 2.0, 3.0)
        assert not health.out

    def test_a_trial_whose_client_leaves_is_due_again(self):
        """It has decided nothing."""
        health = Health()
        health.answered(Verdict.UNREACHABLE, 0.5, 1.0)
        health.elapse(2.0)
        health.dispatched()
        health.answered(Verdict.UNKNOWN, 2.0, 2.1)

        assert (health.out, health.trial_due) == (True, True)

    @pytest.mark.parametrize(("later", "expected"), [(1.0, 2.0), (WELL_SECONDS, 1.0)])
    def test_the_period_starts_anew_once_it_has_been_well(self, later, expected):
        """A server that fails again at once is not forgiven."""
        health = Health()
        health.answered(Verdict.UNREACHABLE, 0.0, 0.0)
        health.elapse(1.0)
        health.dispatched()
        health.answered(Verdict.GOOD, 1.0, 1.0)
        now = 1.0 + later
        health.answered(Verdict.UNREACHABLE, now, now)

        assert health.trial_at - now == expected

    @pytest.mark.parametrize("refused", [True, False])
    def test_a_scrape_that_begins_to_fail_takes_it_out(self, refused):
        """At once; there need be no request that fails."""
        health = Health()
        health.scraped(1.0)
        health.scrape_failed(1.2, refused=refused)

        assert (health.out, health.cause) == (True, SCRAPE)

    def test_scrapes_that_go_on_failing_do_not_outweigh_good_answers(self):
        """Its metrics may be unreadable while it serves."""
        health = Health()
        health.scrape_failed(1.0, refused=False)
        health.elapse(2.0)
        health.dispatched()
        health.answered(Verdict.GOOD, 2.0, 2.5)
        health.scrape_failed(2.6, refused=False)

        assert not health.out

    def test_refused_scrapes_stand_in_for_the_trial(self):
        """No request is lost to a server that is known not to listen."""
        health = Health()
        now = 0.0
        trials = 0
        while now < 100.0:
            health.scrape_failed(now, refused=True)
            health.elapse(now)
            trials += health.trial_due
            now += 0.2

        assert trials == 0
        assert health.failures >= 6

    def test_the_first_scrape_that_is_answered_makes_the_trial_due(self):
        """A server that has come back does not wait for the end of a long period."""
        health = Health()
        for now in (0.0, 1.0, 3.0, 7.0, 15.0):
            health.scrape_failed(now, refused=True)
        assert health.trial_at == 31.0
        health.scraped(16.0)

        assert health.trial_due


def pool(*addresses, slots=2):
    plan = Plan(saturation=SaturationPlan(SaturationMode.CONCURRENCY, slots))
    controller = FlowController(plan, Random(5))
    controller.set_endpoints([Endpoint(address) for address in addresses], 0.0)
    return controller


class Driver:
    """Sends requests and answers them as told."""

    def __init__(self, *addresses, slots=2):
        self.controller = pool(*addresses, slots=slots)
        self.next_id = 0
        self.at = {}

    def send(self, count, now):
        for _ in range(count):
            self.controller.submit(Request(self.next_id, "m", 1), now)
            self.next_id += 1
        return self.poll(now)

    def poll(self, now):
        """Return how many requests each endpoint has got."""
        counts = {}
        for decision in self.controller.poll(now):
            assert isinstance(decision, Dispatched)
            self.at[decision.request_id] = decision.endpoint
            counts[decision.endpoint] = counts.get(decision.endpoint, 0) + 1
        return counts

    def answer(self, now, **verdicts):
        """Answer everything that runs."""
        for number, address in list(self.at.items()):
            del self.at[number]
            self.controller.complete(
                number, None, now, verdicts.get(address[:8].replace(".", "_"), Verdict.GOOD)
            )

    def state(self, address, now):
        return next(e for e in self.controller.state(now).endpoints if e.address == address)


def fail(driver, address, now):
    """Have the endpoint's requests fail, and all others succeed."""
    for number, at in list(driver.at.items()):
        del driver.at[number]
        good = Verdict.UNREACHABLE if at == address else Verdict.GOOD
        driver.controller.complete(number, None, now, good)


def test_what_waits_goes_to_the_healthy_ones():
    """The dead one is the emptiest, and gets nothing but its trial after a second."""
    driver = Driver(A, B)
    assert driver.send(10, 0.0) == {A: 2, B: 2}
    fail(driver, A, 0.1)
    assert driver.poll(0.1) == {B: 2}
    assert driver.controller.next_wakeup() == pytest.approx(1.1)
    fail(driver, A, 0.2)
    assert driver.poll(0.2) == {B: 2}
    assert driver.poll(1.1) == {A: 1}
    assert driver.state(A, 1.1).free == 0


def test_a_pool_with_one_endpoint_out_is_full_when_the_others_are():
    """A slot of an endpoint that is out is no free slot."""
    driver = Driver(A, B)
    driver.send(4, 0.0)
    fail(driver, A, 0.1)
    driver.send(2, 0.2)

    assert driver.controller.saturation() >= 1.0
    assert (driver.state(A, 0.2).out, driver.state(A, 0.2).free) == (True, 0)
    assert driver.state(A, 0.2).trial_seconds == pytest.approx(0.9)


def test_never_all_endpoints_are_out_of_use():
    """When all fail, those that have failed least are used."""
    driver = Driver(A, B)
    driver.send(1, 0.0)
    (address,) = driver.at.values()
    other = A if address == B else B
    fail(driver, address, 0.1)
    assert driver.send(4, 0.2) == {other: 2}
    fail(driver, other, 0.3)

    # Both have failed once: both are used at once.
    assert driver.poll(0.3) == {A: 1, B: 1} or sum(driver.poll(0.3).values()) == 0
    assert not driver.controller.waiting


def test_changes_are_told_once():
    """Out and in again, with the cause; failures in between are no news."""
    driver = Driver(A, B)
    driver.send(4, 0.0)
    fail(driver, A, 0.1)
    driver.poll(1.2)
    driver.send(3, 1.2)
    fail(driver, A, 1.3)
    changes = driver.controller.take_health_changes()

    assert [(c.address, c.out, c.cause) for c in changes] == [(A, True, UNREACHABLE)]
    driver.send(3, 10.0)
    driver.answer(10.1)
    changes = driver.controller.take_health_changes()
    assert [(c.address, c.out) for c in changes] == [(A, False)]
    assert driver.controller.take_health_changes() == []


def test_a_refused_scrape_takes_an_endpoint_out():
    """Through the controller, in mode Adaptive, where there are scrapes."""
    controller = FlowController(Plan(), Random(5))
    controller.set_endpoints([Endpoint(A), Endpoint(B)], 0.0)
    controller.observe(EndpointMetrics(A, 0, 0, None, 0.1), 0.1)
    controller.scrape_failed(A, 0.3, refused=True)
    controller.scrape_failed("10.9.9.9:1", 0.3, refused=True)
    for number in range(4):
        controller.submit(Request(number, "m", 1), 0.4)

    assert {decision.endpoint for decision in controller.poll(0.4)} == {B}


def test_a_fast_failing_server_gets_its_share_and_then_trials():
    """20 requests/s on four servers for 20 s; one answers 500 at once, the others take 0.1 s."""
    driver = Driver(A, B, C, "10.0.0.4:8000", slots=8)
    got = []
    ends = []
    for step in range(400):
        now = step * 0.05
        for number, _ in [e for e in ends if e[1] <= now]:
            driver.controller.complete(number, None, now, Verdict.GOOD)
        ends = [e for e in ends if e[1] > now]
        driver.send(1, now)
        while driver.at:
            for number, address in list(driver.at.items()):
                del driver.at[number]
                if address == A:
                    got.append(now)
                    driver.controller.complete(number, None, now + 0.001, Verdict.ERROR)
                else:
                    ends.append((number, now + 0.1))
            driver.poll(now + 0.001)

    assert len([at for at in got if at <= 1.0]) <= 5
    assert len([at for at in got if at > 1.0]) <= 5  # after 1, 2, 4 and 8 s
