"""Each flow in turn."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from forebay_epp.core.ordering import Ordering
    from forebay_epp.core.terms import Request


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
