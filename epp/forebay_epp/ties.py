"""The ties of requests whose answers come into view in streams of their own.

What a tie looks like on the wire belongs in codec/extproc/watching.py.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from forebay_epp.codec.extproc.watching import SECRET_LENGTH, Tie

CLAIM_SECONDS = 2.0
LOST_IN_A_ROW = 3
_SECRET_BYTES = SECRET_LENGTH // 2
_BYTES = 256 * _SECRET_BYTES  # one call to the system for so many


class _Tied(NamedTuple):
    request_id: int
    lost_at: float


class Ties:
    """Ties that were given out and wait for the stream that claims them.

    A tie is claimed once. One that is not claimed for `CLAIM_SECONDS` is lost: the client has gone
    before its request was on its way, or the proxy has no filter that observes. After
    `LOST_IN_A_ROW` of these the others are taken for lost at once, until a stream observes again.

    Args:
        owner: host:port where a proxy that knows several EPPs finds this one.
    """

    __slots__ = ("_lost", "_owner", "_random", "_tied")

    def __init__(self, owner: str = "") -> None:
        self._owner = owner
        self._tied: dict[str, _Tied] = {}  # in the order in which they are lost
        self._random = b""
        self._lost = 0

    def give(self, request_id: int, now: float) -> Tie:
        """Return a tie for a request that is dispatched now."""
        if not self._random:
            self._random = os.urandom(_BYTES)
        secret = self._random[:_SECRET_BYTES].hex()
        self._random = self._random[_SECRET_BYTES:]
        wait_seconds = CLAIM_SECONDS if self._lost < LOST_IN_A_ROW else 0.0
        self._tied[secret] = _Tied(request_id, now + wait_seconds)
        return Tie(secret, self._owner)

    def claim(self, secret: str) -> int | None:
        """Return the request of a tie, the first time; None if there is none, or no tie."""
        if not secret:
            return None
        self._lost = 0
        tied = self._tied.pop(secret, None)
        return None if tied is None else tied.request_id

    def lose(self, now: float) -> int | None:
        """Return the next request whose tie is lost; None if there is none."""
        for secret, tied in self._tied.items():
            if now < tied.lost_at:
                return None
            del self._tied[secret]
            self._lost += 1
            return tied.request_id
        return None
