"""What flows that share tokens are charged for, by whose turn it is afterwards."""

from __future__ import annotations

from random import Random

from forebay_control.plan import (
    BandPlan,
    FairnessName,
    ModelPlan,
    Plan,
    SaturationMode,
    SaturationPlan,
)
from forebay_epp.core.controller import FlowController
from forebay_epp.core.terms import Endpoint, Request, Usage, Verdict

BAND = BandPlan("Standard", 0, FairnessName.TOKEN_FAIR)
PLAN = Plan(
    bands=(BAND,),
    models=tuple(ModelPlan(name, "Standard") for name in "ab"),
    saturation=SaturationPlan(SaturationMode.CONCURRENCY, 1),
)


class Server:
    """One that takes a request at a time, behind a controller with requests of models a and b."""

    def __init__(self, each: int) -> None:
        self.controller = FlowController(PLAN, Random(1))
        self.controller.set_endpoints([Endpoint("10.0.0.1:8000")], 0.0)
        self.models = ["ab"[number % 2] for number in range(2 * each)]
        for number, model in enumerate(self.models):
            self.controller.submit(Request(number, model, 400, None, None, 60.0), 0.0)

    def order(self, usages: dict[str, Usage], seen: dict[str, int]) -> str:
        """Serve all, with these usages and tokens that are seen before the end, by model."""
        order = ""
        while decisions := self.controller.poll(0.0):
            (decision,) = decisions
            model = self.models[decision.request_id]
            order += model
            if model in seen:
                self.controller.first_token(decision.request_id, 0.0)
                self.controller.progress(decision.request_id, seen[model], 0.0)
            self.controller.complete(decision.request_id, usages[model], 0.0, Verdict.GOOD)
        return order


def test_what_was_in_the_servers_cache_is_not_charged():
    """A flow whose prompts are cached has many turns for one of a flow whose prompts are not."""
    usages = {"a": Usage(1000, 1, 1000), "b": Usage(1000, 1, 0)}

    order = Server(8).order(usages, {})

    assert order.startswith("abaaaaaaa")


def test_an_answer_that_is_seen_as_it_is_produced_is_charged_once():
    """Its end corrects the sum to its usage, like that of an answer that was not seen."""
    usage = Usage(100, 1000)

    order = Server(8).order({"a": usage, "b": usage}, {"a": 1000})

    assert order == "ab" * 8
