"""The shortest prompt first, with ageing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay_epp.core.ordering.ranked import RankedQueue

if TYPE_CHECKING:
    from forebay_epp.core.ordering import Rank
    from forebay_epp.core.terms import Request

SECONDS_PER_BYTE = 0.00025  # about a millisecond a token


class ShortestPrompt(RankedQueue):
    """Lets a request go before those that came earlier and have a longer prompt.

    Shortest job first has the least mean wait (Smith, Naval Research Logistics 3, 1956) and starves
    long jobs. Here a prompt gives way only to what comes within `SECONDS_PER_BYTE` for each byte
    that it is longer: one of 10,000 tokens to short ones for 10 s. So no request waits longer than
    that beyond its turn in order of arrival.
    """

    __slots__ = ()

    def rank_of(self, request: Request) -> Rank:
        """Return when the request came, and later the longer its prompt is."""
        return request.enqueued_at + SECONDS_PER_BYTE * request.size_bytes, request.sequence
