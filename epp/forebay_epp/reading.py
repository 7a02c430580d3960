"""Requests that are still being read: how long they may take and how much they may hold.

Slow clients must not keep others out, neither by streams nor by bytes. The request that is given up
is always one of the connection that holds most. Refusing it belongs in intake.py.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice

SILENT_STREAM_SECONDS = 10.0
READ_REQUEST_SECONDS = 30.0

# So many of the oldest unfinished bodies are compared to find the one to give up. More would not
# find a better one, and a connection can hold thousands.
COMPARED_BODIES = 64


class Unread:
    """A request that is not complete.

    Attributes:
        exchange_id: the exchange that reads it.
        peer: the connection it comes on.
        opened_at: in monotonic seconds.
        begun: whether its stream has said anything.
        size_bytes: of its body so far.
    """

    __slots__ = ("begun", "exchange_id", "opened_at", "peer", "size_bytes")

    def __init__(self, exchange_id: int, peer: str, opened_at: float) -> None:
        self.exchange_id = exchange_id
        self.peer = peer
        self.opened_at = opened_at
        self.begun = False
        self.size_bytes = 0


class _Connection:
    """The unread requests of one connection, oldest first, and their bytes."""

    __slots__ = ("requests", "size_bytes")

    def __init__(self) -> None:
        self.requests: dict[Unread, None] = {}  # for its order
        self.size_bytes = 0


class Reading:
    """All unread requests.

    Attributes:
        size_bytes: what they hold together.
    """

    def __init__(self) -> None:
        self.size_bytes = 0
        self._connections: dict[str, _Connection] = {}
        self._silent: OrderedDict[Unread, float] = OrderedDict()
        self._begun: OrderedDict[Unread, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._silent) + len(self._begun)

    def open(self, exchange_id: int, peer: str, now: float) -> Unread:
        """Await a request on a new stream."""
        unread = Unread(exchange_id, peer, now)
        connection = self._connections.get(peer)
        if connection is None:
            connection = self._connections[peer] = _Connection()
        connection.requests[unread] = None
        self._silent[unread] = now + SILENT_STREAM_SECONDS
        return unread

    def begin(self, unread: Unread, now: float) -> None:
        """Its stream has said something for the first time: now the request has to be completed."""
        unread.begun = True
        del self._silent[unread]
        self._begun[unread] = now + READ_REQUEST_SECONDS

    def grow(self, unread: Unread, size_bytes: int) -> None:
        """Add a part of its body."""
        unread.size_bytes += size_bytes
        self._connections[unread.peer].size_bytes += size_bytes
        self.size_bytes += size_bytes

    def end(self, unread: Unread) -> None:
        """Forget a request that is complete or no longer needed."""
        connection = self._connections[unread.peer]
        del connection.requests[unread]
        connection.size_bytes -= unread.size_bytes
        self.size_bytes -= unread.size_bytes
        if not connection.requests:
            del self._connections[unread.peer]
        del (self._begun if unread.begun else self._silent)[unread]

    def slowest(self, now: float) -> Unread:
        """Return a body of the connection whose unread bodies are largest.

        Of its oldest ones it is the one that has kept most bytes for longest.
        """
        connection = max(self._connections.values(), key=lambda c: c.size_bytes)
        oldest = islice(connection.requests, COMPARED_BODIES)
        return max(oldest, key=lambda unread: unread.size_bytes * (now - unread.opened_at))

    def oldest(self) -> Unread | None:
        """Return the oldest request of the connection that has most; None if there is none."""
        if not self._connections:
            return None
        connection = max(self._connections.values(), key=lambda c: len(c.requests))
        return next(iter(connection.requests))

    def silent(self, now: float) -> Unread | None:
        """Return a request whose stream has said nothing for `SILENT_STREAM_SECONDS`."""
        return _overdue(self._silent, now)

    def late(self, now: float) -> Unread | None:
        """Return a request that is not complete `READ_REQUEST_SECONDS` after it has begun."""
        return _overdue(self._begun, now)


def _overdue(deadlines: OrderedDict[Unread, float], now: float) -> Unread | None:
    """Return the first one if its deadline has passed; all have the same time to go."""
    first = next(iter(deadlines.items()), None)
    return first[0] if first is not None and first[1] <= now else None
