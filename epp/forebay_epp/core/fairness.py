"""Fairness policies: which flow of one band is next.

A policy is the queue of all requests that compete for the same endpoints in one band; inside a
flow the ordering decides. Adding a policy is a class, a line in FAIRNESS and a plan.FairnessName.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from forebay_control.plan import FairnessName

if TYPE_CHECKING:
    from collections.abc import Callable

    from forebay_epp.core.ordering import Ordering
    from forebay_epp.core.terms import Request


class FCFS:
    """No fairness between flows: the ordering runs over all requests as if they were one flow."""

    __slots__ = ("_queue",)

    def __init__(self, ordering: Callable[[], Ordering]) -> None:
        self._queue = ordering()

    def __len__(self) -> int:
        return len(self._queue)

    def push(self, request: Request) -> None:
        """Add a request that is not in the queue."""
        self._queue.push(request)

    def head(self) -> Request:
        """Return the next request and leave it."""
        return self._queue.head()

    def pop(self) -> Request:
        """Take the next request out."""
        return self._queue.pop()

    def remove(self, request: Request) -> None:
        """Take out a request that is in the queue."""
        self._queue.remove(request)


class RoundRobin:
    """Each flow with requests waiting gets one dispatch in turn (Nagle, RFC 970).

    Among n backlogged flows none is ever more than one dispatch ahead of another. A flow that
    becomes active joins behind all others. Every operation is O(1) in requests and in flows.
    """

    __slots__ = ("_flows", "_length", "_ordering")

    def __init__(self, ordering: Callable[[], Ordering]) -> None:
        self._ordering = ordering
        self._flows: OrderedDict[str, Ordering] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def push(self, request: Request) -> None:
        """Add the request to its flow."""
        queue = self._flows.get(request.flow)
        if queue is None:
            queue = self._flows[request.flow] = self._ordering()
        queue.push(request)
        self._length += 1

    def head(self) -> Request:
        """Return the next request of the flow whose turn it is."""
        return next(iter(self._flows.values())).head()

    def pop(self) -> Request:
        """Take the next request of the flow whose turn it is; the turn passes on."""
        flow, queue = next(iter(self._flows.items()))
        request = queue.pop()
        self._length -= 1
        if queue:
            self._flows.move_to_end(flow)
        else:
            del self._flows[flow]
        return request

    def remove(self, request: Request) -> None:
        """Take out this request; it does not use up its flow's turn."""
        queue = self._flows[request.flow]
        queue.remove(request)
        self._length -= 1
        if not queue:
            del self._flows[request.flow]


Fairness = FCFS | RoundRobin

FAIRNESS: dict[FairnessName, Callable[[Callable[[], Ordering]], Fairness]] = {
    FairnessName.FCFS: FCFS,
    FairnessName.ROUND_ROBIN: RoundRobin,
}
