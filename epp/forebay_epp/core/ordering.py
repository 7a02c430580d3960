"""Ordering policies: which request of one flow is next.

An ordering is the queue of one flow. How flows share is fairness.py's business.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Protocol

from forebay_control.plan import OrderingName

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


class FCFS:
    """First come, first served; every operation O(1), removal from the middle included."""

    __slots__ = ("_requests",)

    def __init__(self) -> None:
        self._requests: OrderedDict[int, Request] = OrderedDict()

    def __len__(self) -> int:
        return len(self._requests)

    def push(self, request: Request) -> None:
        """Add the request behind all others."""
        self._requests[request.id] = request

    def head(self) -> Request:
        """Return the oldest request."""
        return next(iter(self._requests.values()))

    def pop(self) -> Request:
        """Take out the oldest request."""
        return self._requests.popitem(last=False)[1]

    def remove(self, request: Request) -> None:
        """Take out this request."""
        del self._requests[request.id]


ORDERINGS: dict[OrderingName, Callable[[], Ordering]] = {OrderingName.FCFS: FCFS}
