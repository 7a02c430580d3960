"""No fairness: first come, first served over all flows."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
