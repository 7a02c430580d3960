"""One endpoint: what it holds, how many slots are free, and what time changes.

How many slots an endpoint has does not belong here (limits/), nor whether it can be trusted with
requests (health.py), nor what a pool's endpoints are together (endpoints.py).
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

from forebay_epp.core.health import Health
from forebay_epp.core.limits import LIMITS
from forebay_epp.core.prefill import Prefill
from forebay_epp.core.residency import Residency
from forebay_epp.core.starts import Starts
from forebay_epp.core.terms import NEVER, EndpointState, Verdict

if TYPE_CHECKING:
    from forebay_control.plan import SaturationPlan
    from forebay_epp.core.residency import Produced
    from forebay_epp.core.terms import Endpoint, EndpointMetrics, Request

STALE_SECONDS = 2.0
SCRAPE_SECONDS = 1.0
PROBE_SECONDS = 10.0
FOREIGN_HALF_LIFE_SECONDS = 300.0
KV_PART = 0.93  # of the KV cache, for what is expected of requests; the rest is for surprises
EPSILON = 1e-9


class TrackedEndpoint:
    """One endpoint: what it holds and how much more it takes.

    Three things are in its slots: requests in flight, which this EPP has sent and whose end it
    will see; blind ones, whose end it will not see because the proxy closed its stream after the
    request phase (each holds its slot until a scrape that was started after it was sent); and
    foreign ones, which the server reports beyond these.

    A scrape is believed until two more are overdue, and for `STALE_SECONDS` at least. After that
    the foreign load is not known: it is taken to be as it was, and to halve every
    `FOREIGN_HALF_LIFE_SECONDS`. A server's page can be wrong for longer, because vLLM publishes its
    gauges at the end of a step and takes none while it idles. An endpoint that is closed by its
    page alone and has had nothing of ours for `PROBE_SECONDS` therefore gets one request.

    Attributes:
        free: slots that can be given away now; negative when a limit has shrunk.
        counted: those of them that are in the sum of `EndpointSet`.
        counted_limit: its limit as `EndpointSet` knows it; 0 for none.
        open_index: where it stands among the open ones; -1 for not there.
        kv_room_tokens: how many more tokens its KV cache has room for, by all that is known of it;
            an endpoint that holds nothing has room for any request.
        prefill: the prompts that wait in it.
        residency: the answers that it gives.
        produced: what these have come to by the last page; whoever charges for it clears it.
        crowded: whether a request was kept from it by the room for prompts; whoever makes room
            clears it.
        occupancy: slots taken, by this EPP or others.
        share: slots that are this EPP's; None where it does not share the pool with others.
        settled: whether the limit says how large the server is.
        spared: used although it is out, because the whole pool is.
        wake_at: when `free` or `settled` may change by time alone, in monotonic seconds.
        scheduled_at: when `EndpointSet` will look at it.
    """

    __slots__ = (
        "_arrivals",
        "_blind",
        "_ended",
        "_foreign_then",
        "_goal_seconds",
        "_idle_since",
        "_mode",
        "_observed_at",
        "_peak",
        "_probing",
        "_split",
        "_stale_at",
        "_starts",
        "address",
        "counted",
        "counted_limit",
        "crowded",
        "foreign",
        "free",
        "fresh",
        "health",
        "in_flight",
        "kv_capacity_tokens",
        "kv_room_tokens",
        "kv_tokens",
        "kv_usage",
        "limit",
        "name",
        "occupancy",
        "open_index",
        "prefill",
        "present",
        "produced",
        "residency",
        "running",
        "scheduled_at",
        "settled",
        "share",
        "spared",
        "uid",
        "waiting",
        "wake_at",
    )

    def __init__(self, endpoint: Endpoint, plan: SaturationPlan, now: float) -> None:
        self.address = endpoint.address
        self.uid = endpoint.uid
        self.name = endpoint.name or endpoint.address
        self.present = True
        self.spared = False
        self.share: int | None = None
        self._split: tuple[int, int] | None = None
        self.health = Health()
        self._mode = plan.mode
        self.limit = LIMITS[plan.mode](plan)
        self.settled = now < self.limit.settled_until
        self.in_flight = 0
        self.foreign = 0
        self.running = 0
        self.waiting = 0
        self.kv_usage: float | None = None
        self.kv_capacity_tokens: int | None = None
        self.kv_room_tokens = NEVER
        self.kv_tokens = 0  # that requests in flight are expected to take
        self.fresh = False
        self.free = 0
        self.counted = self.counted_limit = 0
        self.open_index = -1
        self.prefill = Prefill()
        self.residency = Residency()
        self.produced: list[Produced] = []
        self.crowded = False
        self._goal_seconds = plan.time_to_first_token_seconds
        self.occupancy = 0
        self.wake_at = self.scheduled_at = NEVER
        self._stale_at = NEVER
        self._foreign_then = 0
        self._idle_since = now
        self._observed_at = now  # an earlier scrape is of the pod that had the address then
        self._peak = 0
        self._probing = False
        self._arrivals = 0
        self._ended = 0
        self._starts = Starts(now)
        self._blind: deque[float] = deque()
        self.refresh()

    def reconfigure(self, plan: SaturationPlan, now: float) -> None:
        """Take a new plan; what has been learned stays when the mode does."""
        self._goal_seconds = plan.time_to_first_token_seconds
        if plan.mode is self._mode:
            self.limit.reconfigure(plan)
        else:
            self._mode = plan.mode
            self.limit = LIMITS[plan.mode](plan)
        self.settled = now < self.limit.settled_until
        if not self.limit.learned:
            self.foreign = self._foreign_then = 0
            self._blind.clear()
        self.refresh()

    def dispatched(self, request: Request, now: float) -> None:
        """Count one more request in flight."""
        self.kv_tokens += request.kv_tokens
        self.prefill.sent(request, now)
        self.residency.joined(request)
        self._starts.sent(request, now)
        self.in_flight += 1
        self._arrivals += 1
        self._peak = max(self._peak, self.in_flight)
        self._probing = False
        if self.health.out:
            self.health.dispatched()
        self.refresh()

    def first_token(self, request: Request, now: float) -> None:
        """An answer to a request in flight has begun."""
        self.prefill.begun(request, now)
        self._starts.began(request, now)
        value = self.limit.value
        self.limit.started(self._starts.begun)
        if self.limit.value != value:
            self.settled = now < self.limit.settled_until
            self.refresh()

    def completed(
        self,
        request: Request,
        verdict: Verdict,
        now: float,
        *,
        blind: bool = False,
        counted: bool = True,
    ) -> None:
        """Count one request less, or go on holding its slot when its end is unknown.

        Holding needs metrics that will show the truth later; without them the slot is free.
        `counted` says that the answer's tokens are known.
        """
        self.residency.left(request, now, known=counted or blind)
        if self.share is None and not blind and verdict is Verdict.GOOD:
            self.limit.ended(now, occupied=self.occupancy >= self.limit.value)
        self.in_flight -= 1
        self.prefill.ended(request)
        if not self.in_flight:
            self.prefill.idle()
        self.kv_tokens -= request.kv_tokens
        self._ended += 1
        self._starts.ended(request)
        if self._starts.stuck(now):
            self.limit.stuck()
        self._idle_since = now
        if blind and self.fresh and self.limit.learned:
            self._blind.append(request.dispatched_at)
            self._peak -= 1  # it may still run: the scrape that frees its slot counts it foreign
        self.health.answered(verdict, request.dispatched_at, now)
        self.refresh()

    def observe(self, metrics: EndpointMetrics, now: float) -> None:
        """Take a scrape; one that is stale, or was started before the last one, is ignored."""
        believed_seconds = max(STALE_SECONDS, 2 * metrics.interval_seconds + SCRAPE_SECONDS)
        stale_at = metrics.started_at + believed_seconds
        if metrics.started_at < self._observed_at or now >= stale_at:
            return
        while self._blind and self._blind[0] <= metrics.started_at:
            self._blind.popleft()
        self.fresh = True
        self._observed_at = metrics.started_at
        self._stale_at = stale_at
        self.running = metrics.running
        self.waiting = metrics.waiting
        self.kv_usage = metrics.kv_usage
        self.kv_capacity_tokens = metrics.kv_capacity_tokens
        self.health.scraped(now)
        self.prefill.observe(metrics)
        if self.limit.learned:
            self.foreign = max(0, metrics.running + metrics.waiting - self.seen)
            self.occupancy = self.in_flight + len(self._blind) + self.foreign
            arrivals, ended = self._arrivals, self._ended
            if self.share is not None:
                arrivals, ended = self._of_all(metrics)
                self._divide()
            self.limit.observe(metrics, self.occupancy, arrivals, ended, now)
            self.settled = now < self.limit.settled_until
        self.produced += self.residency.page(
            metrics.answer_tokens, metrics.started_at, self.foreign
        )
        self._peak = self.in_flight
        self._arrivals = self._ended = 0
        was_open = self.free > 0
        self.refresh()
        if was_open and self.free <= 0 and not self.in_flight:
            self._idle_since = now  # closed by this page, so doubt begins with it
            self.refresh()

    def elapse(self, now: float) -> None:
        """Let time change what it changes: belief in metrics, trials, probes."""
        if self.fresh and now >= self._stale_at:
            self.fresh = False
            self._foreign_then = self.foreign
            self._blind.clear()
            self.residency.forget()
        if not self.fresh and self.foreign:
            halvings = (now - self._stale_at) / FOREIGN_HALF_LIFE_SECONDS
            left = self._foreign_then * 0.5**halvings
            # A half is rounded down whatever its last bit, or the next step would be now again.
            self.foreign = math.ceil(left * (1 - EPSILON) - 0.5)
        self.health.elapse(now)
        self.settled = now < self.limit.settled_until
        self._probing = not self.in_flight and now >= self._idle_since + PROBE_SECONDS
        self.refresh()

    def refresh(self) -> None:
        """Count free slots again, and say when time alone may change them."""
        occupancy = self.occupancy = self.in_flight + len(self._blind) + self.foreign
        limit = self.limit
        if not self.present:
            self.free = 0
            self.wake_at = NEVER
            return
        share = self.share
        capacity = self.kv_capacity_tokens
        if capacity is None or not self.in_flight:
            self.kv_room_tokens = NEVER
        else:
            self.kv_room_tokens = KV_PART * capacity * self._part - self.kv_tokens
        free = limit.value - occupancy if share is None else share - self.taken
        wake_at = limit.settled_until if self.settled else NEVER
        if self.fresh:
            wake_at = min(wake_at, self._stale_at)
        elif self.foreign:
            wake_at = min(wake_at, self._next_decay())
        if (
            free > 0
            and self.fresh
            and self.kv_usage is not None
            and occupancy + self.running > 0
            and self.kv_usage >= limit.closing_kv_usage
        ):
            free = 0  # an idle server takes a request whatever it says, or nothing would move
        if free <= 0 and not self.in_flight:
            if self._probing:
                free = 1 if share is None or share > 0 else free
            else:
                wake_at = min(wake_at, self._idle_since + PROBE_SECONDS)
        health = self.health
        if health.out and not self.spared:
            free = min(free, 1) if health.trial_due else min(free, 0)
            wake_at = min(wake_at, health.wake_at)
        self.free = free
        self.wake_at = wake_at

    # --- shares

    @property
    def taken(self) -> int:
        """Slots that this EPP's requests take."""
        return self.in_flight + len(self._blind)

    @property
    def slots(self) -> int:
        """How many there are for this EPP, taken or not."""
        return self.limit.value if self.share is None else self.share

    @property
    def held(self) -> int:
        """Slots that this EPP uses or may use."""
        return max(self.slots, self.taken)

    @property
    def _part(self) -> float:
        """The part of the endpoint that is this EPP's."""
        return 1.0 if self.share is None else min(1.0, self.held / self.limit.value)

    def set_share(self, share: int | None) -> None:
        """Take a share of the slots; None for no bound but the limit."""
        self.share = share
        self._split = None
        self.refresh()

    def give_back(self, most: int) -> int:
        """Give up slots of the share that no request takes; return how many."""
        idle = min(most, (self.share or 0) - self.taken)
        if idle <= 0:
            return 0
        self.share = (self.share or 0) - idle
        self.refresh()
        return idle

    def split(self, among: tuple[int, int] | None) -> None:
        """Have each scrape say what the share is: a part of what it shows to be free.

        Args:
            among: how many EPPs do the same, and which of them this one is, from 0; None to leave
                the share as it is from now on.
        """
        self._split = among

    def _divide(self) -> None:
        if self._split is not None:
            epps, rank = self._split
            free = max(0, self.limit.value - self.taken - self.foreign)
            self.share = self.taken + free // epps + (rank < free % epps)

    def _of_all(self, page: EndpointMetrics) -> tuple[int, int]:
        """Return about how many requests of all EPPs have come and ended since the last scrape.

        This one's are known, and taken to be as usual; without any, nothing is concluded from how
        many wait.
        """
        own = max(self._peak, self.in_flight)
        if not own:
            return page.running + page.waiting, 0
        part = max(1.0, self.occupancy / own)
        return math.ceil(self._arrivals * part), round(self._ended * part)

    def prefill_room_tokens(self, now: float) -> float:
        """Return how many more tokens of prompts it takes in time, where limits are learned."""
        if not self.limit.learned:
            return NEVER
        self.prefill.drain(now)
        return self.prefill.room(self._goal_seconds * self._part)

    def _next_decay(self) -> float:
        """Return when the unknown foreign load, of which there is some, is less by one."""
        halvings = math.log2(self._foreign_then / (self.foreign - 0.5))
        return self._stale_at + halvings * FOREIGN_HALF_LIFE_SECONDS

    def leave(self) -> None:
        """The endpoint left the pool; requests in flight may still complete."""
        self.present = False
        self.refresh()

    @property
    def seen(self) -> int:
        """How many requests of ours the next page may show at most.

        The page may be older than the last completion: what was in flight at any moment since the
        scrape before is not foreign.
        """
        return self._peak + len(self._blind)

    @property
    def usable(self) -> bool:
        """Whether it may get a request, as far as its failures go."""
        return self.spared or not self.health.out or self.health.trial_due

    def is_another(self, endpoint: Endpoint) -> bool:
        """Whether a different pod has this address now."""
        return bool(self.uid and endpoint.uid and self.uid != endpoint.uid)

    def rejoin(self, endpoint: Endpoint) -> None:
        """The endpoint is in the pool (again)."""
        self.present = True
        self.uid = endpoint.uid or self.uid
        self.name = endpoint.name or endpoint.address
        self.refresh()

    def state(self, now: float) -> EndpointState:
        """Copy what it is now."""
        health = self.health
        return EndpointState(
            address=self.address,
            name=self.name,
            in_flight=self.in_flight,
            foreign=self.foreign,
            limit=self.limit.value,
            free=max(0, self.free),
            running=self.running,
            waiting=self.waiting,
            kv_usage=self.kv_usage,
            fresh=self.fresh,
            out=health.out,
            cause=health.cause,
            trial_seconds=max(0.0, health.trial_at - now) if health.out else None,
        )
