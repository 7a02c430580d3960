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
    until(lambda: not pool.leader.slots(), 5)  # who is alone needs no shares
    answers = load.result(60)
    assert not failed(answers, since=killed_at)
    pool.check()


def test_an_epp_that_is_frozen_takes_part_again_once_it_thaws(start):
    """Its slots have gone to the other one by then, and it uses none of them."""
    pool = start(2)
    load = pool.steadily("standard", 0.8 * PER_SECOND, 14.0)
    time.sleep(2)
    frozen_at = time.monotonic()
    pool.epps[0].freeze()
    until(lambda: not pool.leader.slots(), 10)
    time.sleep(4)
    pool.epps[0].thaw()
    until(lambda: sum(pool.leader.slots().values()) == ALL_SLOTS, PATIENCE_SECONDS)
    answers = load.result(60)
    # Envoy needs two health checks to see it.
    assert not failed(answers, since=frozen_at + 4)
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
    assert time.monotonic() - back_at < 5  # most of which is its start
    answers = load.result(120)
    assert not failed(answers)
    assert answered_per_second(answers, killed_at + 1, back_at) >= 0.9 * PER_SECOND
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
