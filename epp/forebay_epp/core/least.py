"""The least of many, where what they are ranked by changes underneath.

A heap (Williams, 1964) that is corrected only when it is read: an entry that is out of date is
replaced when it comes up, one of a member that has left is dropped. So a change of rank costs
nothing until it matters.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush, heapreplace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
SPARE_ENTRIES = 16


class Least(Generic[T]):
    """Finds the member of the least key.

    Keys may grow at any time. A key that falls must be reported by adding the member again.

    Args:
        key: of a member; no two members have the same. None means that the member has left.
    """

    __slots__ = ("_entries", "_heap", "_key")

    def __init__(self, key: Callable[[T], Any]) -> None:
        self._key = key
        self._entries: dict[T, tuple[Any, T]] = {}
        self._heap: list[tuple[Any, T]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, member: T) -> None:
        """Add a member, or take note that its key has become less."""
        heap = self._heap
        if len(heap) > 2 * len(self._entries) + SPARE_ENTRIES:
            heap[:] = self._entries.values()
            heapify(heap)
        entry = self._entries[member] = (self._key(member), member)
        heappush(heap, entry)

    def discard(self, member: T) -> None:
        """Let a member leave; one that is none is ignored."""
        self._entries.pop(member, None)

    def first(self) -> T | None:
        """Return the member of the least key, or None without any."""
        heap = self._heap
        entries = self._entries
        while heap:
            entry = heap[0]
            known, member = entry
            if entries.get(member) is not entry:
                heappop(heap)
                continue
            key = self._key(member)
            if key == known:
                return member
            if key is None:
                heappop(heap)
                del entries[member]
                continue
            entry = entries[member] = (key, member)
            heapreplace(heap, entry)
        return None
