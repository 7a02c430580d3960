"""Each flow in turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forebay_epp.core.fairness import Ranked
    from forebay_epp.core.terms import Cost


class RoundRobin:
    """Each flow with requests waiting gets one dispatch in turn (Nagle, RFC 970).

    A rank is the number of a turn. Among n flows that could use any free slot none is ever more
    than one dispatch ahead of another. A flow that becomes active joins behind all others, and one
    that is blocked for a while keeps its turn.
    """

    __slots__ = ("_turns",)

    def __init__(self) -> None:
        self._turns = 0

    def activate(self, flow: Ranked, now: float) -> None:  # noqa: ARG002  # turns are not timed
        """Put the flow behind all others."""
        self._turns += 1
        flow.rank = self._turns

    def charge(self, flow: Ranked, cost: Cost, now: float) -> None:  # noqa: ARG002
        """Put the flow behind all others, once for each dispatch."""
        if cost.requests:
            self._turns += 1
            flow.rank = self._turns
