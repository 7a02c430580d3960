"""The backlog of prompts in a server, how fast it falls, and that a goal keeps it short."""

from __future__ import annotations

from random import Random

import pytest

from forebay_control.plan import Plan, SaturationMode, SaturationPlan
from forebay_epp.core.controller import FlowController
from forebay_epp.core.prefill import LEAST_TOKENS, Prefill
from forebay_epp.core.terms import NEVER, Endpoint, EndpointMetrics, Request

A, B = "10.0.0.1:8000", "10.0.0.2:8000"


def request_of(number, prompt_tokens):
    return Request(number, "m", 4 * prompt_tokens, prompt_tokens=prompt_tokens)


def page(at, steps, running=1, address=A):
    return EndpointMetrics(address, running, 0, 0.1, at, 0.2, steps, 0.0)


def known(rate):
    """A server that has been seen to prefill so many tokens a second."""
    prefill = Prefill()
    long = request_of(0, 100_000)
    prefill.sent(long, 0.0)
    prefill.begun(long, 100_000 / rate)
    prefill.idle()
    return prefill


def test_nothing_is_known_before_there_was_a_long_backlog():
    """However many short prompts came one after another: they came no faster."""
    prefill = Prefill()
    for number in range(100):
        request = request_of(number, 1000)
        prefill.sent(request, number)
        prefill.begun(request, number + 0.9)

    assert prefill.rate == 0
    assert prefill.room(0.5) == NEVER


def test_the_rate_is_what_a_long_backlog_took():
    """Also where more was sent meanwhile, which is not done yet."""
    prefill = Prefill()
    long, later = request_of(0, 50_000), request_of(1, 400)
    prefill.sent(long, 10.0)
    prefill.sent(later, 12.0)
    prefill.begun(long, 15.0)

    assert prefill.rate == pytest.approx(10_000)
    assert prefill.backlog == 400


def test_an_answer_that_begins_shows_that_earlier_prompts_are_done():
    """Later ones are not, and what is done stays done."""
    prefill = Prefill()
    first, second, third = (request_of(number, 1000) for number in range(3))
    for request in (first, second, third):
        prefill.sent(request, 0.0)

    prefill.begun(second, 1.0)
    assert prefill.backlog == 1000
    prefill.begun(first, 1.0)
    assert prefill.backlog == 1000


def test_an_end_shows_that_a_prompt_is_done_but_not_when():
    """An answer that is not streamed is seen to end only; generating it took most of the time."""
    prefill = Prefill()
    long = request_of(0, 50_000)
    prefill.sent(long, 0.0)

    prefill.ended(long)

    assert prefill.backlog == 0
    assert prefill.rate == 0

    longer = request_of(1, 80_000)
    prefill.sent(longer, 30.0)
    prefill.begun(longer, 34.0)
    assert prefill.rate == pytest.approx(20_000)


def test_the_end_of_an_earlier_answer_spoils_no_measurement():
    """The long prompts behind it go on."""
    prefill = Prefill()
    first, second = request_of(0, 100), request_of(1, 50_000)
    prefill.sent(first, 0.0)
    prefill.sent(second, 0.0)

    prefill.ended(first)
    prefill.begun(second, 5.0)

    assert prefill.rate == pytest.approx(50_100 / 5.0)


def test_fast_steps_show_that_no_prompt_waits():
    """Of an answer that is not streamed nothing is seen to begin."""
    prefill = Prefill()
    for number in range(5):  # 10 ms a step
        prefill.observe(page(number * 0.2, 20.0 * number))
    prefill.sent(request_of(0, 60_000), 0.85)
    prefill.observe(page(1.0, 85.0))
    for number in range(1, 6):  # 200 ms a step
        prefill.observe(page(1.0 + number * 0.2, 85.0 + number))
    assert prefill.backlog == 60_000

    prefill.sent(request_of(1, 500), 2.1)
    prefill.observe(page(2.2, 110.0))

    assert prefill.backlog == 500
    assert prefill.rate == pytest.approx(60_000 / (2.2 - 0.85))


def test_the_backlog_falls_at_the_known_rate():
    """VLLM says nothing of a prompt until all of it is done."""
    prefill = known(20_000)
    prefill.sent(request_of(1, 30_000), 10.0)
    prefill.drain(11.0)
    assert prefill.backlog == pytest.approx(10_000)

    prefill.drain(12.0)
    assert prefill.backlog == 0


def test_room_is_what_is_prefilled_in_time():
    """A step's tokens at least, and any prompt where none waits."""
    prefill = known(20_000)
    assert prefill.room(0.5) == NEVER

    prefill.sent(request_of(1, 3_000), 10.0)
    assert prefill.room(0.5) == pytest.approx(7_000)
    assert prefill.room(0.001) == LEAST_TOKENS - 3_000


def test_an_engine_that_restarts_begins_its_counter_again():
    """That is no step."""
    prefill = known(20_000)
    prefill.observe(page(10.0, 1000.0))
    prefill.sent(request_of(1, 40_000), 10.0)
    prefill.observe(page(10.2, 3.0))

    assert prefill.backlog == pytest.approx(36_000)


def taught(mode):
    """A controller of two servers, of which the first has prefilled a long prompt in 5 s."""
    controller = FlowController(Plan(saturation=SaturationPlan(mode, 4)), Random(1))
    controller.set_endpoints([Endpoint(A), Endpoint(B)], 0.0)
    controller.submit(Request(0, "m", 400_000, frozenset({A})), 0.0)
    controller.poll(0.0)
    controller.first_token(0, 5.0)
    controller.complete(0, None, 6.0)
    return controller


def holding_back():
    """A controller whose only server prefills a long prompt, so that another one waits for it."""
    controller = taught(SaturationMode.ADAPTIVE)
    controller.set_endpoints([Endpoint(A)], 7.0)
    controller.submit(Request(1, "m", 400_000), 10.0)
    controller.poll(10.0)
    controller.submit(Request(2, "m", 40_000), 10.1)
    assert controller.poll(10.1) == []
    return controller


@pytest.mark.parametrize(
    ("mode", "expected"), [(SaturationMode.ADAPTIVE, {B}), (SaturationMode.CONCURRENCY, {A, B})]
)
def test_prompts_avoid_a_server_that_prefills_a_long_one(mode, expected):
    """By the goal of the adaptive mode."""
    controller = taught(mode)
    controller.submit(Request(1, "m", 400_000, frozenset({A})), 10.0)
    controller.poll(10.0)

    for number in range(2, 5):
        controller.submit(Request(number, "m", 400), 10.5)
    sent = [decision.endpoint for decision in controller.poll(10.5)]

    assert (len(sent), set(sent)) == (3, expected)


def test_what_was_kept_back_goes_when_the_prompt_is_done():
    """The beginning of its answer makes room, without a slot becoming free."""
    controller = holding_back()

    controller.first_token(1, 14.0)

    assert [decision.request_id for decision in controller.poll(14.0)] == [2]


def test_a_new_goal_counts_for_what_waits():
    """At the next look, which the change brings."""
    controller = holding_back()

    patient = SaturationPlan(SaturationMode.ADAPTIVE, 4, time_to_first_token_seconds=60.0)
    controller.reconfigure(Plan(saturation=patient), 10.2)

    assert [decision.request_id for decision in controller.poll(10.2)] == [2]


def test_what_is_cached_of_a_prompt_is_no_backlog():
    """The server takes it from its cache, in no time."""
    prefill = known(1000)
    request = request_of(1, 1000)
    request.cached_tokens = 600

    prefill.sent(request, 1000.0)

    assert prefill.backlog == 400
