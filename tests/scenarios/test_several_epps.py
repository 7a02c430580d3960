"""Several EPPs that share slots act as one: real cores and ledger, in virtual time."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from several_loads import (
    CRITICAL,
    LOW,
    MODELS,
    arrivals,
    fair_share_error,
    inverted,
    mixed,
    p99,
    spread,
    waits,
)
from sharing import EPPs, plan

from forebay_control.plan import Plan, UnmatchedPlan
from forebay_control.shares import Shares
from forebay_epp.core.controller import FlowController
from forebay_epp.core.terms import Endpoint, EndpointMetrics, Request


@pytest.fixture(scope="module")
def one():
    """The same load at one EPP."""
    return mixed(1, spread(1), spread(1))


@pytest.mark.parametrize(
    ("epps", "chat", "batch", "later_seconds", "share"),
    [
        pytest.param(2, spread(1, 1), spread(1, 1), 0.1, 0.01, id="2, even"),
        pytest.param(2, spread(1, 0), spread(0, 1), 0.1, 0.01, id="2, Critical at one only"),
        pytest.param(4, spread(9, 1, 1, 1), spread(1, 1, 1, 9), 0.1, 0.01, id="4, uneven"),
    ],
)
def test_priority_and_occupancy_are_those_of_one_epp(one, epps, chat, batch, later_seconds, share):
    """Under overload all slots are used, Critical hardly waits longer, and order holds."""
    several = mixed(epps, chat, batch)
    assert several.occupancy() >= 0.98 * one.occupancy()
    assert p99(waits(several, "chat")) <= p99(waits(one, "chat")) + later_seconds
    chats = [(s.arrived_at, s.sent_at) for s in several.sent if s.model == "chat"]
    assert inverted(chats, [s.sent_at for s in several.sent if s.model == "batch"]) <= share
    assert max(several.most_running.values()) <= 8


def test_tenants_share_evenly_however_their_requests_are_spread():
    """Two tenants want all slots, one sends nine tenths of its requests to the other EPP."""
    assert fair_share_error(2) <= 0.05


def test_shares_freeze_while_the_operator_is_away():
    """Slots stay where they are, and all go on being used where requests wait."""
    run = EPPs(plan(CRITICAL, LOW, slots=8, models=MODELS), 2, 8, 1.0)
    run.load(arrivals(100, 40.0, "batch", spread(1, 1)))
    run.run(10.0)
    run.operator = False
    run.measured_from = 10.0
    run.run(40.0)
    assert run.occupancy() >= 0.98
    assert max(run.most_running.values()) <= 8


def test_scrapes_divide_free_slots_once_shares_are_relaxed():
    """Each EPP takes its part of what a scrape shows to be free, and no more."""
    shared = Plan(bands=(LOW,), unmatched=UnmatchedPlan(band="Sheddable"))
    addresses = [f"10.0.0.{number}:8000" for number in range(4)]
    cores = [FlowController(shared, Random(number)) for number in range(3)]
    for rank, core in enumerate(cores):
        core.set_endpoints([Endpoint(address) for address in addresses], 0.0)
        core.set_shares(Shares(1, 0, {}, full=True, epps=3, rank=rank), 0.0)
        core.relax_shares()
        for address in addresses:
            core.observe(EndpointMetrics(address, 0, 0, 0.0, 1.0), 1.0)
    for address in addresses:  # an endpoint of which nothing is known has four slots
        held = sorted(core.holdings().endpoints[address].slots for core in cores)
        assert held == [1, 1, 2]


def test_a_ceiling_is_of_the_epps_own_slots():
    """An EPP that has half of the pool fills half of that where the band may fill half."""
    band = replace(LOW, max_saturation_percent=50)
    core = FlowController(plan(band, slots=8), Random(1))
    core.set_endpoints([Endpoint("10.0.0.1:8000")], 0.0)
    core.set_shares(Shares(1, 4, {"10.0.0.1:8000": 4}, full=True, epps=2), 0.0)
    for number in range(9):
        core.submit(Request(number, "m", 1), 0.0)
    assert len(core.poll(0.0)) == 2


def test_an_epp_gives_back_first_what_is_idle_and_then_what_ends():
    """A lower total takes idle slots at once and the others as their requests end."""
    core = FlowController(plan(LOW, slots=8), Random(1))
    core.set_endpoints([Endpoint("10.0.0.1:8000")], 0.0)
    core.set_shares(Shares(1, 6, {"10.0.0.1:8000": 6}, full=True, epps=2), 0.0)
    for number in range(4):
        core.submit(Request(number, "m", 1), 0.0)
    assert len(core.poll(0.0)) == 4
    core.set_shares(Shares(2, 3), 0.0)
    assert core.holdings().endpoints["10.0.0.1:8000"].slots == 4
    for number in range(4):
        core.complete(number, None, 1.0)
    assert core.holdings().endpoints["10.0.0.1:8000"].slots == 3


def test_a_bound_raises_no_share():
    """What an endpoint has lost is taken from a share that is larger, and nothing else happens."""
    core = FlowController(plan(LOW, slots=8), Random(1))
    core.set_endpoints([Endpoint("10.0.0.1:8000")], 0.0)
    core.set_shares(Shares(1, 8, {"10.0.0.1:8000": 3}, full=True, epps=2), 0.0)
    core.set_shares(Shares(2, 8, most={"10.0.0.1:8000": 5}), 0.0)
    assert core.holdings().endpoints["10.0.0.1:8000"].slots == 3
    core.set_shares(Shares(3, 8, most={"10.0.0.1:8000": 2}), 0.0)
    assert core.holdings().endpoints["10.0.0.1:8000"].slots == 2


def test_an_epp_without_shares_again_uses_the_limit():
    """A share of nothing stops it, and being alone frees it."""
    core = FlowController(plan(LOW, slots=8), Random(1))
    core.set_endpoints([Endpoint("10.0.0.1:8000")], 0.0)
    core.set_shares(Shares(1, 0, {}, full=True, epps=2), 0.0)
    core.submit(Request(1, "m", 1), 0.0)
    assert not core.poll(0.0)
    core.set_shares(Shares(2, None), 0.0)
    assert len(core.poll(0.0)) == 1
