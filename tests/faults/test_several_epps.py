"""Several EPPs behind one Envoy: what is lost with one of them, or with their leader.

`steadily` sends at 0.8 or 1.2 times what the servers can answer.
"""

from __future__ import annotations

import time

import pytest
from data_plane import answering
from ext_proc_peer import until
from several_epps import SeveralEpps

SLOTS = 8
SERVERS = 4
ALL_SLOTS = SLOTS * SERVERS
ANSWER_SECONDS = 0.4
PER_SECOND = ALL_SLOTS / ANSWER_SECONDS
PATIENCE_SECONDS = 20


@pytest.fixture
def start(tmp_path):
    """Start pools that end with the test."""
    started = []

    def begin(epps: int, **more) -> SeveralEpps:
        servers = [answering(ANSWER_SECONDS)] * SERVERS
        started.append(SeveralEpps(tmp_path, epps, *servers, slots=SLOTS, **more))
        return started[-1]

    yield begin
    for pool in started:
        pool.stop()


def failed(answers, since=0.0):
    """Those that were sent after a moment and not answered by a server."""
    return [answer for answer in answers if answer.sent_at > since and answer.outcome != "200"]


def answered_per_second(answers, begin, end):
    """How many answers came in a span of time."""
    return sum(begin <= answer.ended_at < end for answer in answers) / (end - begin)


def test_an_epp_that_is_killed_costs_no_later_request(start):
    """Of two: the other one has all slots, and no request that comes later fails."""
    pool = start(2)
    load = pool.steadily("standard", 1.2 * PER_SECOND, 5.0)
    time.sleep(2)
    killed_at = time.monotonic()
    pool.epps[0].kill()
    until(lambda: not pool.leader.slots(), PATIENCE_SECONDS)  # who is alone needs no shares
    answers = load.result(60)
    assert not failed(answers, since=killed_at)
    pool.check()


def test_an_epp_that_is_frozen_takes_part_again_once_it_thaws(start):
    """Its slots have gone to the other one by then, and it uses none of them."""
    pool = start(2)
    load = pool.steadily("standard", 0.8 * PER_SECOND, 14.0)
    time.sleep(2)
    pool.epps[0].freeze()
    until(pool.envoy.avoids_one, PATIENCE_SECONDS)
    avoided_at = time.monotonic()
    until(lambda: not pool.leader.slots(), PATIENCE_SECONDS)
    time.sleep(2)
    pool.epps[0].thaw()
    until(lambda: sum(pool.leader.slots().values()) == ALL_SLOTS, PATIENCE_SECONDS)
    answers = load.result(60)
    assert not failed(answers, since=avoided_at)
    pool.check()


def test_an_operator_that_is_killed_under_load_costs_no_request(start):
    """Servers stay full, and shares are valid again soon after it is back."""
    pool = start(2)
    load = pool.steadily("standard", 1.2 * PER_SECOND, 18.0)
    time.sleep(3)
    killed_at = time.monotonic()
    pool.leader.kill()
    time.sleep(12)  # shares are believed for 10 s of it
    pool.leader.restart()
    back_at = time.monotonic()
    until(lambda: len(pool.leader.slots()) == 2, PATIENCE_SECONDS)
    answers = load.result(120)
    assert not failed(answers)
    before = answered_per_second(answers, killed_at - 2, killed_at)
    assert answered_per_second(answers, killed_at, back_at) >= 0.8 * before
    pool.check()


def test_an_epp_that_is_added_takes_its_part(start):
    """Under overload it gets slots for what comes to it, and no request fails."""
    pool = start(1, spare=1)
    load = pool.steadily("standard", 1.2 * PER_SECOND, 20.0)
    epp = pool.add()
    until(lambda: epp.state().get("in_flight", 0) > 0, PATIENCE_SECONDS)
    answers = load.result(120)
    assert not failed(answers)
    pool.check()
