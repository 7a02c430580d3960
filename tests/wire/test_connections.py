"""Slow, frozen and eager peers on both transports: none of them is in the way of another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack

import grpc
import pytest
from ext_proc_peer import Stream, channel, until

from forebay_epp.core.plan import LimitsPlan, Plan, SaturationMode, SaturationPlan
from forebay_epp.core.terms import Outcome
from forebay_epp.transport import Connections

BODY_BYTES = 64 << 10
BODIES = 128
PLAN = Plan(
    limits=LimitsPlan(max_bytes=BODIES * BODY_BYTES, max_body_bytes=BODY_BYTES),
    saturation=SaturationPlan(SaturationMode.CONCURRENCY, max_concurrency=1000),
)
QUICK = Connections(keepalive_seconds=0.5, keepalive_timeout_seconds=0.5, max_age_seconds=60.0)

PROXY = """
import sys, time
sys.path[:0] = sys.argv[2:]
from ext_proc_peer import Stream, channel
with channel(sys.argv[1]) as connection:
    streams = [Stream(connection) for _ in range(4)]
    for stream in streams:
        stream.send_request()
    for stream in streams:
        stream.routed()
    print("routed", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("connections", ["one", "two"])
def test_unfinished_bodies_do_not_delay_an_honest_request(start, connections):
    """128 that nearly fill what may be read; 20 requests come on their connection or another's."""
    picker = start(plan=PLAN)
    with ExitStack() as stack:
        theirs = stack.enter_context(channel(picker.address))
        mine = theirs if connections == "one" else stack.enter_context(channel(picker.address))
        slow = [Stream(theirs) for _ in range(BODIES)]
        for stream in slow:
            stream.send_headers()
            stream.send_body(b"x" * (BODY_BYTES - 1), end=False)
        until(lambda: picker.loop._read_bytes >= BODIES * (BODY_BYTES - 1), 60)
        worst = 0.0
        for _ in range(20):
            honest = Stream(mine)
            body = b'{"model":"m","p":"' + b"x" * (BODY_BYTES - 100) + b'"}'
            began = time.monotonic()
            honest.send_headers()
            honest.send_body(body[:5000], end=False)
            honest.send_body(body[5000:])
            assert honest.routed() == "10.0.0.1:8000"
            worst = max(worst, time.monotonic() - began)
        assert picker.loop.traffic.outcomes["", "", Outcome.REJECTED_QUEUE_FULL] == 1
        for stream in slow:
            stream.cancel()

    assert worst < 1.0
    until(picker.idle)


def test_a_frozen_proxy_loses_its_slots(start):
    """It is stopped with four requests running; the kernel still takes what is sent to it."""
    picker = start(slots=4, connections=QUICK)
    paths = [path for path in sys.path if path]
    proxy = subprocess.Popen(
        [sys.executable, "-c", PROXY, picker.address, *paths], stdout=subprocess.PIPE, text=True
    )
    try:
        assert proxy.stdout.readline() == "routed\n"
        assert picker.snapshot().in_flight == 4
        os.kill(proxy.pid, signal.SIGSTOP)

        until(picker.idle, 20)
    finally:
        proxy.kill()
        proxy.wait()
        proxy.stdout.close()


def test_a_proxy_that_pings_while_its_request_waits_is_not_cut(start):
    """Many pings with nothing sent in between, each later than the least interval."""
    picker = start(endpoints=(), connections=Connections(min_ping_seconds=0.05))
    options = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.keepalive_time_ms", 200),
        ("grpc.keepalive_timeout_ms", 5000),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    with grpc.insecure_channel(picker.address, options=options) as pinging:
        stream = Stream(pinging)
        stream.send_request()
        until(lambda: picker.snapshot().requests == 1)
        ended_at = time.monotonic() + 3.0
        until(lambda: time.monotonic() > ended_at or stream.call.done())

        assert not stream.call.done()
        assert picker.snapshot().requests == 1
        stream.cancel()


def test_an_old_connection_is_left_without_a_cut(start):
    """Its proxy opens another for what comes next; what runs on the old one runs to its end."""
    picker = start(slots=2, connections=Connections(max_age_seconds=0.5))
    peers = set()
    opened = picker.loop.open
    picker.loop.open = lambda on_output, peer="": (peers.add(peer), opened(on_output, peer))[1]
    with channel(picker.address) as connection:
        running = Stream(connection)
        running.send_request()
        running.routed()

        def moved():
            stream = Stream(connection)
            stream.send_request()
            stream.routed()
            stream.respond()
            stream.half_close()
            assert list(stream.call) == []
            return len(peers) > 1

        until(moved)
        running.respond()
        running.half_close()
        assert list(running.call) == []

    assert running.call.code() is grpc.StatusCode.OK
    until(picker.idle)
