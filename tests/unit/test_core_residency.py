"""Tokens of answers whose usage is not seen, from what their server has generated."""

from __future__ import annotations

import random
from statistics import median

import pytest

from forebay_control.plan import BandPlan, FairnessName, Plan
from forebay_epp.core.controller import FlowController
from forebay_epp.core.residency import Residency
from forebay_epp.core.terms import Endpoint, EndpointMetrics, Request, Usage


def sent(number: int, at: float) -> Request:
    request = Request(number, "m", 100)
    request.dispatched_at = at
    return request


def test_what_is_generated_is_shared_by_time():
    """One was there all the time, one for half of it; a third is another client's."""
    residency = Residency()
    first, second = sent(1, 0.0), sent(2, 0.5)
    residency.joined(first)
    residency.page(1000.0, 0.0, 0)
    residency.joined(second)

    found = residency.page(1250.0, 1.0, 1)

    assert [(each.request.id, each.tokens, each.ended) for each in found] == [
        (1, 100.0, False),
        (2, 50.0, False),
    ]


def test_an_answer_that_has_ended_gets_its_last_share_with_the_next_page():
    """And none after it; one whose usage is known takes its share and is not returned."""
    residency = Residency()
    first, second = sent(1, 0.0), sent(2, 0.0)
    residency.joined(first)
    residency.joined(second)
    residency.page(0.0, 0.0, 0)
    residency.left(first, 0.5, known=False)
    residency.left(second, 0.5, known=True)

    found = residency.page(100.0, 1.0, 0)

    assert [(each.request.id, each.tokens, each.ended) for each in found] == [(1, 50.0, True)]
    assert residency.page(200.0, 2.0, 0) == []


@pytest.mark.parametrize("total", [None, 10.0])
def test_a_server_that_starts_again_or_says_nothing_is_not_believed(total):
    """Nothing is shared until two pages in a row can be compared."""
    residency = Residency()
    residency.joined(sent(1, 0.0))
    residency.page(1000.0, 0.0, 0)

    assert residency.page(total, 1.0, 0) == []
    assert residency.page(2000.0, 2.0, 0) == [] or total is not None


def test_nothing_is_kept_of_answers_that_end_while_no_page_comes():
    """However long that is."""
    residency = Residency()
    residency.page(0.0, 0.0, 0)
    for number in range(100):
        request = sent(number, 0.0)
        residency.joined(request)
        residency.left(request, 1.0, known=False)
    residency.forget()

    assert residency.page(1000.0, 2.0, 0) == []


def test_sums_are_the_server_s_and_shares_come_close():
    """A batch of one token a step for each, answers of 50 to 500 tokens, a page every 200 ms."""
    lots = random.Random(3)
    residency = Residency()
    lengths: dict[int, int] = {}
    running: dict[int, list[int]] = {}
    requests: dict[int, Request] = {}
    found: dict[int, float] = {}
    total, number = 0, 0
    residency.page(0.0, 0.0, 0)
    for step in range(1, 20_000):
        now = step * 0.01
        while len(running) < 16 and number < 400:
            number += 1
            lengths[number] = lots.randint(50, 500)
            running[number] = [lengths[number]]
            requests[number] = sent(number, now - 0.01)
            residency.joined(requests[number])
        for each, left in list(running.items()):
            left[0] -= 1
            total += 1
            if not left[0]:
                del running[each]
                residency.left(requests[each], now, known=False)
        if step % 20 == 0:
            for produced in residency.page(float(total), now, 0):
                if produced.ended:
                    found[produced.request.id] = produced.tokens
        if not running and len(found) == 400:
            break

    assert sum(found.values()) == pytest.approx(sum(lengths.values()), rel=0.01)
    errors = [abs(found[each] - length) / length for each, length in lengths.items()]
    assert median(errors) < 0.15


def test_a_flow_is_charged_for_answers_that_show_no_usage():
    """Long answers lose the flow its turn as if their usage were read."""
    plan = Plan(bands=(BandPlan("Standard", 0, FairnessName.TOKEN_FAIR),))
    controller = FlowController(plan, random.Random(1))
    controller.set_endpoints([Endpoint("A")], 0.0)
    controller.observe(EndpointMetrics("A", 0, 0, None, 0.0, answer_tokens=0.0), 0.0)
    controller.submit(Request(1, "m", 400), 0.1)
    controller.poll(0.1)
    controller.complete(1, None, 0.9)

    controller.observe(EndpointMetrics("A", 0, 0, None, 1.0, answer_tokens=300.0), 1.0)

    ((request, usage),) = controller.take_estimates()
    assert (request.id, usage) == (1, Usage(100, 300))
    assert controller.take_estimates() == []
