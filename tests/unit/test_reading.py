"""Requests that are still being read: how much they may hold, and which is given up."""

from __future__ import annotations

import random

import pytest
from ext_proc_peer import http_headers

from forebay_control.plan import LimitsPlan, Plan, SaturationMode, SaturationPlan
from forebay_epp.core.observation.shadowed import ShadowedController
from forebay_epp.core.terms import Endpoint, Outcome
from forebay_epp.data_plane import DataPlane
from forebay_epp.traffic import Traffic
from forebay_extproc.v3 import external_processor_pb2 as pb

BODY = 1000
FITTING = 8


class Site:
    """A data plane in virtual time that reads at most `FITTING` bodies of `BODY` bytes at once."""

    def __init__(self, max_streams=1000):
        plan = Plan(
            limits=LimitsPlan(max_bytes=FITTING * BODY, max_body_bytes=BODY),
            saturation=SaturationPlan(SaturationMode.CONCURRENCY, max_concurrency=1000),
        )
        self.now = 100.0
        self.controller = ShadowedController(plan, random.Random(1))
        self.controller.set_endpoints([Endpoint("10.0.0.1:8000")], self.now)
        self.traffic = Traffic()
        self.data_plane = DataPlane(
            self.controller, self.traffic, max_streams, clock=lambda: self.now
        )

    def open(self, peer="ipv4:10.0.0.1:1"):
        self.now += 0.001
        return self.data_plane.open(lambda: None, peer)

    def begin(self, size_bytes=BODY - 1, peer="ipv4:10.0.0.1:1"):
        """Open a stream whose body has not ended after so many bytes."""
        exchange = self.open(peer)
        speak(exchange, request_headers=headers())
        speak(exchange, request_body=pb.HttpBody(body=b"x" * size_bytes))
        return exchange

    def whole(self, size_bytes=BODY, peer="ipv4:10.0.0.1:1"):
        """Send a whole request."""
        exchange = self.open(peer)
        speak(exchange, request_headers=headers())
        text = b'{"model":"m","p":"' + b"x" * (size_bytes - 20) + b'"}'
        speak(exchange, request_body=pb.HttpBody(body=text))
        speak(exchange, request_body=pb.HttpBody(end_of_stream=True))
        return exchange


def headers():
    return http_headers({":method": "POST", ":path": "/v1/completions"})


def speak(exchange, **fields):
    exchange.receive(pb.ProcessingRequest(**fields).SerializeToString())


def refused(exchange):
    """Return the status of the refusal, or 0."""
    for message in exchange.outbox:
        answer = pb.ProcessingResponse.FromString(message)
        if answer.HasField("immediate_response"):
            return answer.immediate_response.status.code
    return 0


def test_unfinished_bodies_never_keep_an_honest_request_out():
    """The oldest goes, with 429 and one outcome; newcomers are dispatched at once."""
    site = Site()
    slow = [site.begin() for _ in range(FITTING)]
    told = []
    slow[0].on_output = lambda: told.append(slow[0])

    honest = [site.whole() for _ in range(3)]

    assert [refused(exchange) for exchange in slow] == [429] + [0] * (FITTING - 1)
    assert told == [slow[0]]
    assert all(exchange.outbox and not refused(exchange) for exchange in honest)
    assert site.controller.state(site.now).in_flight == 3
    assert site.traffic.outcomes["", "", Outcome.REJECTED_QUEUE_FULL] == 1


def test_the_connection_that_holds_most_pays():
    """A slow body of another connection stays, although it is the oldest."""
    site = Site()
    other = site.begin(peer="ipv4:10.0.0.2:1")
    slow = [site.begin() for _ in range(FITTING)]

    site.whole(peer="ipv4:10.0.0.2:1")

    assert refused(other) == 0
    assert refused(slow[0]) == 429


def test_an_old_body_that_holds_little_stays():
    """It would free nothing."""
    site = Site()
    small = site.begin(size_bytes=1)
    site.now += 1.0
    slow = [site.begin() for _ in range(FITTING)]

    site.whole()

    assert refused(small) == 0
    assert refused(slow[0]) == 429


def test_streams_that_send_no_request_make_room_for_those_that_do():
    """At the cap of streams the oldest unread one of the busiest connection goes."""
    site = Site(max_streams=10)
    other = site.open("ipv4:10.0.0.2:1")
    silent = [site.open() for _ in range(9)]

    honest = [site.whole(peer="ipv4:10.0.0.3:1") for _ in range(5)]

    assert [refused(exchange) for exchange in silent] == [429] * 5 + [0] * 4
    assert refused(other) == 0
    assert all(exchange.outbox and not refused(exchange) for exchange in honest)


def test_refused_streams_that_their_proxy_does_not_close_count_no_more():
    """A frozen proxy's streams, told to go, keep no request out."""
    site = Site(max_streams=4)
    silent = [site.open() for _ in range(4)]

    for _ in range(10):
        honest = site.whole(peer="ipv4:10.0.0.3:1")
        assert not refused(honest)
        honest.close()

    assert sum(refused(exchange) == 429 for exchange in silent) == 1


def test_a_stream_is_refused_where_every_other_one_is_a_request():
    """What waits or runs is not given up for a newcomer."""
    site = Site(max_streams=3)
    running = [site.whole() for _ in range(3)]

    assert refused(site.open()) == 429
    assert not any(refused(exchange) for exchange in running)


@pytest.mark.parametrize("ending", ["close", "finish", "refuse"])
def test_nothing_is_kept_of_connections(ending):
    """Whatever becomes of their streams."""
    site = Site()
    exchanges = [site.begin(peer=f"ipv4:10.0.0.1:{port}") for port in range(5)]
    if ending == "finish":
        for exchange in exchanges:
            speak(exchange, request_body=pb.HttpBody(end_of_stream=True))
    elif ending == "refuse":
        site.now += 31.0
        site.data_plane.tick()
    for exchange in exchanges:
        exchange.close()

    assert (site.data_plane._intake._reading.size_bytes, len(site.data_plane._intake._reading)) == (
        0,
        0,
    )
    assert site.data_plane.open_streams == 0
