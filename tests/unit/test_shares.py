"""Shares of slots: how they are worked out, and that no history hands a slot out twice."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay_control.shares import BandDemand, Demand, FlowDemand, Held, Shares
from forebay_operator.channel.shares import allocation
from forebay_operator.channel.shares.allocation import max_min
from forebay_operator.channel.shares.ledger import (
    AWAY_SECONDS,
    PROBE_SECONDS,
    SETTLING_SECONDS,
    Ledger,
)

HISTORIES = int(os.environ.get("FOREBAY_SHARE_HISTORIES", "150"))
LIMITS = {"a": 3, "b": 5, "c": 1}


def band(priority: int, waiting: int, running: int = 0) -> BandDemand:
    """Return what a band of one flow wants."""
    return BandDemand(priority, flows={(): FlowDemand(waiting, running)})


# --- allocation


def entitlements(
    demands: dict[str, dict[str, BandDemand]], held: dict[str, int], slots: int
) -> dict[str, int]:
    """Return how many slots each EPP should have."""
    return {epp: got.slots for epp, got in allocation.entitlements(demands, held, slots).items()}


def test_a_higher_band_is_served_first_wherever_it_waits() -> None:
    """Running requests of a lower band claim only what the higher one leaves."""
    got = entitlements(
        {"x": {"Sheddable": band(-100, 50, 10)}, "y": {"Critical": band(100, 6)}},
        {"x": 10, "y": 0},
        10,
    )
    assert got == {"x": 4, "y": 6}


def test_flows_share_a_band_by_weight_over_all_epps() -> None:
    """A flow that is at two EPPs gets no more than its part, and divides that by its claims."""
    got = entitlements(
        {
            "x": {"S": BandDemand(0, flows={("m",): FlowDemand(90, 0, (1,))})},
            "y": {
                "S": BandDemand(
                    0, flows={("m",): FlowDemand(10, 0, (1,)), ("n",): FlowDemand(100, 0, (3,))}
                )
            },
        },
        {"x": 0, "y": 0},
        80,
    )
    assert got == {"x": 18, "y": 62}


def test_a_level_inside_another_shares_what_the_outer_flow_gets() -> None:
    """Two tenants of one model together get what the only tenant of the other gets."""
    flows = {("m", "t"): FlowDemand(50, 0, (1, 1)), ("m", "u"): FlowDemand(50, 0, (1, 1))}
    other = {("n", "t"): FlowDemand(50, 0, (1, 1))}
    got = entitlements(
        {"x": {"S": BandDemand(0, flows=flows)}, "y": {"S": BandDemand(0, flows=other)}},
        {"x": 0, "y": 0},
        40,
    )
    assert got == {"x": 20, "y": 20}


def test_a_reserved_share_and_a_ceiling_hold_over_all_epps() -> None:
    """The lower band has its tenth, and the higher one stops at its ceiling."""
    low = BandDemand(0, reserved_percent=10, flows={(): FlowDemand(100, 0)})
    high = BandDemand(9, max_saturation_percent=80, flows={(): FlowDemand(100, 0)})
    got = entitlements({"x": {"low": low}, "y": {"high": high}}, {"x": 0, "y": 0}, 100)
    assert got == {"x": 20, "y": 80}


def test_slots_that_none_claims_are_spread() -> None:
    """An EPP without requests is entitled to half of its part of them, against back and forth."""
    got = entitlements({"x": {"S": band(0, 0, 4)}, "y": {}}, {"x": 100, "y": 0}, 104)
    assert got == {"x": 29, "y": 25}


def test_small_differences_within_a_band_move_nothing() -> None:
    """What an EPP holds stays while it is within the deadband of what it should be."""
    demands = {"x": {"S": band(0, 52, 50)}, "y": {"S": band(0, 48, 50)}}
    assert entitlements(demands, {"x": 50, "y": 50}, 100) == {"x": 50, "y": 50}


@given(
    st.dictionaries(st.integers(0, 9), st.floats(0, 100), min_size=1),
    st.floats(0, 500),
    st.data(),
)
def test_max_min_fairness_wastes_nothing_and_favours_none(
    claims: dict[int, float], amount: float, data: st.DataObject
) -> None:
    """No claim is exceeded, all is given out, and who is unsatisfied has the most by weight."""
    weights = {key: data.draw(st.integers(1, 9)) for key in claims}
    got = max_min(claims, weights, amount)
    assert sum(got.values()) == pytest.approx(min(amount, sum(claims.values())))
    assert all(got[key] <= claims[key] for key in claims)
    rates = {key: part / weights[key] for key, part in got.items()}
    for key, claim in claims.items():
        if got[key] < claim - 1e-6:
            assert max(rates.values()) <= rates[key] + 1e-6


# --- the ledger, against a model of EPPs that lose, repeat and delay messages


@dataclass
class ModelEPP:
    """What an EPP does with shares, written down a second time."""

    name: str
    stream: int = 0
    shared: bool = False
    number: int = 0
    seen: int = 0
    total: int = 0
    share: dict[str, int] = field(default_factory=dict)
    running: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LIMITS, 0))
    waiting: int = 0
    urgent: bool = False
    told: dict[str, Held] = field(default_factory=dict)
    full: bool = True

    def held(self, address: str) -> int:
        """Return how many slots it may use or uses."""
        if not self.shared:
            return max(LIMITS[address], self.running[address])
        return max(self.share.get(address, 0), self.running[address])

    def take(self, shares: Shares) -> None:
        """Take shares, unless later ones have come before."""
        if shares.number <= self.seen:
            return
        self.seen = shares.number
        if shares.total is None:
            self.shared = False
            return
        self.shared = True
        self.total = shares.total
        if shares.full:
            self.share = dict.fromkeys(LIMITS, 0)
        self.share |= shares.slots
        for address, most in shares.most.items():
            self.share[address] = min(self.share.get(address, 0), most)
        for address in LIMITS:
            self.give_back(address)

    def give_back(self, address: str) -> None:
        """Give back what is too much and idle."""
        excess = sum(map(self.held, LIMITS)) - self.total
        idle = self.share.get(address, 0) - self.running[address]
        if self.shared and excess > 0 and idle > 0:
            self.share[address] -= min(excess, idle)

    def dispatch(self, address: str) -> None:
        """Use a slot if there is one."""
        if self.waiting and self.running[address] < self.held(address):
            self.running[address] += 1
            self.waiting -= 1

    def complete(self, address: str) -> None:
        """End a request."""
        if self.running[address]:
            self.running[address] -= 1
            self.give_back(address)

    def report(self) -> Demand:
        """Say what has changed since the last report."""
        now = {a: Held(self.held(a), self.running[a], LIMITS[a]) for a in LIMITS}
        changed = now if self.full else {a: h for a, h in now.items() if self.told.get(a) != h}
        self.told = now
        self.number += 1
        full, self.full = self.full, False
        claim = band(100 if self.urgent else 0, self.waiting, sum(self.running.values()))
        return Demand(self.number, self.seen, self.shared, full, {"b": claim}, changed)


class World:
    """EPPs, a leader and what is on the way between them."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.now = 0.0
        self.ledger = Ledger(self.now)
        self.epps = [ModelEPP(f"e{number}") for number in range(random.choice((2, 3, 4)))]
        self.up: list[tuple[ModelEPP, int, Demand]] = []
        self.down: list[tuple[ModelEPP, int, Shares]] = []
        for epp in self.epps:
            self.connect(epp)

    def connect(self, epp: ModelEPP) -> None:
        """Begin a stream; nothing of the one before arrives any more."""
        epp.stream += 1
        epp.number = epp.seen = 0
        epp.full = True
        self.ledger.join(epp.name, self.now)
        # The first report of a stream is what opens it, so it does arrive.
        self.ledger.report(epp.name, epp.report(), self.now)

    def step(self) -> None:
        """Do something at random."""
        random = self.random
        epp = random.choice(self.epps)
        address = random.choice(list(LIMITS))
        kind = random.random()
        if kind < 0.5:
            self.serve(epp, address)
        elif kind < 0.65:
            self.up.append((epp, epp.stream, epp.report()))
        elif kind < 0.78:
            for name, shares in self.ledger.allot(self.now).items():
                self.down.extend((to, to.stream, shares) for to in self.epps if to.name == name)
        elif kind < 0.97:
            self.deliver()
        else:
            self.fail(epp)
        self.now += random.random() * 0.002

    def serve(self, epp: ModelEPP, address: str) -> None:
        """Let requests come, start or end."""
        kind = self.random.random()
        if kind < 0.3:
            epp.waiting += self.random.randrange(6)
            epp.urgent = self.random.random() < 0.3
        elif kind < 0.7:
            epp.dispatch(address)
        else:
            epp.complete(address)

    def fail(self, epp: ModelEPP) -> None:
        """Cut a stream, change the leader, pause, or end an EPP."""
        kind = self.random.random()
        if kind < 0.5:
            self.connect(epp)
        elif kind < 0.7:
            self.ledger = Ledger(self.now)
            for other in self.random.sample(self.epps, len(self.epps)):
                self.connect(other)
        elif kind < 0.85:
            self.pause()
        elif len(self.epps) > 1:
            self.epps.remove(epp)
            self.ledger.leave(epp.name, self.now, gone=self.random.random() < 0.5)

    def pause(self) -> None:
        """Let time pass in which no EPP is silent for so long that it counts as gone."""
        for epp in self.epps:
            self.ledger.report(epp.name, epp.report(), self.now)
        self.now += 0.9 * AWAY_SECONDS
        for epp in self.epps:
            self.ledger.report(epp.name, epp.report(), self.now)

    def deliver(self) -> None:
        """Deliver any message, perhaps twice, or lose it."""
        random = self.random
        queue = random.choice((self.up, self.down))
        if not queue:
            return
        number = random.randrange(len(queue)) if random.random() < 0.4 else 0
        epp, stream, message = queue[number]
        if random.random() < 0.9:
            del queue[number]
        if random.random() < 0.15 or stream != epp.stream:
            return
        if isinstance(message, Shares):
            epp.take(message)
        elif epp in self.epps:
            self.ledger.report(epp.name, message, self.now)

    def settle(self) -> None:
        """Let messages flow without faults until nothing changes."""
        self.up.clear()
        self.down.clear()
        for epp in self.epps:
            self.connect(epp)
        for _ in range(12):
            self.now += 0.5
            for epp in self.epps:
                self.ledger.report(epp.name, epp.report(), self.now)
            for name, shares in self.ledger.allot(self.now).items():
                for epp in self.epps:
                    if epp.name == name:
                        epp.take(shares)


def raised(world: World, before: dict[str, int]) -> dict[str, int]:
    """Return the sums of what EPPs hold, and check that none has risen above its limit."""
    if not all(epp.shared and epp.name in world.ledger.held() for epp in world.epps):
        return {}  # one has used what it saw until now
    sums = {a: sum(epp.held(a) for epp in world.epps) for a in LIMITS}
    for address, held in sums.items():
        assert held <= max(LIMITS[address], before.get(address, 99)), address
    return sums


@settings(max_examples=HISTORIES, deadline=None)
@given(st.integers(0, 2**63))
def test_no_history_hands_a_slot_out_twice(seed: int) -> None:
    """Messages are lost, doubled, late; leaders change, EPPs end: sums stay within the limits."""
    world = World(Random(seed))
    sums: dict[str, int] = {}
    for _ in range(150):
        world.step()
        sums = raised(world, sums)


@settings(max_examples=min(HISTORIES, 50), deadline=None)
@given(st.integers(0, 2**63))
def test_all_slots_are_in_use_once_messages_arrive_again(seed: int) -> None:
    """After any history the EPPs together hold every slot that they have requests for."""
    world = World(Random(seed))
    for _ in range(100):
        world.step()
    world.settle()
    for epp in world.epps:
        epp.waiting += 20
    world.settle()
    for _ in range(20):
        for epp in world.epps:
            for address in LIMITS:
                epp.dispatch(address)
        world.settle()
    used = {a: sum(epp.running[a] for epp in world.epps) for a in LIMITS}
    assert all(used[a] >= LIMITS[a] for a in LIMITS)


def ledger_of(*epps: str, now: float = 0.0) -> Ledger:
    """Return a ledger that has led for long, of EPPs that keep to shares and hold nothing."""
    ledger = Ledger(now - SETTLING_SECONDS)
    for epp in epps:
        ledger.join(epp, now)
    return ledger


def test_an_epp_that_is_alone_gets_no_shares() -> None:
    """It costs nothing then, and the EPP uses what it sees."""
    ledger = ledger_of("x")
    ledger.report("x", Demand(1, 0, False, True, {}, {"a": Held(4, 0, 4)}), 0.0)
    assert not ledger.allot(0.0)


def test_the_last_epp_is_freed_from_shares() -> None:
    """Once the other has gone and nothing of it runs."""
    ledger = ledger_of("x", "y")
    ledger.report("x", Demand(1, 0, True, True, {}, {"a": Held(2, 0, 4)}), 0.0)
    ledger.report("y", Demand(1, 0, True, True, {}, {"a": Held(2, 0, 4)}), 0.0)
    ledger.leave("y", 0.1, gone=True)
    assert ledger.allot(0.1)["x"].total is None


def test_requests_of_a_lost_epp_keep_their_slots_while_scrapes_show_them() -> None:
    """Its other slots return after `AWAY_SECONDS`, and these once the server is rid of them."""
    ledger = ledger_of("x", "y", "z")
    wants = {"S": band(0, 50)}
    for epp in "xz":
        held = {"a": Held(0, 0, 8, inside=3)}
        ledger.report(epp, Demand(1, 0, True, True, wants, held), 0.0)
    ledger.report("y", Demand(1, 0, True, True, wants, {"a": Held(8, 3, 8, inside=3)}), 0.0)
    later = AWAY_SECONDS + 0.1
    for epp in "xz":
        ledger.report(epp, Demand(2, 0, True, False, wants, {}), later)
    granted = sum(shares.slots["a"] for shares in ledger.allot(later).values())
    assert granted == 5
    for number, epp in enumerate("xz"):
        held = {"a": Held(2 + number, 0, 8)}
        ledger.report(epp, Demand(3, 9, True, True, wants, held), later)
    slots = {epp: shares.slots["a"] for epp, shares in ledger.allot(later).items()}
    assert sum(ledger.held().values()) == 8, slots


def test_a_server_that_seems_full_of_others_is_tried_now_and_then() -> None:
    """One EPP gets one slot of it after a while without a request of ours there."""
    ledger = ledger_of("x", "y")
    wants = {"S": band(0, 5)}
    held = {"a": Held(0, 0, 4, inside=90)}
    for epp in "xy":
        ledger.report(epp, Demand(1, 0, True, True, wants, held), 0.0)
    assert not any(shares.slots for shares in ledger.allot(0.0).values())
    for epp in "xy":
        ledger.report(epp, Demand(2, 9, True, True, wants, held), PROBE_SECONDS)
    sent = ledger.allot(PROBE_SECONDS).values()
    assert sum(sum(shares.slots.values()) for shares in sent) == 1


def test_a_new_leader_hands_out_only_what_epps_hold_until_all_can_have_come() -> None:
    """An EPP that has not come yet may hold the rest."""
    ledger = Ledger(0.0)
    wants = {"S": band(0, 50)}
    for epp in "xy":
        ledger.join(epp, 0.0)
        ledger.report(epp, Demand(1, 0, True, True, wants, {"a": Held(2, 0, 8)}), 0.0)
    ledger.allot(0.0)
    assert sum(ledger.held().values()) == 4
    for epp in "xy":
        ledger.report(epp, Demand(2, 9, True, True, wants, {"a": Held(2, 0, 8)}), SETTLING_SECONDS)
    ledger.allot(SETTLING_SECONDS)
    assert sum(ledger.held().values()) == 8
