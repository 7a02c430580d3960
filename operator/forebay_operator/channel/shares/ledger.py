"""Who holds which slots of a pool, and which to hand out next.

**Sums.** For each endpoint and EPP the ledger has a bound on what the EPP holds: the most of what
it has reported and of all shares sent since the one that the report names. A share is raised only
as far as the sum of the bounds stays within what the endpoint has, so whatever is lost, late,
doubled or out of order, the sum of what EPPs hold is never raised above the limit: a slot moves
only after its holder has given it back. A limit that falls is reached as answers end.

**What an endpoint has** is the highest of the EPPs' estimates, less what is in it of others: as
far as scrapes show more than all EPPs hold. An EPP that is gone is one of these others. What it
held counts for `AWAY_SECONDS`, in case it comes back; after that what it had running does, as long
as a scrape shows so much. A server that seems full of others gets a request now and then, because
pages of idle servers may be wrong (core/tracked.py of the EPP).

**A new leader** knows nothing. Until all EPPs can have reported to it (`SETTLING_SECONDS`) it
moves slots only between those that have, within what they hold.

An EPP that is alone needs no shares. Pure: the moment is an argument, in monotonic seconds. When
messages travel belongs in server.py, how many slots an EPP should have in allocation.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from forebay_control.shares import Demand, Held, Shares
from forebay_operator.channel.shares.allocation import entitlements

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from forebay_control.shares import BandDemand
    from forebay_operator.channel.shares.allocation import Entitlement

AWAY_SECONDS = 1.5
SETTLING_SECONDS = 12.0
RESEND_SECONDS = 1.0
PROBE_SECONDS = 10.0
RACE = 64  # EPPs are asked for more than is urgent: whichever has a request end first gives it
NOTHING = Held(0, 0, 0)


@dataclass(slots=True)
class _EPP:
    """One EPP as the ledger knows it."""

    heard_at: float
    number: int = 0
    seen: int = 0
    shared: bool = False
    reported: bool = False  # since its stream began
    bands: Mapping[str, BandDemand] = field(default_factory=dict)
    endpoints: dict[str, Held] = field(default_factory=dict)
    sent: dict[int, Shares] = field(default_factory=dict)  # later than seen
    sent_at: float = 0.0
    total: int = 0  # last sent
    place: tuple[int, int] = (1, 0)  # how many EPPs and which of them: last sent
    lowered: dict[str, int] = field(default_factory=dict)  # bounds last sent
    bounds: dict[str, int] = field(default_factory=dict)

    @property
    def held(self) -> int:
        """The most slots that it may hold, of all endpoints."""
        return sum(self.bounds.values())

    @property
    def free(self) -> bool:
        """Whether it may use whatever it sees, because it has, or may have, no shares."""
        return not self.shared or any(shares.total is None for shares in self.sent.values())

    @property
    def offer(self) -> Mapping[str, int] | None:
        """The first shares that it was sent, as long as it is not known to have taken them."""
        last = max(self.sent.values(), key=lambda shares: shares.number, default=None)
        return last.slots if last is not None and last.full else None

    def bound(self, address: str) -> int:
        """Return the most slots of an endpoint that it may hold."""
        held = self.endpoints.get(address) or NOTHING
        slots = held.slots
        for shares in self.sent.values():
            if shares.total is None:
                slots = max(slots, held.limit)
            slots = max(slots, shares.slots.get(address, 0))
        return slots

    def rebound(self, addresses: Iterable[str]) -> None:
        """Work out some bounds again."""
        for address in addresses:
            if slots := self.bound(address):
                self.bounds[address] = slots
            else:
                self.bounds.pop(address, None)


@dataclass(frozen=True, slots=True)
class _Tally:
    """One endpoint by all EPPs' reports: its limit, what runs of theirs and in all, the bounds."""

    limit: int
    running: int
    inside: int
    bound: int


class Ledger:
    """The slots of one pool.

    Args:
        now: since when we lead.

    Attributes:
        moves: slots that were given to an EPP after another had held them, so far.
    """

    def __init__(self, now: float) -> None:
        self.moves = 0
        self._settled_at = now + SETTLING_SECONDS
        self._number = 0
        self._epps: dict[str, _EPP] = {}
        self._tallies: dict[str, _Tally] = {}  # by endpoint
        self._changed: set[str] = set()  # endpoints whose tally is out of date
        self._ghosts: dict[str, int] = {}  # by endpoint: requests of EPPs that are gone
        self._idle_since: dict[str, float] = {}  # endpoints that others seem to fill

    # --- what EPPs say

    def join(self, epp: str, now: float) -> None:
        """Note a new stream of an EPP: its reports begin again, with a full one."""
        known = self._epps.get(epp)
        if known is None:
            known = self._epps[epp] = _EPP(now)
        known.heard_at = now
        known.number = known.seen = 0
        known.reported = False
        known.lowered.clear()

    def knows(self, epp: str) -> bool:
        """Whether the EPP takes part: one that was silent for long has to join again."""
        return epp in self._epps

    def report(self, epp: str, demand: Demand, now: float) -> None:
        """Take a report; one that is older than the last, or of an unknown EPP, is ignored."""
        known = self._epps.get(epp)
        if known is None or demand.number <= known.number:
            return
        if not known.reported and not demand.full:
            return
        known.heard_at, known.number = now, demand.number
        known.shared = demand.shared
        known.bands = demand.bands
        touched = set(demand.endpoints)
        for number in sorted(known.sent):
            shares = known.sent[number]
            if number > demand.seen:
                break
            del known.sent[number]
            touched |= shares.slots.keys()
            for address, slots in shares.slots.items():  # what the report does not name
                held = known.endpoints.get(address) or NOTHING
                if slots > held.slots:
                    known.endpoints[address] = replace(held, slots=slots)
        if demand.full:
            if not known.reported:
                known.sent.clear()  # of an earlier stream, which the EPP takes nothing from
            touched |= known.endpoints.keys() | known.bounds.keys()
            known.endpoints.clear()
        known.endpoints.update(demand.endpoints)
        known.seen = max(known.seen, demand.seen)
        known.reported = True
        known.rebound(touched)
        self._changed |= touched

    def leave(self, epp: str, now: float, *, gone: bool = False) -> None:
        """Note that an EPP's stream has ended; `gone`: it has said that it ends."""
        known = self._epps.get(epp)
        if known is not None and gone:
            self._bury(epp, known)
        elif known is not None:
            known.heard_at = min(known.heard_at, now)

    def _bury(self, epp: str, known: _EPP) -> None:
        """Count the requests of an EPP that is gone as others'."""
        for address, held in known.endpoints.items():
            if held.running:
                self._ghosts[address] = self._ghosts.get(address, 0) + held.running
        self._changed |= known.endpoints.keys() | known.bounds.keys()
        del self._epps[epp]

    # --- what they get

    def allot(self, now: float) -> dict[str, Shares]:
        """Return what to send to which EPP now."""
        for epp, known in list(self._epps.items()):
            if now - known.heard_at > AWAY_SECONDS:
                self._bury(epp, known)
        names = sorted(epp for epp, known in self._epps.items() if known.reported)
        if len(self._epps) == 1 and names and self._epps[names[0]].free:
            self._ghosts.clear()  # it sees them as others' itself
            return {}
        room = self._room(now)
        if len(self._epps) == 1 and names and now >= self._settled_at and not self._ghosts:
            known = self._epps[names[0]]
            alone = Shares(self._next(), None)
            return {names[0]: self._sent(known, alone, now)} if self._ready(known, now) else {}
        held = {name: self._epps[name].held for name in names}
        slots = sum(room.values())
        entitled = entitlements({name: self._epps[name].bands for name in names}, held, slots)
        free = sum(
            max(0, slots - tally.bound)  # though at other endpoints they may hold too many
            for slots, tally in zip(room.values(), self._tallies.values(), strict=True)
        )
        return self._messages(names, room, _totals(entitled, held, free), entitled, now)

    def _room(self, now: float) -> dict[str, int]:
        """Return how many slots each endpoint has for all EPPs of the pool together."""
        settled = now >= self._settled_at or any(known.free for known in self._epps.values())
        self._tally()
        room = {}
        for address, tally in self._tallies.items():
            slots = tally.limit
            if tally.inside > tally.running:
                slots -= max(0, tally.inside - max(tally.bound, tally.running))
            if address in self._ghosts:
                slots = min(slots, tally.limit - self._haunt(address, tally.inside - tally.running))
            if slots <= 0:
                slots = self._probe(address, tally.running, now)
            elif address in self._idle_since:
                del self._idle_since[address]
            room[address] = slots if settled else min(slots, tally.bound)
        for address in self._ghosts.keys() - room.keys():
            del self._ghosts[address]
        return room

    def _tally(self) -> None:
        """Bring the tallies up to date."""
        for address in sorted(self._changed):  # an order that no hash seed changes
            limit = running = inside = bound = 0
            for known in self._epps.values():
                held = known.endpoints.get(address)
                if held is not None:
                    limit = max(limit, held.limit)
                    inside = max(inside, held.inside)
                    running += held.running
                bound += known.bounds.get(address, 0)
            if limit:
                self._tallies[address] = _Tally(limit, running, inside, bound)
            else:
                self._tallies.pop(address, None)
        self._changed.clear()

    def _haunt(self, address: str, shown: int) -> int:
        """Return how many requests of EPPs that are gone still run, as far as scrapes show."""
        ghosts = self._ghosts[address] = min(self._ghosts[address], max(0, shown))
        if not ghosts:
            del self._ghosts[address]
        return ghosts

    def _probe(self, address: str, running: int, now: float) -> int:
        """Return the slots of an endpoint that others seem to fill: none, or one to try it."""
        if running:
            self._idle_since[address] = now
        return int(now - self._idle_since.setdefault(address, now) >= PROBE_SECONDS)

    def _messages(
        self,
        names: list[str],
        room: Mapping[str, int],
        totals: Mapping[str, int],
        entitled: Mapping[str, Entitlement],
        now: float,
    ) -> dict[str, Shares]:
        """Give free slots to those that lack them, and take back what endpoints have lost."""
        epps = [self._epps[name] for name in names]
        ready = [self._ready(known, now) for known in epps]
        changed: list[dict[str, int]] = [{} for _ in names]
        most: list[dict[str, int]] = [{} for _ in names]
        if any(known.free for known in epps):
            self._bind(room, epps, changed)
        else:
            self._give_or_take(names, room, totals, entitled, now, changed, most)
        messages = {}
        for number, (name, known) in enumerate(zip(names, epps, strict=True)):
            place = (len(self._epps), number)
            if ready[number] and (
                changed[number]
                or most[number]
                or known.free
                or known.place != place
                or _moves(known, totals[name])
            ):
                shares = Shares(
                    self._next(),
                    totals[name],
                    changed[number],
                    known.free,
                    *place,
                    most[number],
                )
                messages[name] = self._sent(known, shares, now)
        return messages

    def _bind(
        self, room: Mapping[str, int], epps: list[_EPP], changed: list[dict[str, int]]
    ) -> None:
        """Give EPPs that had no shares what they run, and in equal parts what all leave.

        What such an EPP was sent before, it is sent again: it may have taken it.
        """
        offers = [known.offer if known.free else None for known in epps]
        new = [n for n, known in enumerate(epps) if known.free and offers[n] is None]
        for turn, (address, slots) in enumerate(room.items()):
            kept = 0
            for number, known in enumerate(epps):
                offer = offers[number]
                if offer is not None:
                    changed[number][address] = offer.get(address, 0)
                    kept += changed[number][address]
                elif not known.free:
                    kept += known.bounds.get(address, 0)
            left = max(0, slots - kept)
            run = [(epps[number].endpoints.get(address) or NOTHING).running for number in new]
            total = sum(run)
            part, rest = divmod(max(0, left - total), max(1, len(new)))
            for place, number in enumerate(new):
                own = run[place] if total <= left else run[place] * left // total
                changed[number][address] = own + part + ((place + turn) % len(new) < rest)

    def _give_or_take(
        self,
        names: list[str],
        room: Mapping[str, int],
        totals: Mapping[str, int],
        entitled: Mapping[str, Entitlement],
        now: float,
        changed: list[dict[str, int]],
        most: list[dict[str, int]],
    ) -> None:
        """Divide the free slots, first to urgent needs, and take back what endpoints have lost."""
        epps = [self._epps[name] for name in names]
        pressing, lacking = [], []
        for name, known in zip(names, epps, strict=True):
            held = known.held
            lacks = max(0, totals[name] - held) if self._ready(known, now) else 0
            pressing.append(min(lacks, _urgent(entitled[name], held)))
            lacking.append(lacks - pressing[-1])
        opened = {}
        for address, slots in room.items():
            free = slots - self._tallies[address].bound
            if free > 0:
                opened[address] = free
            elif free < 0:
                bounds = [known.bounds.get(address, 0) for known in epps]
                _take(address, slots, bounds, epps, most)
        for wants in (pressing, lacking):
            for address in opened if any(wants) else ():
                opened[address] -= self._give(address, opened[address], wants, epps, changed)

    def _give(
        self,
        address: str,
        slots: int,
        lacking: list[int],
        epps: list[_EPP],
        changed: list[dict[str, int]],
    ) -> int:
        """Divide an endpoint's free slots among the EPPs that lack some, by how many they lack.

        Returns:
            How many of them were given.
        """
        free = slots
        lack = sum(lacking)
        # The most in need goes first, so that single slots do not always go to the first by name.
        for number in sorted(range(len(lacking)), key=lambda number: -lacking[number]):
            need = lacking[number]
            if free <= 0 or not need:
                break
            part = min(need, -(-free * need // lack), free)
            lack -= need
            free -= part
            lacking[number] -= part
            bound = epps[number].bounds.get(address, 0)
            changed[number][address] = changed[number].get(address, bound) + part
            epps[number].lowered.pop(address, None)
            self.moves += part
        return slots - free

    def _ready(self, known: _EPP, now: float) -> bool:
        """Whether an EPP may be sent something: it has answered, or is late."""
        return known.reported and (not known.sent or now - known.sent_at >= RESEND_SECONDS)

    def _next(self) -> int:
        self._number += 1
        return self._number

    def _sent(self, known: _EPP, shares: Shares, now: float) -> Shares:
        known.sent[shares.number] = shares
        known.sent_at = now
        known.total = shares.total or 0
        known.place = (shares.epps, shares.rank)
        touched = known.endpoints if shares.total is None else shares.slots
        known.rebound(touched)
        self._changed |= touched.keys()
        return shares

    def held(self) -> dict[str, int]:
        """Return how many slots each EPP that keeps to shares may hold."""
        return {name: known.held for name, known in self._epps.items() if not known.free}


def _totals(
    entitled: Mapping[str, Entitlement], held: Mapping[str, int], free: int
) -> dict[str, int]:
    """Return how many slots each EPP is to keep: it gives up only what others lack."""
    totals = {name: max(has, entitled[name].slots) for name, has in held.items()}
    short = sum(totals.values()) - sum(held.values()) - free
    if short <= 0:
        part, rest = divmod(-short, len(held))
        return {
            name: total + part + (number < rest)
            for number, (name, total) in enumerate(totals.items())
        }
    kept = {name: entitlement.kept for name, entitlement in entitled.items()}
    settled = {name: entitlement.slots for name, entitlement in entitled.items()}
    short -= _lower(totals, short, settled, held)
    _lower(totals, short, kept, held)
    urgent = sum(_urgent(entitled[name], held[name]) for name in held) - free
    if urgent > 0:
        for name, has in held.items():
            if not entitled[name].urgent:
                totals[name] = min(totals[name], has)
        lowered = sum(max(0, has - totals[name]) for name, has in held.items())
        _lower(totals, RACE * urgent - lowered, kept, held)
    return totals


def _urgent(entitlement: Entitlement, held: int) -> int:
    """Return how many slots an EPP lacks that should come from lower bands of others."""
    return min(entitlement.urgent, max(0, entitlement.slots - held))


def _lower(
    totals: dict[str, int], short: int, kept: Mapping[str, int], held: Mapping[str, int]
) -> int:
    """Have EPPs give up slots beyond what they keep, in proportion; return how many."""
    beyond = {
        name: total - kept[name]
        for name, total in totals.items()
        if total > kept[name] and total <= held[name]  # the others lack some themselves
    }
    most = sum(beyond.values())
    if not most or short <= 0:
        return 0
    owed = 0.0
    for name in sorted(beyond, key=lambda name: beyond[name]):  # the most gives the rest
        owed += beyond[name] * min(1.0, short / most)
        back = min(beyond[name], int(owed + 1e-6))
        owed -= back
        totals[name] -= back
    return min(short, most)


def _take(
    address: str, slots: int, bounds: list[int], epps: list[_EPP], most: list[dict[str, int]]
) -> None:
    """Take back what an endpoint no longer has, from each in proportion to what it holds."""
    total = sum(bounds)
    for number, known in enumerate(epps):
        share = max(0, slots) * bounds[number] // total
        if bounds[number] > share and known.lowered.get(address) != share:
            known.lowered[address] = share
            most[number][address] = share


def _moves(known: _EPP, total: int) -> bool:
    """Whether a total would have the EPP give back more than it does, or less."""
    held = known.held
    return (total < held or known.total < held) and total != known.total
