"""A limit that is learned from what scrapes show.

The adaptive limit rests on one observation: a model server queues internally exactly when its
batch is full. A scrape with requests waiting inside therefore shows the capacity (what is running
then), and a scrape without any, while this EPP has filled the limit, shows that there may be more.
The probing is the idea of TCP's slow start and additive increase (RFC 5681), with a back-off
between failed probes as in TCP's persist timer.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forebay_control.plan import SaturationPlan

INITIAL_LIMIT = 4
MAX_LIMIT = 100_000
MIN_BACKOFF_SECONDS = 0.25
MAX_BACKOFF_SECONDS = 8.0
CROWDED_SCRAPES = 5
LONG_STEP_SECONDS = 0.15
LONG_PAUSE_SECONDS = 2.0


class AdaptiveLimit:
    """A limit learned from running and waiting.

    Until a full batch has been seen the limit doubles at each scrape that finds it used up (slow
    start). After that it is the batch that was seen, and one more slot is tried at a time; the
    pause between tries doubles when a try fails and halves while tries succeed.

    Waiting requests prove little by themselves: an engine admits new arrivals at its next step, and
    a scrape may fall in between. A scrape is proof when more wait than were sent since the scrape
    before. Otherwise it takes `CROWDED_SCRAPES` in a row with a request waiting, and either always
    the same number running, for a full batch keeps its size while what only waits for the next
    step is another number each time; or, where capacity varies, waits that are too long for a
    step. By Little's law (1961) the mean wait is the number waiting over the rate of arrivals.

    Attributes:
        value: slots.
        settled_until: until when, in monotonic seconds, the limit is taken for the server's
            capacity. It is not while no full batch has been seen, nor when it is time to try one
            more slot.
    """

    __slots__ = (
        "_backoff",
        "_climbing",
        "_crowded",
        "_known",
        "_kv_threshold",
        "_observed_at",
        "settled_until",
        "value",
    )

    learned = True

    def __init__(self, plan: SaturationPlan) -> None:
        self.value = INITIAL_LIMIT
        self._known = False
        self._climbing = False
        self._backoff = MIN_BACKOFF_SECONDS
        self.settled_until = -math.inf
        self._observed_at = 0.0
        # Of the last scrapes, without a gap, that found a request waiting: running, waiting,
        # arrivals before them, seconds before them.
        self._crowded: deque[tuple[int, int, int, float]] = deque(maxlen=CROWDED_SCRAPES)
        self.reconfigure(plan)

    def reconfigure(self, plan: SaturationPlan) -> None:
        """Take a new plan and keep what has been learned."""
        self._kv_threshold = plan.kv_cache_usage_threshold

    def closes(self, kv_usage: float) -> bool:
        """Whether a cache this full closes a busy endpoint."""
        return kv_usage >= self._kv_threshold

    def observe(
        self, running: int, waiting: int, occupancy: int, arrivals: int, now: float
    ) -> None:
        """Learn from one scrape.

        Args:
            running: requests in the server's batch.
            waiting: requests queued in the server.
            occupancy: slots this EPP counts as taken.
            arrivals: requests sent to the server since the scrape before was started.
            now: monotonic seconds.
        """
        elapsed = min(LONG_PAUSE_SECONDS, now - self._observed_at)
        self._observed_at = now
        if waiting > 0:
            self._crowded.append((running, waiting, arrivals, elapsed))
            lasting = len(self._crowded) == CROWDED_SCRAPES
            if waiting > arrivals or (lasting and (self._steady() or self._queueing())):
                self._full_at(max(1, *(scrape[0] for scrape in self._crowded)), now)
            return
        self._crowded.clear()
        # A server that reports far less than it was sent does not know what it is doing; its word
        # does not open it further.
        if occupancy >= self.value and (running + waiting) * 2 >= self.value:
            self._grow(now)

    def _queueing(self) -> bool:
        """Whether those who wait do so for longer than a step takes."""
        waiting = sum(scrape[1] for scrape in self._crowded) / len(self._crowded)
        arrivals = sum(scrape[2] for scrape in self._crowded)
        seconds = sum(scrape[3] for scrape in self._crowded)
        return waiting * seconds > arrivals * LONG_STEP_SECONDS

    def _steady(self) -> bool:
        """Whether the same number was running each time."""
        return len({scrape[0] for scrape in self._crowded}) == 1

    def _full_at(self, batch: int, now: float) -> None:
        if batch < self.value or not self._known:
            self._backoff = min(MAX_BACKOFF_SECONDS, self._backoff * 2)
        self.settled_until = now + self._backoff
        self._known = True
        self._climbing = False
        self.value = min(MAX_LIMIT, batch)

    def _grow(self, now: float) -> None:
        if not self._known:
            self.value = min(MAX_LIMIT, self.value * 2)
        elif now >= self.settled_until:
            if self._climbing:
                self._backoff = max(MIN_BACKOFF_SECONDS, self._backoff / 2)
            self._climbing = True
            self.value = min(MAX_LIMIT, self.value + 1)
            self.settled_until = now + self._backoff
