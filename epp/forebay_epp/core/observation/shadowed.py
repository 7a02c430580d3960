"""A flow controller with a shadow beside it.

Deciding does not belong here (controller.py), nor how the shadow's answers end (shadow.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from forebay_control.plan import Mode
from forebay_epp.core.controller import FlowController
from forebay_epp.core.observation.shadow import Shadow
from forebay_epp.core.terms import Refused, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable

    from forebay_control.plan import Plan
    from forebay_epp.core.terms import (
        ControllerState,
        Decision,
        Endpoint,
        EndpointMetrics,
        RandomSource,
        Request,
        Shadowed,
        Usage,
    )


class ShadowedController(FlowController):
    """Flow control of one pool; where its plan only observes, what it would decide as well.

    A shadow begins with nothing in it: what was in flight before is not its own.
    """

    def __init__(self, plan: Plan, random: RandomSource) -> None:
        super().__init__(plan, random)
        self._endpoints_given: tuple[Endpoint, ...] = ()
        self._shadow: Shadow | None = None
        self._cast_shadow(plan, 0.0)

    def _cast_shadow(self, plan: Plan, now: float) -> None:
        if plan.mode is not Mode.OBSERVE:
            self._shadow = None
        elif self._shadow is not None:
            self._shadow.reconfigure(plan, now)
        else:
            self._shadow = Shadow(plan, self._random)
            self._shadow.set_endpoints(self._endpoints_given, now)

    def reconfigure(self, plan: Plan, now: float) -> None:
        """As `FlowController.reconfigure`; in mode Observe the shadow takes the plan too."""
        super().reconfigure(plan, now)
        self._cast_shadow(plan, now)

    def set_endpoints(self, endpoints: Iterable[Endpoint], now: float) -> None:
        """As `FlowController.set_endpoints`."""
        self._endpoints_given = tuple(endpoints)
        super().set_endpoints(self._endpoints_given, now)
        if self._shadow is not None:
            self._shadow.set_endpoints(self._endpoints_given, now)

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
        """As `FlowController.poll`; a request that is refused in fact leaves the shadow too."""
        decisions = FlowController.poll(self, now)
        if self._shadow is not None:
            for decision in decisions:
                if isinstance(decision, Refused):
                    self._shadow.cancel(decision.request_id, now)
        return decisions

    def take_shadowed(self, now: float) -> list[Shadowed]:
        """Return what the plan would have decided since the last call, if it only observes.

        The shadow keeps no one waiting, so how often this is called changes nothing but when it is
        known.
        """
        return [] if self._shadow is None else self._shadow.take_decisions(now)

    def state(self, now: float, max_flows: int | None = None) -> ControllerState:
        """As `FlowController.state`, with the shadow's."""
        state = super().state(now, max_flows)
        if self._shadow is None:
            return state
        return replace(state, shadow=self._shadow.state(now, max_flows))
