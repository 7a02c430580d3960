"""How many requests an endpoint takes, and how many of those places are free.

A limit estimates a number from what scrapes show; `EndpointState` spends it. Choosing among
endpoints is selection.py's business.

The adaptive limit rests on one observation: a model server queues internally exactly when its
batch is full. A scrape with requests waiting inside therefore shows the capacity (what is running
then), and a scrape without any, while this EPP has filled the limit, shows that there may be more.
The probing is the idea of TCP's slow start and additive increase (RFC 5681), with a back-off
between failed probes as in TCP's persist timer.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from forebay_epp.core.plan import SaturationMode, SaturationPlan

if TYPE_CHECKING:
    from forebay_epp.core.terms import Endpoint, EndpointMetrics

INITIAL_LIMIT = 4
MAX_LIMIT = 100_000
NEVER = float("inf")
STALE_SECONDS = 2.0
MIN_BACKOFF_SECONDS = 0.25
MAX_BACKOFF_SECONDS = 8.0
CROWDED_SCRAPES = 5
LONG_STEP_SECONDS = 0.15


class FixedLimit:
    """A limit given by the plan; scrapes do not change it."""

    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        self.value = value

    def observe(
        self, running: int, waiting: int, occupancy: int, arrivals: int, now: float
    ) -> None:
        """Ignore a scrape."""


class AdaptiveLimit:
    """A limit learned from running and waiting.

    Until a full batch has been seen the limit doubles at each scrape that finds it used up (slow
    start). After that it is the batch that was seen, and one more place is tried at a time; the
    pause between tries doubles when a try fails and halves while tries succeed.

    Waiting requests prove little by themselves: an engine admits new arrivals at its next step, and
    a scrape may fall in between. A scrape is proof when more wait than were sent since the scrape
    before. Otherwise it takes `CROWDED_SCRAPES` in a row with somebody waiting, and either always
    the same number running, for a full batch keeps its size while what only waits for the next
    step is another number each time; or, where capacity varies, waits that are too long for a
    step. By Little's law (1961) the mean wait is the number waiting over the rate of arrivals.
    """

    __slots__ = (
        "_backoff",
        "_climbing",
        "_crowded",
        "_known",
        "_next_probe_at",
        "_observed_at",
        "value",
    )

    def __init__(self) -> None:
        self.value = INITIAL_LIMIT
        self._known = False
        self._climbing = False
        self._backoff = MIN_BACKOFF_SECONDS
        self._next_probe_at = 0.0
        self._observed_at = 0.0
        # Of the last scrapes, without a gap, that found somebody waiting: running, waiting,
        # arrivals before them, seconds before them.
        self._crowded: deque[tuple[int, int, int, float]] = deque(maxlen=CROWDED_SCRAPES)

    def observe(
        self, running: int, waiting: int, occupancy: int, arrivals: int, now: float
    ) -> None:
        """Learn from one scrape.

        Args:
            running: requests in the server's batch.
            waiting: requests queued in the server.
            occupancy: places this EPP counts as taken.
            arrivals: requests sent to the server since the scrape before was started.
            now: monotonic seconds.
        """
        elapsed = min(STALE_SECONDS, now - self._observed_at)
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
            self._next_probe_at = now + self._backoff
        self._known = True
        self._climbing = False
        self.value = min(MAX_LIMIT, batch)

    def _grow(self, now: float) -> None:
        if not self._known:
            self.value = min(MAX_LIMIT, self.value * 2)
        elif now >= self._next_probe_at:
            if self._climbing:
                self._backoff = max(MIN_BACKOFF_SECONDS, self._backoff / 2)
            self._climbing = True
            self.value = min(MAX_LIMIT, self.value + 1)
            self._next_probe_at = now + self._backoff


Limit = FixedLimit | AdaptiveLimit


class EndpointState:
    """One endpoint: what it holds and how much more it takes.

    `in_flight` counts requests of this EPP, from dispatch to completion. `blind` are requests
    whose end nobody will report (the proxy closed its stream after the request phase); each holds
    its place until a scrape that was started after it has been seen, or metrics are stale.
    `foreign` is what the server reports beyond that: other clients' requests. `free` is always up
    to date; it may be negative when a limit shrinks. `stale_at` is when the last scrape is no
    longer believed; infinity when none is. A scrape that was started before `believed_from` is of
    whatever had the address then.
    """

    __slots__ = (
        "_arrivals",
        "_blind",
        "_kv_threshold",
        "_observed_at",
        "_peak",
        "address",
        "foreign",
        "free",
        "fresh",
        "in_flight",
        "kv_usage",
        "limit",
        "name",
        "present",
        "running",
        "stale_at",
        "uid",
        "waiting",
    )

    def __init__(
        self, endpoint: Endpoint, plan: SaturationPlan, believed_from: float = -NEVER
    ) -> None:
        self.address = endpoint.address
        self.uid = endpoint.uid
        self.name = endpoint.name or endpoint.address
        self.present = True
        self.in_flight = 0
        self.foreign = 0
        self.running = 0
        self.waiting = 0
        self.kv_usage: float | None = None
        self.fresh = False
        self.stale_at = NEVER
        self._observed_at = believed_from
        self._peak = 0
        self._arrivals = 0
        self._blind: deque[float] = deque()
        self.limit: Limit = FixedLimit(1)
        self.free = 0
        self.reconfigure(plan)

    def reconfigure(self, plan: SaturationPlan) -> None:
        """Take a new plan; what has been learned stays when the mode stays Adaptive."""
        if plan.mode is SaturationMode.CONCURRENCY:
            self.limit = FixedLimit(plan.max_concurrency)
            self._kv_threshold: float | None = None
            self.foreign = 0
            self._blind.clear()
        else:
            if not isinstance(self.limit, AdaptiveLimit):
                self.limit = AdaptiveLimit()
            self._kv_threshold = plan.kv_cache_usage_threshold
        self._refresh()

    @property
    def occupancy(self) -> int:
        """Places taken, whoever took them."""
        return self.in_flight + len(self._blind) + self.foreign

    def dispatched(self) -> None:
        """Count one more request in flight."""
        self.in_flight += 1
        self._arrivals += 1
        self._peak = max(self._peak, self.in_flight)
        self._refresh()

    def completed(self, dispatched_at: float, *, blind: bool) -> None:
        """Count one request less, or go on holding its place when its end is unknown.

        Holding needs metrics that will show the truth later; without them the place is free.
        """
        self.in_flight -= 1
        if blind and self.fresh and isinstance(self.limit, AdaptiveLimit):
            self._blind.append(dispatched_at)
            self._peak -= 1  # it may still run: the scrape that frees its place counts it foreign
        self._refresh()

    def observe(self, metrics: EndpointMetrics, now: float) -> None:
        """Take a scrape; one that is stale, or was started before the last one, is ignored."""
        stale_at = metrics.started_at + STALE_SECONDS
        if metrics.started_at < self._observed_at or now >= stale_at:
            return
        while self._blind and self._blind[0] <= metrics.started_at:
            self._blind.popleft()
        self.fresh = True
        self._observed_at = metrics.started_at
        self.stale_at = stale_at
        self.running = metrics.running
        self.waiting = metrics.waiting
        self.kv_usage = metrics.kv_usage
        if isinstance(self.limit, AdaptiveLimit):
            # The page may be older than the last completion: what was in flight at any moment
            # since the scrape before is not foreign.
            own = self._peak + len(self._blind)
            self.foreign = max(0, metrics.running + metrics.waiting - own)
            self.limit.observe(
                metrics.running, metrics.waiting, self.occupancy, self._arrivals, now
            )
        self._peak = self.in_flight
        self._arrivals = 0
        self._refresh()

    def expire(self, now: float) -> None:
        """Stop believing metrics that are older than `STALE_SECONDS`."""
        if now >= self.stale_at:
            self.fresh = False
            self.stale_at = NEVER
            self.foreign = 0
            self._blind.clear()
            self._refresh()

    def _refresh(self) -> None:
        if not self.present:
            self.free = 0
            return
        occupancy = self.occupancy
        free = self.limit.value - occupancy
        if (
            free > 0
            and self.fresh
            and self._kv_threshold is not None
            and self.kv_usage is not None
            and self.kv_usage >= self._kv_threshold
            and occupancy + self.running > 0
        ):
            free = 0  # an idle server takes a request whatever it says, or nothing would move
        self.free = free

    def leave(self) -> None:
        """The endpoint left the pool; requests in flight may still complete."""
        self.present = False
        self._refresh()

    def is_another(self, endpoint: Endpoint) -> bool:
        """Whether a different pod has this address now."""
        return bool(self.uid and endpoint.uid and self.uid != endpoint.uid)

    def rejoin(self, endpoint: Endpoint) -> None:
        """The endpoint is in the pool (again)."""
        self.present = True
        self.uid = endpoint.uid or self.uid
        self.name = endpoint.name or endpoint.address
        self._refresh()
