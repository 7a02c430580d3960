"""What the controller learns of engines that work in steps, in virtual time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from forebay_epp.core.terms import EndpointMetrics
from forebay_replay.replay import Replay
from forebay_replay.routing import Queued
from forebay_replay.scenarios import CHAT, H100, SMALL, mixed, plan


def replayed(engines, rate, seconds):
    """A run that has not begun, at `rate` requests a second, with everything learned."""
    return Replay(engines, Queued(len(engines), plan(None)), mixed(rate, seconds, 1))


def limits(replay):
    return [endpoint.limit for endpoint in replay.routing.controller.state(replay.now).endpoints]


def critical_p99_seconds(replay):
    ttft = sorted(a.ttft_seconds for a in replay.answers if a.arrival.model == CHAT)
    return ttft[int(0.99 * len(ttft))]


def share_of_first(replay):
    """The first server's part of all requests, over its fair part."""
    sent = [answer.server for answer in replay.answers if answer.server >= 0]
    return sent.count(0) * len(replay.servers) / len(sent)


def test_four_small_servers_are_learned_from_a_cold_start():
    """At twice what they can do Critical waits for 0.4 s at most, and no slot is lost."""
    replay = replayed([SMALL] * 4, 36, 60)
    replay.run()

    assert limits(replay) == [8] * 4
    assert critical_p99_seconds(replay) <= 0.4
    assert max(server.most_excess for server in replay.servers) <= 3


def test_a_batch_of_256_is_learned_without_flooding():
    """What is sent beyond the batch is never more than an eighth of it."""
    replay = replayed([H100], 150, 12)
    replay.run(10)

    assert 250 <= limits(replay)[0] <= 270
    assert replay.servers[0].most_excess <= 256 // 8 + 2


def test_a_capacity_that_changes_is_followed():
    """From 256 to 128 within two seconds and a half, and back within ten."""
    replay = replayed([H100], 150, 60)
    (server,) = replay.servers

    def change(slots):
        server.engine.hardware = replace(H100, max_num_seqs=slots)

    replay.at(20.0, change, 128)
    replay.at(40.0, change, 256)
    replay.run(22.5)
    assert limits(replay)[0] <= 128 + 128 // 8
    replay.run(39.0)
    assert limits(replay)[0] >= 128
    replay.run(50.0)
    assert server.engine.running >= 250


def test_scrapes_that_take_long_are_enough():
    """0.9 s each."""
    replay = replayed([SMALL] * 4, 36, 40)
    for server in replay.servers:
        server.scrape_seconds = 0.9
    replay.run()

    assert limits(replay) == [8] * 4
    assert critical_p99_seconds(replay) <= 0.5


@pytest.mark.parametrize("slots", [8, 32, 256, 1024])
def test_servers_of_any_size_are_kept_full(slots):
    """As soon as they have taken in so many prompts."""
    engine = replace(SMALL, max_num_seqs=slots, max_num_batched_tokens=8192, kv_blocks=100_000)
    replay = Replay([engine], Queued(1, plan(None)), mixed(slots * 1.2, 30, 2), (25.0, 30.0))
    replay.run(30)
    (server,) = replay.servers

    assert server.running_seconds / 5 / slots >= 0.97


class Predicting(Queued):
    """Keeps the requests that it queues."""

    def __init__(self, servers, given):
        super().__init__(servers, given)
        self.requests = []

    def submit(self, request, now):
        self.requests.append(request)
        super().submit(request, now)


@pytest.mark.parametrize("band", ["Critical", "Standard", "Sheddable"])
def test_waits_are_predicted(band):
    """At 1.3 times what the servers can do, for each band on average within a quarter or 20 ms."""
    routing = Predicting(4, plan(None))
    Replay([SMALL] * 4, routing, mixed(24, 60, 1)).run()
    waits = [
        (request.predicted_seconds, request.dispatched_at - request.enqueued_at)
        for request in routing.requests
        if request.band == band and request.predicted_seconds is not None
    ]

    predicted, waited = (sum(column) / len(waits) for column in zip(*waits, strict=True))

    assert len(waits) > 100
    assert predicted == pytest.approx(waited, rel=0.25, abs=0.02)


LIES = {
    "idle": lambda page: replace(page, running=0, waiting=0),
    "dead": lambda _: None,
    "full": lambda page: replace(page, running=8, waiting=50),
    "huge": lambda page: replace(page, running=500, waiting=0),
    "without steps": lambda page: replace(page, steps=None),
    "frozen": lambda _: EndpointMetrics("10.0.0.0:8000", 2, 0, 0.1, 1.0),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_lies_gets_no_more_than_its_share(lie):
    """At most 1.2 times, and the other three lose nothing of their slots."""
    replay = Replay([SMALL] * 4, Queued(4, plan(None)), mixed(36, 40, 1), (10.0, 40.0))
    replay.servers[0].page = LIES[lie]
    replay.run(40)

    assert share_of_first(replay) <= 1.2
    for server in replay.servers[1:]:
        assert server.running_seconds / 30 / 8 >= 0.97
