"""Recipes that share, through a real Envoy: what the headers of real requests get of a server.

Everything waits before the server answers for the first time, and what counts is the order in which
requests reach it. So a slow machine changes nothing. tests/scenarios/test_cookbook.py plays the
same recipes in virtual time.
"""

from __future__ import annotations

import json
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from envoy_process import Envoy, ModelServer
from ext_proc_peer import until

from forebay_control.plan import SaturationMode, SaturationPlan
from forebay_epp.core.fairness.token_fair import ANSWER_TOKEN, PROMPT_TOKEN
from forebay_operator import planning
from forebay_operator.standalone import sources

EXAMPLES = Path(__file__).parents[2] / "crds/examples"
TENANT, OLD_TENANT = "x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id"
OBJECTIVE = "x-llm-d-inference-objective"
SLOTS = 2
PATIENCE_SECONDS = 30.0


def plan_of(recipe: str):
    """What the operator makes of a recipe, for a server whose slots need not be learned."""
    resources = sources.read(EXAMPLES / recipe).resources
    (pool,) = planning.pools(resources)
    plan = planning.plan(pool, resources).plan
    return replace(plan, saturation=SaturationPlan(SaturationMode.CONCURRENCY, SLOTS))


class Stack:
    """A model server with two slots, an EPP that runs a recipe, and an Envoy."""

    def __init__(self, recipe: str, start, folder: Path) -> None:
        self.server = ModelServer()
        self.server.hold.clear()
        self._epp = start(plan=plan_of(recipe), endpoints=(self.server.address,))
        self._envoy = Envoy(folder, self._epp.transport.port)
        self._sent = []

    def send(self, count: int, answer_tokens: int = 10, **headers: str) -> None:
        """Send requests without waiting for their answers."""
        body = json.dumps({"model": "llama-chat", "max_tokens": answer_tokens})
        for _ in range(count):
            connection = self._envoy.connect()
            connection.request("POST", "/v1/chat/completions", body, headers)
            self._sent.append(connection)

    def take_slots(self) -> None:
        """Have the server hold as many requests as it takes."""
        self.send(SLOTS)
        until(lambda: len(self.server.seen) == SLOTS, PATIENCE_SECONDS)

    def served(self, count: int) -> list[dict]:
        """Once all wait, let the server answer; return the first that reach it then."""
        waiting = len(self._sent) - SLOTS
        until(lambda: self._epp.state().requests == waiting, PATIENCE_SECONDS)
        self.server.hold.set()
        until(lambda: len(self.server.seen) == len(self._sent), PATIENCE_SECONDS)
        for connection in self._sent:
            with closing(connection):
                assert connection.getresponse().status == 200
        return self.server.seen[SLOTS : SLOTS + count]

    def stop(self) -> None:
        for connection in self._sent:
            connection.close()
        self._envoy.stop()
        self.server.stop()


@pytest.fixture
def stack_of(start, tmp_path):
    """Start a recipe's stack, which stops with the test."""
    started = []

    def begin(recipe: str) -> Stack:
        started.append(Stack(recipe, start, tmp_path))
        return started[-1]

    yield begin
    for stack in started:
        stack.stop()


def test_tenants_get_as_many_tokens_as_each_other(stack_of):
    """However long their answers are and however many requests they send first.

    A tenant is the same by the header's older name.
    """
    stack = stack_of("tenants-by-token")
    stack.take_slots()
    stack.send(120, answer_tokens=60, **{TENANT: "greedy"})
    stack.send(110, answer_tokens=20, **{TENANT: "a"})
    stack.send(55, answer_tokens=20, **{OLD_TENANT: "b"})
    stack.send(55, answer_tokens=20, **{TENANT: "b"})

    tokens: Counter[str] = Counter()
    for seen in stack.served(200):
        headers = seen["headers"]
        answer_tokens = json.loads(seen["body"])["max_tokens"]
        tokens[headers.get(TENANT) or headers[OLD_TENANT]] += (
            PROMPT_TOKEN * 3 + ANSWER_TOKEN * answer_tokens
        )

    for tenant in ("greedy", "a", "b"):
        assert tokens[tenant] == pytest.approx(tokens.total() / 3, rel=0.1)


def test_subscribers_get_what_they_pay_for(stack_of):
    """A tenth of the dispatches is for those who do not pay; of the rest acme has three of four."""
    stack = stack_of("subscription")
    stack.take_slots()
    stack.send(60, **{OBJECTIVE: "free"})
    stack.send(90, **{TENANT: "globex"})
    stack.send(180, **{TENANT: "acme"})

    counts = Counter(
        seen["headers"].get(TENANT) or seen["headers"][OBJECTIVE] for seen in stack.served(200)
    )

    for caller, share in {"free": 20, "globex": 45, "acme": 135}.items():
        assert counts[caller] == pytest.approx(share, rel=0.1)
