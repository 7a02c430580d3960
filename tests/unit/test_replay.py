"""The replay's own machinery: servers that are killed."""

from __future__ import annotations

import pytest

from forebay_replay.load import Arrival
from forebay_replay.replay import RETRY_SECONDS, Replay
from forebay_replay.routing import Direct, Queued
from forebay_replay.scenarios import CHAT, plan
from forebay_sim.hardware import Hardware


def routings():
    return [Direct(2, least_request=True), Queued(2, plan(2)), Queued(2, plan(None))]


@pytest.mark.parametrize("routing", routings(), ids=["direct", "manual", "adaptive"])
def test_what_a_killed_server_held_is_asked_again(routing):
    """Each request is answered once, and none by the server while it is away."""
    arrivals = [Arrival(0.01 * n, CHAT, 20, 100) for n in range(8)]
    replay = Replay([Hardware(max_num_seqs=2)] * 2, routing, arrivals)
    replay.at(0.5, replay.restart, 0, 3.0)

    replay.run()

    answered = [answer for answer in replay.answers if not answer.failed]
    failed = [answer for answer in replay.answers if answer.failed]
    assert sorted(answer.arrival for answer in answered) == arrivals
    assert failed
    assert {answer.server for answer in failed} == {0}
    assert all(answer.ended_at > answer.first_at for answer in answered)
    away = [a for a in answered if a.server == 0 and 0.5 <= a.sent_at < 3.5 - RETRY_SECONDS]
    assert not away


def test_a_killed_server_is_left_out_until_it_is_back():
    """One request finds out, which is tried again; a refused scrape keeps others away."""
    arrivals = [Arrival(0.05 * n, CHAT, 20, 10) for n in range(100)]
    replay = Replay([Hardware(max_num_seqs=4)] * 2, Queued(2, plan(None)), arrivals)
    replay.at(1.0, replay.restart, 0, 2.0)

    replay.run()

    assert sum(answer.failed for answer in replay.answers) <= 4
    assert any(answer.server == 0 and answer.sent_at > 3.0 for answer in replay.answers)
