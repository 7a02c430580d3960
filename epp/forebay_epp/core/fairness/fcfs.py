"""No fairness: first come, first served over all flows."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forebay_epp.core.fairness import Ranked
    from forebay_epp.core.terms import Cost


class FCFS:
    """All flows have the same rank, so the ordering runs over all requests as if of one flow."""

    __slots__ = ()

    def activate(self, flow: Ranked, now: float) -> None:  # noqa: ARG002  # all are equal
        """Give the flow the rank of all."""
        flow.rank = 0.0

    def charge(self, flow: Ranked, cost: Cost, now: float) -> None:
        """Charge nothing."""
