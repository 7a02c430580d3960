"""Fairness policies: which flow of a level is next.

A policy is arithmetic on ranks, and there is one for each level: between the flows of a band, and
where these have flows inside, between those of each. Of the flows that could use a free slot, the
one of the lowest rank is next, and of equal ranks the one whose next request comes first by the
inner level and the ordering. Finding it, past all flows that wait for another endpoint, is the work
of lanes.py, so no policy needs a queue of its own or has to know which flows are blocked.

To add a policy, write a class with the two methods of `Fairness` in a file of its own, name it in
`forebay_control.plan.FairnessName` and enter it in `FAIRNESS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from forebay_control.plan import FairnessName
from forebay_epp.core.fairness.fcfs import FCFS
from forebay_epp.core.fairness.round_robin import RoundRobin
from forebay_epp.core.fairness.token_fair import TokenFair
from forebay_epp.core.fairness.weighted_fair import WeightedFair, WeightedFairTokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from forebay_epp.core.terms import Cost


class Ranked(Protocol):
    """What a policy sees of a flow.

    Attributes:
        name: of the flow.
        rank: decides whose turn it is, the lowest first. Only the policy writes it. While the flow
            is active it may only grow.
        credit: what it has been charged too much; likewise.
        weight: its share relative to other flows'.
    """

    name: str
    rank: float
    credit: float
    weight: int


class Fairness(Protocol):
    """One policy of one level, which lives as long as the band or the flow around it keeps it."""

    def activate(self, flow: Ranked, now: float) -> None:
        """Rank a flow that had nothing waiting, and has now."""

    def charge(self, flow: Ranked, cost: Cost, now: float) -> None:
        """Charge a flow for what it got: a dispatch, or a correction of what that was charged.

        It may have nothing waiting by then, and be another object of the same name when it is
        activated next. A policy that remembers idle flows does so by name, and bounds how many.
        """


FAIRNESS: dict[FairnessName, Callable[[], Fairness]] = {
    FairnessName.FCFS: FCFS,
    FairnessName.ROUND_ROBIN: RoundRobin,
    FairnessName.WEIGHTED_FAIR: WeightedFair,
    FairnessName.WEIGHTED_FAIR_TOKENS: WeightedFairTokens,
    FairnessName.TOKEN_FAIR: TokenFair,
}
