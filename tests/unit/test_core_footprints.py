"""What a request is expected to take of a KV cache, and that no cache is filled beyond it."""

from __future__ import annotations

from random import Random

import pytest

from forebay_control.plan import BandPlan, ModelPlan, Plan, SaturationMode, SaturationPlan
from forebay_epp.core.controller import FlowController
from forebay_epp.core.footprints import (
    ANSWER_PART,
    ASSUMED_ANSWER_TOKENS,
    ASSUMED_BYTES_PER_TOKEN,
    Footprints,
)
from forebay_epp.core.terms import Endpoint, EndpointMetrics, Request, Usage

A = "10.0.0.1:8000"


def request_of(flow, size_bytes):
    return Request(1, flow, size_bytes, flow=flow)


def tokens(footprints, flow, size_bytes):
    """Of the prompt, of the answer, and of KV cache, that are expected of a request."""
    request = request_of(flow, size_bytes)
    footprints.expect(request)
    return request.prompt_tokens, request.answer_tokens, request.kv_tokens


def test_a_flow_without_answers_is_taken_for_text():
    """Four bytes a token; of KV cache an answer of a usual length, and for its charge none."""
    prompt = 4000 / ASSUMED_BYTES_PER_TOKEN

    assert tokens(Footprints(), "m", 4000) == (
        prompt,
        0,
        int(prompt + ANSWER_PART * ASSUMED_ANSWER_TOKENS),
    )


def test_a_flow_is_learned_from_its_own_answers():
    """Two bytes a token and answers of 1,000 tokens.

    The other flow knows nothing of it, but what to charge for an answer.
    """
    footprints = Footprints()
    for _ in range(200):
        footprints.learn(request_of("long", 2000), Usage(1000, 1000))

    expected = (1000, 1000, 1000 + ANSWER_PART * 1000)
    assert tokens(footprints, "long", 2000) == pytest.approx(expected, rel=0.02)
    prompt, _, kv_tokens = tokens(Footprints(), "m", 4000)
    assert tokens(footprints, "m", 4000) == (prompt, pytest.approx(1000, rel=0.02), kv_tokens)


def test_an_answer_without_tokens_teaches_nothing():
    """It was cut off, or the server does not count."""
    footprints = Footprints()
    footprints.learn(request_of("m", 4000), Usage(0, 10))
    footprints.learn(request_of("m", 4000), Usage(10, 0))

    assert tokens(footprints, "m", 4000) == tokens(Footprints(), "m", 4000)


BANDS = (BandPlan("Standard", 0),)
MODELS = (ModelPlan("m", "Standard"),)


def controller_of(capacity_tokens, bands=BANDS, models=MODELS):
    """One endpoint of 100 slots."""
    plan = Plan(
        bands=bands,
        models=models,
        saturation=SaturationPlan(SaturationMode.CONCURRENCY, 100),
    )
    controller = FlowController(plan, Random(1))
    controller.set_endpoints([Endpoint(A)], 0.0)
    page = EndpointMetrics(A, 0, 0, 0.0, 0.0, kv_capacity_tokens=capacity_tokens)
    controller.observe(page, 0.0)
    return controller


def sent(controller):
    return [decision.request_id for decision in controller.poll(0.0)]


def test_no_more_is_sent_than_the_cache_has_room_for():
    """Each is expected to take 1,179 tokens, and 93 % of the cache are to be filled."""
    controller = controller_of(4000)
    for number in range(10):
        controller.submit(Request(number, "m", 4000), 0.0)

    assert sent(controller) == [0, 1, 2]
    controller.complete(1, None, 0.0)
    assert sent(controller) == [3]


def test_a_request_larger_than_the_cache_goes_to_an_idle_server():
    """The server is the judge of it."""
    controller = controller_of(1000)
    for number in range(2):
        controller.submit(Request(number, "m", 40_000), 0.0)

    assert sent(controller) == [0]
    controller.complete(0, None, 0.0)
    assert sent(controller) == [1]


def test_a_server_that_does_not_tell_its_size_has_room():
    """As many as it has slots."""
    controller = controller_of(None)
    for number in range(10):
        controller.submit(Request(number, "m", 4000), 0.0)

    assert len(sent(controller)) == 10


def test_small_requests_do_not_overtake_a_large_one_that_waits_for_room():
    """Each that ends makes room for one of them, and never enough for the large one."""
    controller = controller_of(4000)
    for number in range(3):
        controller.submit(Request(number, "m", 4000), 0.0)
    sent(controller)
    controller.submit(Request(3, "m", 12_000), 0.0)
    for number in range(4, 7):
        controller.submit(Request(number, "m", 4000, frozenset({A})), 0.0)

    order = []
    for number in range(3):
        controller.complete(number, None, 0.0)
        order += sent(controller)
    assert order == [3]


def test_a_lower_band_does_not_take_the_room_that_a_higher_one_waits_for():
    """Priority is strict also where prompts differ."""
    bands = (BandPlan("Critical", 100), BandPlan("Standard", 0))
    models = (ModelPlan("chat", "Critical"), ModelPlan("batch", "Standard"))
    controller = controller_of(4000, bands, models)
    for number in range(3):
        controller.submit(Request(number, "batch", 4000), 0.0)
    sent(controller)
    controller.submit(Request(3, "chat", 12_000), 0.0)
    controller.submit(Request(4, "batch", 4000), 0.0)

    controller.complete(0, None, 0.0)
    assert sent(controller) == []
    for number in (1, 2):
        controller.complete(number, None, 0.0)
    assert sent(controller) == [3]
