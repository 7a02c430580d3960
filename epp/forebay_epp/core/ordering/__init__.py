"""Ordering policies: which request of one flow is next.

An ordering is the queue of one flow. How flows share does not belong here (fairness/).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from forebay_control.plan import OrderingName
from forebay_epp.core.ordering.fcfs import FCFS

if TYPE_CHECKING:
    from collections.abc import Callable

    from forebay_epp.core.terms import Request


class Ordering(Protocol):
    """A queue of requests. `head` and `pop` need a non-empty queue."""

    def __len__(self) -> int: ...

    def push(self, request: Request) -> None:
        """Add a request that is not in the queue."""

    def head(self) -> Request:
        """Return the next request and leave it."""

    def pop(self) -> Request:
        """Take the next request out."""

    def remove(self, request: Request) -> None:
        """Take out a request that is in the queue, wherever it stands."""


ORDERINGS: dict[OrderingName, Callable[[], Ordering]] = {OrderingName.FCFS: FCFS}
