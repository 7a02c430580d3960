"""First come, first served."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from forebay_epp.core.terms import NEVER

if TYPE_CHECKING:
    from forebay_epp.core.terms import Request


class FCFS:
    """Every operation is O(1), removal from the middle included."""

    __slots__ = ("_requests",)

    def __init__(self) -> None:
        self._requests: OrderedDict[int, Request] = OrderedDict()

    def push(self, request: Request) -> float:
        """Add the request behind all others."""
        self._requests[request.sequence] = request
        return next(iter(self._requests))

    def rank(self) -> float:
        """Return the place of the oldest request among all that the band has ever had."""
        return next(iter(self._requests), NEVER)

    def head(self) -> Request:
        """Return the oldest request."""
        return next(iter(self._requests.values()))

    def pop(self) -> Request:
        """Take out the oldest request."""
        return self._requests.popitem(last=False)[1]

    def remove(self, request: Request) -> None:
        """Take out this request."""
        del self._requests[request.sequence]
