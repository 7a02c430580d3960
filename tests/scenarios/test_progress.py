"""Answers that are charged while they are produced, against what has been produced."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay_control.plan import (
    BandPlan,
    FairnessName,
    ModelPlan,
    Plan,
    SaturationMode,
    SaturationPlan,
)
from forebay_epp.core.controller import FlowController
from forebay_epp.core.fairness.token_fair import ANSWER_TOKEN, PROMPT_TOKEN
from forebay_epp.core.terms import Endpoint, Request, Usage

A = "10.0.0.1:8000"


class Producing:
    """A controller and one server that makes a token of each running answer at a time.

    Args:
        slots: of the server.
        step: after how many tokens an answer's progress is reported; 0 for never.
    """

    def __init__(self, slots, step):
        band = BandPlan("Standard", 0, fairness=FairnessName.TOKEN_FAIR)
        saturation = SaturationPlan(SaturationMode.CONCURRENCY, slots)
        models = (ModelPlan("a", "Standard"), ModelPlan("b", "Standard"))
        plan = Plan(bands=(band,), models=models, saturation=saturation)
        self.controller = FlowController(plan, Random(1))
        self.controller.set_endpoints([Endpoint(A)], 0.0)
        self.step = step
        self.now = 0.0
        self.usages = {}
        self.requests = {}
        self.produced = {}
        self.order = []
        self.service = Counter()

    def submit(self, model, prompt, answer):
        number = len(self.requests)
        self.requests[number] = Request(number, model, 4 * prompt)
        self.usages[number] = Usage(prompt, answer)
        self.controller.submit(self.requests[number], self.now)

    def poll(self):
        for decision in self.controller.poll(self.now):
            number = decision.request_id
            self.produced[number] = 0
            self.order.append(self.requests[number].model)
            prompt = self.usages[number].prompt_tokens
            self.service[self.requests[number].model] += PROMPT_TOKEN * prompt

    def produce(self):
        """Let each running answer have one more token; return the models of those that ended."""
        self.now += 0.001
        ended = []
        for number in list(self.produced):
            self.produced[number] += 1
            tokens, model = self.produced[number], self.requests[number].model
            self.service[model] += ANSWER_TOKEN
            if tokens >= self.usages[number].completion_tokens:
                del self.produced[number]
                ended.append(model)
                self.controller.complete(number, self.usages[number], self.now)
            elif self.step and tokens % self.step == 0:
                self.controller.progress(number, tokens, self.now)
        self.poll()
        return ended

    def charged(self, model):
        """Return what the flow of a model has been charged since its first request."""
        (band,) = self.controller._bands.all
        flow = band.levels.flows[(model,)]
        return flow.rank - flow.credit


@settings(max_examples=100, deadline=None)
@given(
    answers=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 120)), min_size=1, max_size=12),
    slots=st.integers(1, 4),
    step=st.integers(0, 50),
)
def test_charges_come_to_the_exact_usage_in_whatever_steps(answers, slots, step):
    """To the last token, of a flow that has no other beside it."""
    server = Producing(slots, step)
    for prompt, answer in answers:
        server.submit("a", prompt, answer)
    server.poll()
    while server.produced:
        server.produce()

    assert server.charged("a") == pytest.approx(server.service["a"])


@pytest.mark.parametrize("seed", range(4))
def test_counters_never_lag_behind_production_by_more_than_a_step(seed):
    """And two flows that always wait differ within the published bound, token by token.

    Sheng et al., theorem 4.4: 2 max(prompt, batch).
    """
    random = Random(seed)
    slots, step, most_prompt, most_answer = 6, 32, 200, 300
    server = Producing(slots, step)
    bound = 2 * max(PROMPT_TOKEN * most_prompt, slots * ANSWER_TOKEN * most_answer)

    def arrive(model):
        server.submit(model, random.randrange(1, most_prompt), random.randrange(1, most_answer))

    for _ in range(20):
        arrive("a")
        arrive("b")
    server.poll()
    for _ in range(6000):
        for model in server.produce():
            arrive(model)
        for number, tokens in server.produced.items():
            assert tokens - server.requests[number].answer_tokens < step
        assert abs(server.service["a"] - server.service["b"]) <= bound


def test_a_flow_gets_no_further_slot_while_its_answer_proves_long():
    """Nothing is known of either flow. Charged at its end only, it would have taken both slots."""
    orders = {}
    for step in (16, 0):
        server = Producing(2, step)
        for _ in range(40):
            server.submit("a", 100, 2000)
            server.submit("b", 10, 40)
        server.poll()
        for _ in range(350):
            server.produce()
        orders[step] = Counter(server.order)

    assert orders[16]["a"] == 1
    assert orders[16]["b"] >= 8
    assert orders[0]["a"] == 2
