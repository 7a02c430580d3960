"""A queue for orderings that give each request a rank when it comes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from forebay_epp.core.terms import NEVER

if TYPE_CHECKING:
    from forebay_epp.core.ordering import Rank
    from forebay_epp.core.terms import Request

SPARE_ENTRIES = 16


class RankedQueue(ABC):
    """A heap in which what was removed stays until it comes up, or is half of it: O(log n)."""

    __slots__ = ("_heap", "_requests")

    def __init__(self) -> None:
        self._heap: list[tuple[Rank, Request]] = []
        self._requests: dict[int, Request] = {}  # by sequence

    @abstractmethod
    def rank_of(self, request: Request) -> Rank:
        """Return the rank of a request, which never changes and no other has."""

    def push(self, request: Request) -> Rank:
        """Add the request at its place."""
        self._requests[request.sequence] = request
        heappush(self._heap, (self.rank_of(request), request))
        return self.rank()

    def rank(self) -> Rank:
        """Return the rank of the next request."""
        heap = self._heap
        while heap:
            rank, request = heap[0]
            if request.sequence in self._requests:
                return rank
            heappop(heap)
        return NEVER

    def head(self) -> Request:
        """Return the next request."""
        self.rank()
        return self._heap[0][1]

    def pop(self) -> Request:
        """Take out the next request."""
        self.rank()
        _, request = heappop(self._heap)
        del self._requests[request.sequence]
        return request

    def remove(self, request: Request) -> None:
        """Take out this request."""
        del self._requests[request.sequence]
        if len(self._heap) > 2 * len(self._requests) + SPARE_ENTRIES:
            self._heap = [entry for entry in self._heap if entry[1].sequence in self._requests]
            heapify(self._heap)
