"""Classifies a request: its band, its flow, and the model name under which it is sent on.

Queueing belongs in bands.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay_control.plan import UnmatchedAction

if TYPE_CHECKING:
    from forebay_control.plan import ModelPlan, Plan
    from forebay_epp.core.terms import RandomSource, Request

UNMATCHED_FLOW = ""  # no model has this name


class Classifier:
    """Reads a plan's models and objectives.

    Args:
        plan: a valid plan.
    """

    def __init__(self, plan: Plan) -> None:
        self._unmatched_band = (
            plan.unmatched.band if plan.unmatched.action is UnmatchedAction.QUEUE else None
        )
        self._models = {model.name: model for model in plan.models}
        self._targeting = _targeting(plan)
        self._objectives = (
            {objective.name: objective.band for objective in plan.objectives}
            if plan.trust_objective_header
            else {}
        )

    def classify(self, request: Request) -> bool:
        """Find the request's band, its flow and how soon it is due, and write them on it.

        A model of the plan is a flow of its own. A name that models of the plan are rewritten to
        joins the least critical of them: a request for it directly gets no better band than
        those it is configured for. Every other name, and none, is in one flow: names come from
        callers, and invented ones must not take turns.

        Returns:
            False when the plan rejects unmatched models and this is one.
        """
        model = self._models.get(request.model) or self._targeting.get(request.model)
        if model is not None:
            name, request.flow = model.band, model.name
            if request.due_in_seconds is None and model.time_to_first_token_seconds:
                request.due_in_seconds = model.time_to_first_token_seconds
        else:
            if self._unmatched_band is None:
                return False
            name, request.flow = self._unmatched_band, UNMATCHED_FLOW
        if request.objective:
            name = self._objectives.get(request.objective, name)
        request.band = name
        return True

    def draw_target(self, model_name: str, random: RandomSource) -> str | None:
        """Draw the name to send upstream by weight, or None to keep the client's.

        A name that is only a target is kept: the client has chosen already.
        """
        model = self._models.get(model_name)
        if model is None or not model.targets:
            return None
        drawn = random.randrange(sum(target.weight for target in model.targets))
        for target in model.targets:
            drawn -= target.weight
            if drawn < 0:
                return target.name if target.name != model_name else None
        raise AssertionError("weights are positive")


def _targeting(plan: Plan) -> dict[str, ModelPlan]:
    """Return by target name the model of the lowest band that targets it, the first of equals."""
    priorities = {band.name: band.priority for band in plan.bands}
    found: dict[str, ModelPlan] = {}
    for model in sorted(plan.models, key=lambda model: priorities[model.band]):
        for target in model.targets:
            found.setdefault(target.name, model)
    return found
