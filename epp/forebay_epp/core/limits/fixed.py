"""A limit that the plan gives."""

from __future__ import annotations

import math


class FixedLimit:
    """A limit given by the plan; scrapes do not change it, and it is settled for good."""

    __slots__ = ("settled_until", "value")

    def __init__(self, value: int) -> None:
        self.value = value
        self.settled_until = math.inf

    def observe(
        self, running: int, waiting: int, occupancy: int, arrivals: int, now: float
    ) -> None:
        """Ignore a scrape."""
