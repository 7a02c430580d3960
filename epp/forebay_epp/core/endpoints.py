"""The endpoints of a pool together: which there are, their free slots, and which are left out.

When slots are given away does not belong here (controller.py), nor to which endpoint a request
goes (selection/), nor what each endpoint holds (tracked.py).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from heapq import heappop, heappush
from typing import TYPE_CHECKING
from zlib import crc32

from forebay_epp.core.prefixes import PrefixIndex
from forebay_epp.core.terms import NEVER, HealthChange
from forebay_epp.core.tracked import TrackedEndpoint

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from forebay_control.plan import SaturationPlan
    from forebay_control.shares import Shares
    from forebay_epp.core.residency import Produced
    from forebay_epp.core.terms import Endpoint, EndpointMetrics, Request, Verdict


class EndpointSet:
    """All endpoints of a pool, and the sum of their free slots.

    An endpoint that fails is out, but never all of them: when every endpoint is out, those that
    have failed the fewest periods in a row are spared and used as if they were in.

    Attributes:
        present: endpoints of the pool; others only have requests that still run.
        free: slots that can be given away now.
        largest_limit: of any of these endpoints.
        slots: of all of them, taken or not.
        next_at: when time alone may change anything; infinity for never.
        prefixes: what they are believed to have in their prefix caches.
        returned: slots that were given back since the caller cleared this.
        opened: addresses of endpoints that have got a free slot since the caller cleared this.
    """

    def __init__(self, plan: SaturationPlan) -> None:
        self.present: tuple[TrackedEndpoint, ...] = ()
        self.free = 0
        self.largest_limit = 1
        self.slots = 0
        self.next_at = NEVER
        self.prefixes = PrefixIndex()
        self.opened: list[str] = []
        self._plan = plan
        self._open: list[TrackedEndpoint] = []  # those with a free slot, in no order
        self._limits: Counter[int] = Counter()  # how many endpoints have each
        self._states: dict[str, TrackedEndpoint] = {}
        self._alarms: list[tuple[float, int, TrackedEndpoint]] = []
        self._alarm_number = 0
        self._changes: list[HealthChange] = []
        self._shares: Shares | None = None
        self._excess = 0  # slots to give back
        self.returned = 0

    def reconfigure(self, plan: SaturationPlan, now: float) -> None:
        """Take a new plan."""
        self._plan = plan
        for tracked in self._states.values():
            tracked.reconfigure(plan, now)
            self._moved(tracked)
        self.opened = [tracked.address for tracked in self.present if tracked.free > 0]

    def replace(self, endpoints: Iterable[Endpoint], now: float) -> None:
        """Take these endpoints for the pool; what is in flight on others may still complete.

        A different pod at a known address is a new endpoint; the old one's requests stay its own.
        """
        wanted = {endpoint.address: endpoint for endpoint in endpoints}
        for address, tracked in list(self._states.items()):
            replaced = address in wanted and tracked.is_another(wanted[address])
            if (address not in wanted and tracked.present) or replaced:
                tracked.leave()
                self.prefixes.forget(tracked)
                self._moved(tracked)
                if replaced or not tracked.in_flight:
                    del self._states[address]
        for address, endpoint in wanted.items():
            known = self._states.get(address)
            if known is None:
                known = self._states[address] = TrackedEndpoint(endpoint, self._plan, now)
                if self._shares is not None:
                    known.set_share(0)
            else:
                known.rejoin(endpoint)
            self._moved(known)
        self.present = tuple(tracked for tracked in self._states.values() if tracked.present)
        self._spare()

    def observe(self, metrics: EndpointMetrics, now: float) -> list[Produced]:
        """Take what a scrape said; an endpoint that is not known is ignored.

        Returns:
            What its answers have come to, as far as the scrape tells.
        """
        tracked = self._states.get(metrics.address)
        if tracked is None:
            return []
        tracked.observe(metrics, now)
        self.prefixes.observe(tracked, metrics)
        self._moved(tracked)
        produced, tracked.produced = tracked.produced, []
        return produced

    def scrape_failed(self, address: str, now: float, *, refused: bool) -> None:
        """Note that a scrape has failed; an unknown endpoint is ignored."""
        tracked = self._states.get(address)
        if tracked is not None:
            was_out, failures = tracked.health.out, tracked.health.failures
            tracked.health.scrape_failed(now, refused=refused)
            tracked.refresh()
            if refused:
                self.prefixes.forget(tracked)  # its process has ended
            self._moved(tracked)
            self._note_health(tracked, was_out, failures)

    def dispatched(self, tracked: TrackedEndpoint, request: Request, now: float) -> None:
        """One of the endpoint's free slots is taken."""
        if request.prefix:
            self.prefixes.sent(tracked, request)
        tracked.dispatched(request, now)
        self._moved(tracked)

    def first_token(self, tracked: TrackedEndpoint, request: Request, now: float) -> None:
        """An answer of the endpoint has begun."""
        limit = tracked.limit.value
        tracked.first_token(request, now)
        if tracked.limit.value != limit or tracked.crowded:
            self._moved(tracked)

    def completed(
        self,
        tracked: TrackedEndpoint,
        request: Request,
        verdict: Verdict,
        now: float,
        *,
        blind: bool,
        counted: bool = True,
    ) -> None:
        """A request that was sent to the endpoint has ended."""
        was_out, failures = tracked.health.out, tracked.health.failures
        held = tracked.held if self._excess else 0
        tracked.completed(request, verdict, now, blind=blind, counted=counted)
        if self._excess:
            self.returned += tracked.give_back(1)
            self._excess = max(0, self._excess - held + tracked.held)
        self._moved(tracked)
        if was_out or tracked.health.out:
            self._note_health(tracked, was_out, failures)
        left = not tracked.present and not tracked.in_flight
        if left and self._states.get(tracked.address) is tracked:
            del self._states[tracked.address]

    # --- shares

    @property
    def shares(self) -> Shares | None:
        """The shares in force; None for no bound but the limits."""
        return self._shares

    def set_shares(self, shares: Shares) -> None:
        """Use these slots only, and give back what is too much as soon as no request takes it."""
        if shares.total is None:
            self._shares = None
            changed: dict[str, int | None] = dict.fromkeys(self._states)
        else:
            self._shares = shares
            changed = dict(shares.slots)
            if shares.full:
                changed = {**dict.fromkeys(self._states, 0), **changed}
        for address, most in shares.most.items():
            tracked = self._states.get(address)
            if tracked is not None and (tracked.share or 0) > most:
                changed.setdefault(address, most)
        for address, share in changed.items():
            tracked = self._states.get(address)
            if tracked is not None:
                tracked.set_share(share)
                self._moved(tracked)
        self._excess = 0
        if shares.total is not None:
            held = sum(tracked.held for tracked in self._states.values())
            self._excess = max(0, held - shares.total)
        for tracked in self._states.values() if self._excess else ():
            if back := tracked.give_back(self._excess):
                self._excess -= back
                self._moved(tracked)

    def give_back_shares(self) -> None:
        """Give back at once what no request takes, and the rest as requests end."""
        if self._shares is not None:
            self.set_shares(replace(self._shares, total=0, slots={}, most={}, full=False))

    def relax_shares(self) -> None:
        """Share by what scrapes show from now on, until there are new shares.

        Each scrape divides the free slots that it shows by the EPPs that shared at last. So two
        that scrape at different moments can exceed a limit by what came in between. Where limits
        are given and scrapes do not count, shares stay as they are.
        """
        shares = self._shares
        if shares is not None:
            self._excess = 0
            for tracked in self._states.values():
                rank = (shares.rank + crc32(tracked.address.encode())) % shares.epps
                tracked.split((shares.epps, rank))

    def freeze_shares(self) -> None:
        """Keep what is held from now on, until there are new shares."""
        for tracked in self._states.values():
            tracked.split(None)

    # --- time

    def elapse(self, now: float) -> None:
        """Let time change what it changes."""
        while self._alarms and self._alarms[0][0] <= now:
            when, _, tracked = heappop(self._alarms)
            if when == tracked.scheduled_at:
                tracked.scheduled_at = NEVER
            tracked.elapse(now)
            self._moved(tracked)
        self.next_at = self._alarms[0][0] if self._alarms else NEVER

    # --- looking

    def within(self, subset: frozenset[str] | None) -> Sequence[TrackedEndpoint]:
        """Return the pool's endpoints, or those that have one of these addresses."""
        if subset is None:
            return self.present
        states = self._states
        return [
            states[address]
            for address in sorted(subset)
            if address in states and states[address].present
        ]

    def open_within(self, subset: frozenset[str] | None) -> list[TrackedEndpoint]:
        """Return those of them that have a free slot; the caller leaves the list as it is."""
        if subset is None:
            return self._open
        return [tracked for tracked in self.within(subset) if tracked.free > 0]

    def in_flight_at(self, address: str) -> int:
        """Return how many requests are in flight on the endpoint of this address."""
        tracked = self._states.get(address)
        return 0 if tracked is None else tracked.in_flight

    def seen_at(self, address: str) -> int:
        """Return how many requests of ours the endpoint's next page may show at most."""
        tracked = self._states.get(address)
        return 0 if tracked is None else tracked.seen

    def is_open(self, address: str) -> bool:
        """Whether the endpoint of this address has a free slot."""
        tracked = self._states.get(address)
        return tracked is not None and tracked.free > 0

    def load(self) -> float:
        """Return slots taken over slots there are, of the endpoints in use; 1.0 without any."""
        used = [tracked for tracked in self.present if tracked.spared or not tracked.health.out]
        limit = sum(tracked.limit.value for tracked in used)
        return sum(tracked.occupancy for tracked in used) / limit if limit else 1.0

    def take_changes(self) -> list[HealthChange]:
        """Return which endpoints have gone out or come back since the last call."""
        changes, self._changes = self._changes, []
        return changes

    # --- inside

    def _moved(self, tracked: TrackedEndpoint) -> None:
        """Account for a change of an endpoint's free slots, and look at it again in time."""
        free = tracked.free
        if free != tracked.counted:
            more = (free if free > 0 else 0) - tracked.counted
            if more > 0:
                self.opened.append(tracked.address)
                if tracked.open_index < 0:
                    tracked.open_index = len(self._open)
                    self._open.append(tracked)
            elif free <= 0 <= tracked.open_index:
                self._close(tracked)
            tracked.counted += more
            self.free += more
        limit = tracked.slots if tracked.present else 0
        if limit != tracked.counted_limit:
            self._count_limit(tracked, limit)
        if tracked.crowded and free > 0:
            tracked.crowded = False
            self.opened.append(tracked.address)
        if tracked.wake_at < tracked.scheduled_at:
            tracked.scheduled_at = tracked.wake_at
            self._alarm_number += 1
            heappush(self._alarms, (tracked.wake_at, self._alarm_number, tracked))
            self.next_at = self._alarms[0][0]

    def _close(self, tracked: TrackedEndpoint) -> None:
        """Let the last of the open endpoints take the place of one that is no longer open."""
        last = self._open.pop()
        if last is not tracked:
            self._open[tracked.open_index] = last
            last.open_index = tracked.open_index
        tracked.open_index = -1

    def _count_limit(self, tracked: TrackedEndpoint, limit: int) -> None:
        known = tracked.counted_limit
        self.slots += limit - known
        if limit:
            self._limits[limit] += 1
        if known:
            self._limits[known] -= 1
            if not self._limits[known]:
                del self._limits[known]
        tracked.counted_limit = limit
        self.largest_limit = max(self._limits, default=1)

    def _note_health(self, tracked: TrackedEndpoint, was_out: bool, failures: int) -> None:  # noqa: FBT001  # what `Health` said before
        health = tracked.health
        if not tracked.present or (health.out, health.failures) == (was_out, failures):
            return
        if health.out != was_out:
            self._changes.append(
                HealthChange(tracked.address, tracked.name, health.out, health.cause)
            )
        self._spare()

    def _spare(self) -> None:
        """Decide which endpoints are used although they are out."""
        least = None
        if all(tracked.health.out for tracked in self.present):
            least = min((tracked.health.failures for tracked in self.present), default=None)
        for tracked in self.present:
            spared = tracked.health.failures == least
            if spared != tracked.spared:
                tracked.spared = spared
                tracked.refresh()
                self._moved(tracked)
