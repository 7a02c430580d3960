"""Faults of clients, model servers and the EPP itself, behind a real Envoy.

The numbers are those of the fault list in README.md, beside this file; what the state machines and
the core do by themselves has its tests elsewhere, and the list says where.
"""

from __future__ import annotations

import asyncio
import random
import time

import grpc
import pytest
from data_plane import ANSWER, DataPlane, SimulatedServer, answering, snapshot
from envoy_process import ModelServer
from ext_proc_peer import until

from forebay_epp.transport import PROCESS
from forebay_extproc.v3 import external_processor_pb2 as pb


@pytest.fixture
def start(tmp_path):
    """Start data planes that end with the test."""
    started = []

    def begin(*behaviours, **plan) -> DataPlane:
        started.append(DataPlane(tmp_path, *behaviours, **plan))
        return started[-1]

    yield begin
    for plane in started:
        plane.stop()


def test_an_epp_that_is_killed_costs_what_waited_in_it(start):
    """T1: 200 wait and 20 run when it dies; each has one answer at once; then service is back."""
    plane = start(answering(1.0), slots=20)
    pending = plane.send("standard", 220)
    plane.until_waiting(200)

    killed_at = time.monotonic()
    plane.epp.kill()
    answers = [future.result(60) for future in pending]
    plane.epp.restart()
    until(lambda: plane.send("critical")[0].result(60).outcome == "200", 30)

    assert all(answer.ended_at - killed_at < 3 for answer in answers)
    assert not any(answer.outcome == "200" for answer in answers)
    plane.check()
    plane.until_idle()


def test_an_epp_that_is_killed_cuts_no_observed_answer(start):
    """T1: of 20 that run and 50 that wait only those that wait fail; then service is back."""
    plane = start(answering(3.0), slots=20, responses="Observe")
    pending = plane.send("standard", 70)
    plane.until_waiting(50)
    until(lambda: len(plane.servers.served) == 21)  # and the one that showed that all is up

    plane.epp.kill()
    for future in pending:
        future.result(60)
    plane.epp.restart()
    until(lambda: plane.send("critical")[0].result(60).outcome == "200", 30)

    assert sum(answer.outcome == "200" for answer in plane.answers if "standard" in answer.id) == 20
    plane.check()
    plane.until_idle()


def test_requests_whose_time_ran_out_in_a_frozen_epp_are_not_dispatched(start):
    """T3: frozen for longer than the TTL; when it wakes it evicts them and sends none of them."""
    plane = start(answering(1.0), slots=1, ttl_seconds=2)
    holding = plane.send("standard")
    pending = plane.send("standard", 50)
    plane.until_waiting(50)
    plane.epp.freeze()
    time.sleep(3)  # the fault itself
    plane.epp.thaw()
    holding[0].result(60)
    answers = [future.result(60) for future in pending]

    assert {answer.outcome for answer in answers} <= {"EvictedTTL", "200"}
    assert sum(answer.outcome == "200" for answer in answers) <= 10  # those before the freeze
    plane.check()
    plane.until_idle()


def test_clients_that_leave_the_queue_are_never_served(start):
    """T12: 200 of 400 that wait go away at random; the rest keep their turn."""
    gate = asyncio.Event()

    async def when_open(_, writer):
        await gate.wait()
        writer.write(ANSWER)

    plane = start(answering(), slots=1)
    plane.servers.add(when_open)
    plane.epp.write(snapshot(plane.servers.addresses[1:], slots=1))
    until(lambda: len(plane.epp.state()["endpoints"]) == 1 and _at(plane, 1), 30)
    held = plane.send("critical")
    until(lambda: plane.epp.state()["in_flight"] == 1)
    staying = plane.send("standard", 200)
    leaving = plane.send("standard", 200, leave_after=3.0)
    plane.until_waiting(400)
    assert {future.result(60).outcome for future in leaving} == {"left"}
    plane.until_waiting(200)
    plane.thread.do(_open(gate))

    assert {future.result(60).outcome for future in (*held, *staying)} == {"200"}
    assert not plane.servers.served.keys() & {future.result().id for future in leaving}
    plane.check()
    plane.until_idle()


async def _open(gate):
    gate.set()


def _at(plane, number):
    return plane.epp.state()["endpoints"][0]["address"] == plane.servers.addresses[number]


def test_clients_that_leave_as_they_are_dispatched_leak_no_slot(start):
    """T13: 2,000 clients leave within the milliseconds in which they are dispatched."""
    plane = start(answering(0.002), slots=2)
    chance = random.Random(5)
    for _ in range(20):
        pending = [
            future
            for _ in range(100)
            for future in plane.send("standard", leave_after=chance.uniform(0.0, 0.25))
        ]
        for future in pending:
            future.result(60)

    totals = plane.totals()
    assert min(totals["200"], totals["left"]) > 100, totals
    plane.until_idle()
    plane.check()


def test_an_overflowing_band_refuses_and_does_not_touch_a_higher_one(start):
    """T14: 2,000 Sheddable requests at a cap of 200; Critical ones are served meanwhile."""
    plane = start(answering(0.02), slots=4, max_requests=200)
    flood = plane.send("sheddable", 2000)
    critical = [plane.send("critical")[0].result(60) for _ in range(20)]
    answers = [future.result(60) for future in flood]

    refused = [answer for answer in answers if answer.outcome == "RejectedQueueFull"]
    assert len(refused) > 1000
    assert all(1 <= answer.retry_after_seconds <= 60 for answer in refused)
    assert {answer.outcome for answer in answers} == {"200", "RejectedQueueFull"}
    assert {answer.outcome for answer in critical} == {"200"}
    plane.check()
    plane.until_idle()


def test_bytes_that_wait_are_bounded(start):
    """T16: 60 bodies of 2 MB at a cap of 32 MB; what is above is refused, and memory shows it."""
    plane = start(answering(0.5), slots=1, max_bytes=32 << 20)
    before_mb = plane.epp.rss_mb()
    pending = plane.send("standard", 60, size_bytes=2 << 20)
    until(lambda: plane.epp.state()["requests"] >= 14, 30)
    peak_mb = plane.epp.rss_mb()
    totals = [future.result(60).outcome for future in pending]

    # Envoy answers and closes while such a client still sends, which may cost it the answer.
    refused = {"RejectedQueueFull", "broken: ConnectionResetError"}
    assert "200" in totals
    assert set(totals) <= {"200", *refused}
    assert totals.count("200") <= 18
    # Bodies that are being read count as much again, and gRPC holds what it has not handed over.
    assert peak_mb - before_mb < 2.5 * 34 + 64
    plane.check()
    plane.until_idle()


async def _cut(_, writer):
    """A server that resets the connection instead of answering."""
    writer.transport.abort()


async def _fail(_, writer):
    writer.write(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n")


async def _stop_in_the_middle(_, writer):
    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n")
    await writer.drain()
    writer.transport.abort()


@pytest.mark.parametrize(
    ("behaviour", "answered"),
    [(_cut, 50), (_fail, 50), (_stop_in_the_middle, 10)],  # the last looks like clients that leave
)
def test_a_server_that_breaks_off_frees_its_slots(start, behaviour, answered):
    """T30: of two servers one does so with each request; none is sent twice, no slot is lost."""
    plane = start(answering(0.01), slots=2)
    bad = plane.servers.add(behaviour)
    plane.epp.write(snapshot([plane.servers.addresses[0], bad], slots=2))
    until(lambda: len(plane.epp.state()["endpoints"]) == 2, 30)
    for _ in range(5):
        for future in plane.send("standard", 20):
            future.result(60)

    assert plane.totals()["200"] >= answered
    plane.check()
    plane.until_idle()


def test_a_server_that_hangs_loses_its_slots_with_its_clients(start):
    """T30: it takes requests and says nothing; when the clients give up their slots are free."""

    async def hang(*_):
        await asyncio.sleep(3600)

    plane = start(answering(0.01), slots=2)
    bad = plane.servers.add(hang)
    plane.epp.write(snapshot([plane.servers.addresses[0], bad], slots=2))
    until(lambda: len(plane.epp.state()["endpoints"]) == 2, 30)
    outcomes = [f.result(60).outcome for f in plane.send("standard", 40, leave_after=3.0)]

    assert outcomes.count("left") == 2
    assert outcomes.count("200") == 38
    plane.check()
    plane.until_idle()


DESTINATION = b"x-gateway-destination-endpoint"
FORGERIES = [
    b"%b: {evil}\r\n",
    b"%b: {evil}\r\n%b: {good}\r\n",
    b"%b: {good},{evil}\r\n",
    b"%b-subset: {evil}\r\n",
    b"%b-served: {evil}\r\n",
    b"%b:{evil}\r\nconnection: %b\r\n",
]


@pytest.mark.parametrize("alive", [True, False])
def test_a_destination_from_a_client_is_never_used(start, alive):
    """T22: 18 spellings of the header, EPP alive and dead; the server they name sees nothing."""
    evil = ModelServer()
    try:
        plane = start(answering(), slots=4)
        if not alive:
            plane.epp.kill()
        good = plane.servers.addresses[0].encode()
        for spelling in (DESTINATION, DESTINATION.title(), DESTINATION.replace(b"-", b"_")):
            for forgery in FORGERIES:
                lines = forgery.replace(b"%b", spelling).replace(b"{good}", good)
                lines = lines.replace(b"{evil}", evil.address.encode())
                answer = plane.send("standard", headers=lines)[0].result(60)
                assert (answer.outcome == "200") == alive, (lines, answer)
        assert evil.seen == []
        # With underscores it is another header: it means nothing to Envoy and passes.
        named = [head for head in plane.servers.heads if evil.address.encode() in head]
        assert all(DESTINATION.replace(b"-", b"_") in head.lower() for head in named), named
    finally:
        evil.stop()


def _page(running: str, waiting: str) -> bytes:
    text = f"vllm:num_requests_running {running}\nvllm:num_requests_waiting {waiting}\n".encode()
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(text), text)


LIES = {
    "nothing runs": _page("0", "0"),
    "less than nothing": _page("-5", "-5"),
    "no number": _page("NaN", "NaN"),
    "too much": _page("1e308", "0"),
    "a web page": b"HTTP/1.1 200 OK\r\ncontent-length: 13\r\n\r\n<html></html>",
    "somewhere else": b"HTTP/1.1 302 Found\r\nlocation: http://169.254.169.254/\r\n"
    b"content-length: 0\r\n\r\n",
    "half an answer": b"HTTP/1.1 200 OK\r\ncontent-length: 9999\r\n\r\nvllm:num_requ",
}


class Batching:
    """A server of four slots; what is above waits. Its page tells the truth, or the lie."""

    def __init__(self, lie: bytes = b"") -> None:
        self._lie = lie
        self._slots = asyncio.Semaphore(4)
        self._running = self._all = 0

    async def __call__(self, head, writer):
        if head.startswith(b"GET /metrics"):
            waiting = self._all - self._running
            writer.write(self._lie or _page(str(self._running), str(waiting)))
            return
        self._all += 1
        try:
            async with self._slots:
                self._running += 1
                await asyncio.sleep(0.05)
                self._running -= 1
        finally:
            self._all -= 1
        writer.write(ANSWER)


def test_a_server_that_lies_about_itself_gets_no_more_than_others(start):
    """T28: seven ways to lie beside three honest servers, under overload, limits learned."""
    plane = start(*(Batching() for _ in range(3)), *map(Batching, LIES.values()), slots=0)
    answers = [future.result(60) for future in plane.send("standard", 4000)]

    assert {answer.outcome for answer in answers} == {"200"}
    shares = [seen.total() * len(plane.servers.seen) / 4000 for seen in plane.servers.seen]
    named = dict(zip(["honest"] * 3 + list(LIES), shares, strict=False))
    assert all(share <= 1.5 for share in shares), named
    plane.check()
    plane.until_idle()


def test_streams_that_are_reset_as_soon_as_they_are_opened_leave_nothing(start):
    """T19: 5,000 of them, 250 at a time, straight at the EPP; an honest request is served."""
    plane = start(answering(), slots=4)
    headers = pb.HttpHeaders(
        headers=pb.HeaderMap(headers=[pb.HeaderValue(key=":method", raw_value=b"POST")])
    )

    async def flood():
        async with grpc.aio.insecure_channel(f"127.0.0.1:{plane.epp.grpc}") as channel:
            process = channel.stream_stream(
                PROCESS, request_serializer=pb.ProcessingRequest.SerializeToString
            )
            for _ in range(20):
                calls = [process() for _ in range(250)]
                await asyncio.gather(
                    *(call.write(pb.ProcessingRequest(request_headers=headers)) for call in calls)
                )
                for call in calls:
                    call.cancel()

    plane.thread.do(flood())

    assert plane.send("standard")[0].result(60).outcome == "200"
    plane.until_idle()
    assert plane.epp.metric("forebay_streams_opened_total") > 5000


class Fleet:
    """Simulated model servers as processes behind one EPP and Envoy; limits are learned."""

    def __init__(self, folder, count: int, slots: int, responses: str) -> None:
        self.servers = [SimulatedServer(folder, number, slots) for number in range(count)]
        addresses = [server.address for server in self.servers]
        self.plane = DataPlane(folder, addresses=addresses, slots=0, responses=responses)

    def failures(self, futures) -> list:
        return [a for a in (future.result(60) for future in futures) if a.outcome != "200"]

    def stop(self) -> None:
        self.plane.stop()
        for server in self.servers:
            server.end()


@pytest.fixture
def fleet(request, tmp_path):
    """Four servers of 8 slots, which answer after about 0.1 s; answers are observed by default."""
    fleet = Fleet(tmp_path, 4, 8, getattr(request, "param", "Observe"))
    yield fleet
    fleet.stop()


@pytest.mark.parametrize("fleet", ["Read", "Observe"], indirect=True)
def test_a_server_that_is_killed_costs_three_requests_at_most(fleet):
    """20 requests/s for 20 s, kill -9 after 5 s: three fail at most, and none once it is known."""
    killed_at = time.monotonic() + 1000
    pending = []
    for number in range(400):
        if number == 100:
            fleet.servers[1].kill()
            killed_at = time.monotonic()
        pending += fleet.plane.send("standard")
        time.sleep(0.05)  # the rate of the load
    failed = fleet.failures(pending)

    assert len(failed) <= 3, failed
    assert not [answer for answer in failed if answer.sent_at > killed_at + 2]
    (out,) = (e for e in fleet.plane.epp.state()["endpoints"] if e["out"])
    assert out["address"] == fleet.servers[1].address
    assert fleet.plane.epp.metric("forebay_endpoint_out", endpoint=out["address"]) == 1
    assert fleet.plane.epp.log.count("endpoint fails and is left out") == 1
    fleet.plane.until_idle()


def test_what_waits_goes_to_the_servers_that_are_left(fleet):
    """300 wait when one of four is killed: those that run on it fail, and three more at most."""
    pending = fleet.plane.send("standard", 700)
    until(lambda: fleet.plane.epp.state().get("requests", 0) >= 300, 30)
    (running,) = (
        e["in_flight"]
        for e in fleet.plane.epp.state()["endpoints"]
        if e["address"] == fleet.servers[1].address
    )
    fleet.servers[1].kill()
    failed = fleet.failures(pending)

    assert len(failed) <= running + 8 + 3, failed  # 8 slots may have been given again meanwhile
    fleet.plane.until_idle()


def test_a_server_that_comes_back_is_used_again(fleet):
    """The first scrape that is answered makes the trial due; the trial brings it in."""
    plane, server = fleet.plane, fleet.servers[1]
    server.kill()
    until(lambda: any(e["out"] for e in plane.epp.state()["endpoints"]), 30)
    server.restart()
    until(lambda: server.page("/health") is not None, 30)

    def answered() -> bool:
        return plane.send("standard")[0].result(60).outcome == "200" and not any(
            endpoint["out"] for endpoint in plane.epp.state()["endpoints"]
        )

    until(answered, 30)
    assert "endpoint is back" in plane.epp.log


async def _fail_with_healthy_metrics(head, writer):
    if head.startswith(b"GET /metrics"):
        writer.write(_page("0", "0"))
    else:
        writer.write(b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n")


@pytest.mark.parametrize("responses", ["Read", "Observe"])
def test_a_server_that_fails_fast_gets_its_share_and_then_trials(start, responses):
    """20 requests/s for 8 s on four servers; its metrics say that it is idle and well."""
    servers = (*(Batching() for _ in range(3)), _fail_with_healthy_metrics)
    plane = start(*servers, slots=0, responses=responses)
    began = time.monotonic()
    pending = []
    for _ in range(160):
        pending += plane.send("standard")
        time.sleep(0.05)  # the rate of the load
    failed = [a for a in (future.result(60) for future in pending) if a.outcome == "500"]

    assert len([answer for answer in failed if answer.sent_at < began + 1]) <= 5
    assert len([answer for answer in failed if answer.sent_at >= began + 1]) <= 4
    plane.check()
    plane.until_idle()
