"""A limit for a server of which nothing is known but when its answers end.

It has no page, or one that shows nothing running while all slots are taken: the gauges are missing,
or answers are shorter than a page can show. So the limit climbs as long as that pays: it is doubled
where the last doubling brought `GAIN` times as many answers a second, and taken back where it did
not. More than twice of what the server needs is never inside it, and that for as long as two
batches take, every `HOLD_SECONDS`.
"""

from __future__ import annotations

import math

BATCHES = 2  # of answers that are timed
GAIN = 1.25
HOLD_SECONDS = 30.0
MAX_CLIMBED = 4096


class Climb:
    """Chooses the next limit of one server from the ends of answers."""

    __slots__ = ("_below", "_ends", "_held_until", "_rate", "_since")

    def __init__(self) -> None:
        self._since: float | None = None
        self._ends = 0
        self._below = 0  # the last limit that paid
        self._rate = 0.0  # of answers a second at it
        self._held_until = -math.inf

    def ended(self, limit: int, now: float, *, occupied: bool) -> int:
        """Take the end of an answer, before which all slots were taken or not.

        Returns:
            The limit from now on.
        """
        if not occupied or now < self._held_until:
            self._since = None
            return limit
        if self._since is None:
            self._since, self._ends = now, 0
            return limit
        self._ends += 1
        seconds = now - self._since
        if self._ends < BATCHES * limit or seconds <= 0:
            return limit
        rate = self._ends / seconds
        self._since = None
        if rate >= GAIN * self._rate:
            self._below, self._rate = limit, rate
            return min(2 * limit, MAX_CLIMBED)
        self._held_until = now + HOLD_SECONDS
        self._rate = 0.0
        return self._below
