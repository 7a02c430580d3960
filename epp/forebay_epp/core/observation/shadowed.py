"""A flow controller with a shadow beside it.

Deciding does not belong here (controller.py), nor how the shadow's answers end (shadow.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from forebay_control.plan import Mode
from forebay_epp.core.controller import FlowController
from forebay_epp.core.observation.shadow import Shadow
from forebay_epp.core.terms import Outcome, Refused, Usage, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable

    from forebay_control.plan import Plan
    from forebay_control.shares import Shares
    from forebay_epp.core.residency import Produced
    from forebay_epp.core.terms import (
        ControllerState,
        Decision,
        Endpoint,
        EndpointMetrics,
        RandomSource,
        Request,
        Shadowed,
    )

_OF_THE_PLAN = {
    Outcome.REJECTED_UNKNOWN_MODEL,
    Outcome.REJECTED_QUEUE_FULL,
    Outcome.EVICTED_TTL,
    Outcome.EVICTED_DISPLACED,
}


class ShadowedController(FlowController):
    """Flow control of one pool, and beside it what another plan would decide.

    That is the plan's own where it only observes, and otherwise its shadow, if it has one. A shadow
    begins with nothing in it: what was in flight before is not its own.
    """

    def __init__(self, plan: Plan, random: RandomSource) -> None:
        super().__init__(plan, random)
        self._endpoints_given: tuple[Endpoint, ...] = ()
        self._shadow: Shadow | None = None
        self._cast_shadow(plan, 0.0)

    def _cast_shadow(self, plan: Plan, now: float) -> None:
        tried = plan if plan.mode is Mode.OBSERVE else plan.shadow
        if tried is None:
            self._shadow = None
        elif self._shadow is not None:
            self._shadow.reconfigure(tried, now)
        else:
            self._shadow = Shadow(tried, self._random)
            self._shadow.set_endpoints(self._endpoints_given, now)
            if (shares := self._endpoints.shares) is not None:
                slots = {each.address: each.share or 0 for each in self._endpoints.present}
                shares = replace(shares, slots=slots, full=True, most={})
                self._shadow.set_shares(shares, now)

    def reconfigure(self, plan: Plan, now: float) -> None:
        """As `FlowController.reconfigure`, for the shadow too."""
        super().reconfigure(plan, now)
        self._cast_shadow(plan, now)

    def set_endpoints(self, endpoints: Iterable[Endpoint], now: float) -> None:
        """As `FlowController.set_endpoints`."""
        self._endpoints_given = tuple(endpoints)
        super().set_endpoints(self._endpoints_given, now)
        if self._shadow is not None:
            self._shadow.set_endpoints(self._endpoints_given, now)

    def set_shares(self, shares: Shares, now: float) -> None:
        """As `FlowController.set_shares`; the shadow gets no others than those in force."""
        super().set_shares(shares, now)
        if self._shadow is not None:
            self._shadow.set_shares(shares, now)

    def relax_shares(self) -> None:
        """As `FlowController.relax_shares`."""
        super().relax_shares()
        if self._shadow is not None:
            self._shadow.relax_shares()

    def charge_produced(self, produced: Produced, now: float) -> None:
        """As `FlowController.charge_produced`."""
        super().charge_produced(produced, now)
        if self._shadow is not None:
            request, tokens = produced.request, round(produced.tokens)
            if produced.ended:
                self._shadow.estimated(request, Usage(request.prompt_tokens, tokens))
            else:
                self._shadow.progress(request.id, tokens, now)

    def observe(self, metrics: EndpointMetrics, now: float) -> None:
        """As `FlowController.observe`."""
        if self._shadow is not None:
            self._shadow.observe(metrics, self.seen_at(metrics.address), now)
        super().observe(metrics, now)

    def scrape_failed(self, address: str, now: float, *, refused: bool) -> None:
        """As `FlowController.scrape_failed`."""
        super().scrape_failed(address, now, refused=refused)
        if self._shadow is not None:
            self._shadow.scrape_failed(address, now, refused=refused)

    def submit(self, request: Request, now: float) -> None:
        """As `FlowController.submit`."""
        FlowController.submit(self, request, now)
        if self._shadow is not None:
            self._shadow.submit(request, now)

    def cancel(self, request_id: int, now: float) -> None:
        """As `FlowController.cancel`."""
        FlowController.cancel(self, request_id, now)
        if self._shadow is not None:
            self._shadow.cancel(request_id, now)

    def first_token(self, request_id: int, now: float) -> None:
        """As `FlowController.first_token`."""
        FlowController.first_token(self, request_id, now)
        if self._shadow is not None:
            self._shadow.first_token(request_id, now)

    def progress(self, request_id: int, answer_tokens: int, now: float) -> None:
        """As `FlowController.progress`."""
        FlowController.progress(self, request_id, answer_tokens, now)
        if self._shadow is not None:
            self._shadow.progress(request_id, answer_tokens, now)

    def complete(
        self,
        request_id: int,
        usage: Usage | None,
        now: float,
        verdict: Verdict = Verdict.UNKNOWN,
        *,
        blind: bool = False,
    ) -> None:
        """As `FlowController.complete`."""
        FlowController.complete(self, request_id, usage, now, verdict, blind=blind)
        if self._shadow is not None:
            self._shadow.complete(request_id, usage, now, verdict, blind=blind)

    def poll(self, now: float) -> list[Decision]:
        """As `FlowController.poll`.

        A request that the plan refuses stays in the shadow; one that is refused for another reason
        leaves it too.
        """
        decisions = FlowController.poll(self, now)
        if self._shadow is not None:
            for decision in decisions:
                if isinstance(decision, Refused):
                    if decision.outcome in _OF_THE_PLAN:
                        self._shadow.refused(decision.request_id, now)
                    else:
                        self._shadow.cancel(decision.request_id, now)
        return decisions

    def take_shadowed(self, now: float) -> list[Shadowed]:
        """Return what the shadow, if there is one, would have decided since the last call.

        It keeps no request waiting, so how often this is called changes nothing but when it is
        known.
        """
        return [] if self._shadow is None else self._shadow.take_decisions(now)

    def state(self, now: float, max_flows: int | None = None) -> ControllerState:
        """As `FlowController.state`, with the shadow's."""
        state = super().state(now, max_flows)
        if self._shadow is None:
            return state
        return replace(state, shadow=self._shadow.state(now, max_flows))
