"""Slow, frozen and eager peers on both transports: none of them is in the way of another."""

from __future__ import annotations

import signal
import socket
import struct
import threading
import time
from contextlib import ExitStack

import grpc
import pytest
from ext_proc_peer import Stream, channel, client_process, until

from forebay_control.plan import LimitsPlan, Plan, SaturationMode, SaturationPlan
from forebay_epp.core.terms import Outcome
from forebay_epp.transport import PROCESS, Connections
from forebay_extproc.v3 import external_processor_pb2 as pb

PING, GOAWAY, ACK = 6, 7, 1

BODY_BYTES = 64 << 10
BODIES = 128
PLAN = Plan(
    limits=LimitsPlan(max_bytes=BODIES * BODY_BYTES, max_body_bytes=BODY_BYTES),
    saturation=SaturationPlan(SaturationMode.CONCURRENCY, max_concurrency=1000),
)
QUICK = Connections(keepalive_seconds=0.5, keepalive_timeout_seconds=0.5, max_age_seconds=60.0)

PROXY = """
import sys, time
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
    epp = start(plan=PLAN)
    with ExitStack() as stack:
        theirs = stack.enter_context(channel(epp.address))
        mine = theirs if connections == "one" else stack.enter_context(channel(epp.address))
        slow = [Stream(theirs) for _ in range(BODIES)]
        for stream in slow:
            stream.send_headers()
            stream.send_body(b"x" * (BODY_BYTES - 1), end=False)
        until(lambda: epp.data_plane._intake._reading.size_bytes >= BODIES * (BODY_BYTES - 1), 60)
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
        assert epp.traffic.outcomes["", "", Outcome.REJECTED_QUEUE_FULL] == 1
        for stream in slow:
            stream.cancel()

    assert worst < 1.0
    until(epp.idle)


def test_a_frozen_proxy_loses_its_slots(start):
    """It is stopped with four requests running; the kernel still takes what is sent to it."""
    epp = start(slots=4, connections=QUICK)
    with client_process(PROXY, epp.address, "routed") as proxy:
        assert epp.state().in_flight == 4
        proxy.send_signal(signal.SIGSTOP)

        until(epp.idle, 20)


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """An HTTP/2 frame (RFC 9113)."""
    head = len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big")
    return head + payload


def request() -> bytes:
    """The frames of a whole request on stream 1, its headers uncompressed (RFC 7541)."""
    pairs = {
        ":method": "POST",
        ":scheme": "http",
        ":path": PROCESS,
        ":authority": "epp",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    block = b"".join(
        b"\0" + bytes((len(key),)) + key.encode() + bytes((len(value),)) + value.encode()
        for key, value in pairs.items()
    )
    headers = pb.HttpHeaders(end_of_stream=True)
    for key, value in ((":method", b"GET"), (":path", b"/x")):
        headers.headers.headers.add(key=key, raw_value=value)
    message = pb.ProcessingRequest(request_headers=headers).SerializeToString()
    data = b"\0" + struct.pack(">I", len(message)) + message
    return frame(1, 4, 1, block) + frame(0, 0, 1, data)


def test_a_proxy_that_pings_while_its_request_waits_is_not_cut(start):
    """Ten pings with nothing else on the connection, each later than the least interval."""
    epp = start(endpoints=(), connections=Connections(min_ping_seconds=0.05))
    with socket.create_connection(("127.0.0.1", epp.transport.port), 10) as peer:
        answers = peer.makefile("rb")
        peer.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + request())
        until(lambda: epp.state().requests == 1)
        answered = 0
        for number in range(10):
            time.sleep(0.1)  # the interval is what is tested
            peer.sendall(frame(PING, 0, 0, number.to_bytes(8, "big")))
            while True:
                head = answers.read(9)
                payload = answers.read(int.from_bytes(head[:3], "big"))
                assert head[3] != GOAWAY, payload
                if head[3] == PING and head[4] == ACK:
                    answered += payload == number.to_bytes(8, "big")
                    break
                if head[3] == PING:
                    peer.sendall(frame(PING, ACK, 0, payload))
        answers.close()

        assert (answered, epp.state().requests) == (10, 1)


def test_an_old_connection_is_left_without_a_cut(start):
    """Its proxy opens another for what comes next; what runs on the old one runs to its end."""
    epp = start(slots=2, connections=Connections(max_age_seconds=0.5))
    peers = set()
    opened = epp.data_plane.open
    epp.data_plane.open = lambda on_output, peer="", *more: (
        peers.add(peer),
        opened(on_output, peer, *more),
    )[1]
    with channel(epp.address) as connection:
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
    until(epp.idle)


def test_a_wall_clock_that_is_set_back_delays_nothing(transport, start, monkeypatch):
    """The core waits by the wall clock; without a wake-up, for an hour if it is set back by one."""
    wall_clock = time.time
    jumps = []

    def jumping() -> float:
        here = threading.current_thread() is threading.main_thread()
        return wall_clock() + (jumps.pop() if jumps and not here else 0.0)

    monkeypatch.setattr(time, "time", jumping)
    epp = start()
    epp.state()
    jumps.append(3600.0)
    if transport == "completion-queue":
        until(lambda: not jumps)

    began = time.monotonic()
    epp.state()

    assert time.monotonic() - began < 5.0
