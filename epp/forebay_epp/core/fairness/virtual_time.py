"""Fair queueing by virtual time, whatever the service is counted in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forebay_epp.core.fairness import Ranked
    from forebay_epp.core.terms import Cost


class VirtualTime(ABC):
    """Ranks a flow by the service that it has had, over its weight.

    Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996). A flow's rank is the start tag of
    its next request. Virtual time is the start tag of the last request that was dispatched, so the
    one of the flow of the least rank. While two flows wait and could use the same slots, the
    services they get, over their weights, differ by no more than the largest charge of the one plus
    the largest of the other, each over its weight.

    A flow that has had nothing waiting starts at virtual time: it earns no credit by idling. One
    that could not use the slots there were keeps its turn, one dispatch, and otherwise starts there
    as well: being blocked earns none either.

    What a flow was charged too much, because an estimate was too high, is credit towards its next
    charges, for a rank never falls.
    """

    __slots__ = ("_now",)

    def __init__(self) -> None:
        self._now = 0.0

    @abstractmethod
    def service(self, cost: Cost) -> float:
        """Return the service in a charge; below 0 where it corrects an earlier one."""

    def activate(self, flow: Ranked, now: float) -> None:  # noqa: ARG002  # its time is virtual
        """Let the flow start at virtual time, or where it left off if that is later."""
        flow.rank = max(flow.rank, self._now)

    def charge(self, flow: Ranked, cost: Cost, now: float) -> None:  # noqa: ARG002
        """Move the flow on by the service over its weight."""
        if cost.requests:
            self._now = flow.rank = max(flow.rank, self._now)
        owed = self.service(cost) / flow.weight - flow.credit
        if owed > 0.0:
            flow.rank += owed
            flow.credit = 0.0
        else:
            flow.credit = -owed
