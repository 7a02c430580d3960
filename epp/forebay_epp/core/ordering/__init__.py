"""Ordering policies: which request of one flow is next.

An ordering is the queue of one lane: the requests of one flow that may go to the same endpoints.
How flows share does not belong here (fairness/).

To add a policy, write a class with the methods of `Ordering` in a file of its own (with a rank
that each request keeps, one method on top of `RankedQueue`), name it in
`forebay_control.plan.OrderingName` and enter it in `ORDERINGS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from forebay_control.plan import OrderingName
from forebay_epp.core.ordering.earliest_deadline import EarliestDeadline
from forebay_epp.core.ordering.fcfs import FCFS
from forebay_epp.core.ordering.shortest_prompt import ShortestPrompt

if TYPE_CHECKING:
    from collections.abc import Callable

    from forebay_epp.core.terms import Request

Rank = float | tuple[float, int]
"""The lowest is first. All ranks of one ordering have the same type, but infinity is none's."""


class Ordering(Protocol):
    """A queue of requests.

    The lowest rank is first, and no two requests of a band have the same.
    """

    def push(self, request: Request) -> Rank:
        """Add a request that is not in the queue; return the rank of the next one."""

    def rank(self) -> Rank:
        """Return the rank of the next request, or infinity if there is none."""

    def head(self) -> Request:
        """Return the next request of a queue that is not empty, and leave it."""

    def pop(self) -> Request:
        """Take the next request out of a queue that is not empty."""

    def remove(self, request: Request) -> None:
        """Take out a request that is in the queue, wherever it stands."""


ORDERINGS: dict[OrderingName, Callable[[], Ordering]] = {
    OrderingName.FCFS: FCFS,
    OrderingName.EARLIEST_DEADLINE: EarliestDeadline,
    OrderingName.SHORTEST_PROMPT: ShortestPrompt,
}
