"""Both transports carry exchanges alike: one suite, a bare gRPC client in the proxy's place."""

from __future__ import annotations

import json
import ssl
import threading
from contextlib import ExitStack

import grpc
import pytest
from control_plane import Authority
from ext_proc_peer import Stream, channel, client_process, until
from grpc_health.v1 import health_pb2, health_pb2_grpc

from forebay_control.plan import ModelPlan, Plan, UnmatchedAction, UnmatchedPlan
from forebay_epp import reading
from forebay_epp.core.terms import Endpoint, Outcome
from forebay_epp.transport import Connections, credentials

BURST = """
import asyncio, sys
import grpc.aio
from ext_proc_peer import PROCESS, body_message, headers_message, pb

async def run():
    async with grpc.aio.insecure_channel(sys.argv[1]) as channel:
        calls = [
            channel.stream_stream(PROCESS, pb.ProcessingRequest.SerializeToString)()
            for _ in range(1500)
        ]
        for message in (headers_message(), body_message()):
            await asyncio.gather(*(call.write(message) for call in calls))
        print("sent", flush=True)
        await asyncio.sleep(600)

asyncio.run(run())
"""


@pytest.fixture
def open_stream():
    """Open streams that end with the test, all on one connection per EPP."""
    with ExitStack() as stack:
        channels = {}

        def begin(epp) -> Stream:
            if epp.address not in channels:
                channels[epp.address] = stack.enter_context(channel(epp.address))
            return Stream(channels[epp.address])

        yield begin


def test_a_request_is_routed_and_its_answer_passes(start, open_stream):
    """A whole exchange: destination out, answer echoed, nothing left behind."""
    epp = start()
    stream = open_stream(epp)

    stream.send_request()

    assert stream.routed() == "10.0.0.1:8000"
    stream.respond(b'{"usage":{"prompt_tokens":1,"completion_tokens":2}}')
    stream.half_close()
    assert list(stream.call) == []
    assert stream.call.code() is grpc.StatusCode.OK
    until(epp.idle)


def test_a_request_waits_until_a_slot_is_free(start, open_stream):
    """The second request of a one-slot pool is answered by the end of the first."""
    epp = start(slots=1)
    first, second = open_stream(epp), open_stream(epp)
    first.send_request()
    first.routed()
    second.send_request()
    until(lambda: epp.state().requests == 1)

    first.respond()

    assert second.routed() == "10.0.0.1:8000"


def test_a_queued_stream_that_is_cancelled_frees_its_place(start, open_stream):
    """Cancellation while waiting leaves the queue, and the next in line gets the slot."""
    epp = start(slots=1)
    streams = [open_stream(epp) for _ in range(3)]
    streams[0].send_request()
    streams[0].routed()
    for stream in streams[1:]:
        stream.send_request()
        expected = streams.index(stream)
        until(lambda expected=expected: epp.state().requests == expected)

    streams[1].cancel()
    until(lambda: epp.state().requests == 1)
    streams[0].respond()

    assert streams[2].routed() == "10.0.0.1:8000"


def test_a_dispatched_stream_that_is_cancelled_frees_its_slot(start, open_stream):
    """A client that goes while the server works frees its slot at once."""
    epp = start(slots=1)
    first, second = open_stream(epp), open_stream(epp)
    first.send_request()
    first.routed()
    second.send_request()
    until(lambda: epp.state().requests == 1)

    first.cancel()

    assert second.routed() == "10.0.0.1:8000"


def test_a_client_that_half_closes_behind_the_body_is_answered_and_the_stream_ends(
    start, open_stream
):
    """NGINX Gateway Fabric never shows the answer; it still gets its destination."""
    epp = start()
    stream = open_stream(epp)

    stream.send_request()
    stream.half_close()

    assert stream.routed() == "10.0.0.1:8000"
    assert list(stream.call) == []
    assert stream.call.code() is grpc.StatusCode.OK
    until(epp.idle)


def test_a_client_that_half_closes_while_queued_is_answered_later(start, open_stream):
    """Half-close is not cancel."""
    epp = start(slots=1)
    first, second = open_stream(epp), open_stream(epp)
    first.send_request()
    first.routed()
    second.send_request()
    second.half_close()
    until(lambda: epp.state().requests == 1)

    first.respond()

    assert second.routed() == "10.0.0.1:8000"


def test_a_malformed_body_gets_an_immediate_400(start, open_stream):
    """A refusal is an answer: OpenAI's error, the outcome in a header, then a clean end."""
    epp = start()
    stream = open_stream(epp)

    stream.send_request(b'{"model": NaN}')

    refusal = stream.answer().immediate_response
    assert refusal.status.code == 400
    assert json.loads(refusal.body)["error"]["code"] == "RejectedBadRequest"
    assert list(stream.call) == []
    until(epp.idle)


def test_a_question_for_models_is_answered_at_once(start, open_stream):
    """Without a slot and without an endpoint; it counts as answered and leaves nothing behind."""
    plan = Plan(
        models=(ModelPlan("chat", "Standard"),), unmatched=UnmatchedPlan(UnmatchedAction.REJECT)
    )
    epp = start(plan=plan, endpoints=())
    for path, status, outcome in (
        ("/v1/models", 200, "Answered"),
        ("/v1/models/chat", 200, "Answered"),
        ("/v1/models/other", 404, "RejectedUnknownModel"),
    ):
        stream = open_stream(epp)
        stream.send_headers(path, end=True, **{":method": "GET"})
        immediate = stream.answer().immediate_response
        headers = {o.header.key: o.header.raw_value for o in immediate.headers.set_headers}

        assert (immediate.status.code, headers["x-forebay-outcome"]) == (status, outcome.encode())
        assert list(stream.call) == []

    until(epp.idle)
    assert epp.traffic.outcomes == {
        ("", "", Outcome.ANSWERED): 2,
        ("", "", Outcome.REJECTED_UNKNOWN_MODEL): 1,
    }
    assert not epp.traffic.waits


def test_an_answer_without_a_request_is_passed_on(start, open_stream):
    """A reply of the proxy's own: continued, then a clean end; no slot and no outcome."""
    epp = start()
    stream = open_stream(epp)

    stream.respond(b"overflow", "503")

    assert list(stream.call) == []
    assert stream.call.code() is grpc.StatusCode.OK
    until(epp.idle)
    assert not epp.traffic.outcomes


def test_a_websocket_holds_its_slot_until_its_end(start, open_stream):
    """It goes where a bodiless request would, its words pass, and the end is counted once."""
    epp = start(slots=1)
    talking, next_one = open_stream(epp), open_stream(epp)
    talking.send_headers("/v1/realtime", **{":method": "GET", "upgrade": "websocket"})
    assert talking.answer().HasField("request_headers")
    talking.send_body(b"ping", end=False)
    said = talking.answer().request_body.response.body_mutation.streamed_response
    next_one.send_request()
    until(lambda: epp.state().requests == 1)

    talking.half_close()

    assert next_one.routed() == "10.0.0.1:8000"
    assert (said.body, said.end_of_stream) == (b"ping", False)
    next_one.respond()
    next_one.half_close()
    until(epp.idle)


def test_a_large_body_comes_back_whole_in_pieces_of_at_most_62000_bytes(start, open_stream):
    """Bytes are forwarded unchanged whatever their number."""
    epp = start()
    stream = open_stream(epp)
    body = json.dumps({"model": "m", "prompt": "x" * 300_000}).encode()

    stream.send_headers()
    for at in range(0, len(body), 32_768):
        stream.send_body(body[at : at + 32_768], end=False)
    stream.send_body(b"")

    stream.answer()
    pieces = []
    while True:
        piece = stream.answer().request_body.response.body_mutation.streamed_response
        pieces.append(piece.body)
        if piece.end_of_stream:
            break
    assert b"".join(pieces) == body
    assert max(map(len, pieces)) <= 62_000


def test_a_stream_that_says_nothing_is_ended_with_an_error(start, open_stream, monkeypatch):
    """Opening streams costs an attacker as much as us, for a limited time."""
    monkeypatch.setattr(reading, "SILENT_STREAM_SECONDS", 0.05)
    epp = start()
    stream = open_stream(epp)

    with pytest.raises(grpc.RpcError) as error:
        stream.answer()

    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    until(epp.idle)


def test_a_body_that_never_ends_is_refused_with_408(start, open_stream, monkeypatch):
    """A request has to arrive within a bounded time."""
    monkeypatch.setattr(reading, "READ_REQUEST_SECONDS", 0.05)
    epp = start()
    stream = open_stream(epp)

    stream.send_headers()
    stream.send_body(b'{"model"', end=False)

    assert stream.answer().immediate_response.status.code == 408
    until(epp.idle)


def test_streams_beyond_the_cap_are_refused_with_429(start, open_stream):
    """The cap is counted by ourselves; the refusal says when to come back."""
    epp = start(max_streams=1)
    first = open_stream(epp)
    first.send_request()
    first.routed()

    second = open_stream(epp)
    second.send_request()

    refusal = second.answer().immediate_response
    headers = {h.header.key: h.header.raw_value for h in refusal.headers.set_headers}
    assert refusal.status.code == 429
    assert headers["retry-after"] == b"1"
    first.respond()


def test_bytes_that_are_no_message_end_the_stream_with_an_error(start):
    """Garbage never looks like consent."""
    epp = start()
    with channel(epp.address) as raw:
        call = raw.stream_stream("/envoy.service.ext_proc.v3.ExternalProcessor/Process")(
            iter([b"\xff\xff\xff"]), timeout=10
        )
        with pytest.raises(grpc.RpcError) as error:
            next(call)

    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    until(epp.idle)


def test_health_is_answered_on_the_same_port_under_any_name(start):
    """Envoy's health check asks here, under ext_proc's name; draining turns it at once."""
    epp = start()
    with channel(epp.address) as raw:
        stub = health_pb2_grpc.HealthStub(raw)
        name = "envoy.service.ext_proc.v3.ExternalProcessor"
        before = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5).status
        epp.ask(lambda _: epp.data_plane.drain())
        after = stub.Check(health_pb2.HealthCheckRequest(), timeout=5).status

    assert (before, after) == (
        health_pb2.HealthCheckResponse.SERVING,
        health_pb2.HealthCheckResponse.NOT_SERVING,
    )


def test_an_unknown_method_is_unimplemented(start):
    """Other services are not here."""
    epp = start()
    with channel(epp.address) as raw, pytest.raises(grpc.RpcError) as error:
        raw.unary_unary("/a.B/C")(b"", timeout=5)

    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_second_bind_of_the_port_fails(start):
    """Two EPPs on one port would share it silently with SO_REUSEPORT."""
    epp = start()

    with pytest.raises(RuntimeError):
        type(epp.transport)(epp.data_plane, epp.address, None, Connections())


def test_draining_dispatches_what_waits_and_refuses_what_comes(start, open_stream):
    """A new request gets a free slot or 503; what waits keeps its turn; flush answers the rest."""
    epp = start(slots=1)
    running, waiting, late = (open_stream(epp) for _ in range(3))
    running.send_request()
    running.routed()
    waiting.send_request()
    until(lambda: epp.state().requests == 1)

    epp.ask(lambda _: epp.data_plane.drain())
    late.send_request()

    refusal = late.answer().immediate_response
    assert (refusal.status.code, json.loads(refusal.body)["error"]["code"]) == (
        503,
        "RejectedShuttingDown",
    )
    epp.ask(epp.data_plane.flush)
    assert waiting.answer().immediate_response.status.code == 503
    running.respond()
    running.half_close()
    until(epp.idle)


def test_tls_serves_a_self_signed_certificate(start):
    """The default: encrypted, ALPN h2, not verifiable."""
    epp = start(credentials=credentials.self_signed())
    pem = ssl.get_server_certificate(("127.0.0.1", epp.transport.port))

    assert "BEGIN CERTIFICATE" in pem


def test_tls_serves_the_certificate_that_is_mounted_now(start, tmp_path):
    """Each handshake sees the files as they are; while they are wrong, the last good pair."""
    authority = Authority(tmp_path)
    folder = authority.leaf("epp")
    epp = start(credentials=credentials.from_folder(folder))

    def shown() -> str:
        return ssl.get_server_certificate(("127.0.0.1", epp.transport.port))

    first = (folder / "tls.crt").read_text()
    assert shown() == first
    (folder / "tls.crt").write_text("rubbish")
    assert shown() == first
    authority.leaf("epp")
    assert shown() == (folder / "tls.crt").read_text() != first


def test_a_slot_freed_by_a_new_endpoint_serves_the_queue(start, open_stream):
    """News of other threads reaches the queue without an event on any stream."""
    epp = start(endpoints=())
    stream = open_stream(epp)
    stream.send_request()
    until(lambda: epp.state().requests == 1)

    epp.ask(lambda now: epp.controller.set_endpoints([Endpoint("10.0.0.9:80")], now))

    assert stream.routed() == "10.0.0.9:80"


def test_a_thousand_cancelled_at_once_leave_nothing(start, open_stream):
    """A proxy that goes away frees every slot and queued request."""
    epp = start(slots=10, max_streams=5000)
    streams = [open_stream(epp) for _ in range(200)]
    for stream in streams:
        stream.send_request()
    until(lambda: epp.state().requests == 190)

    for stream in streams:
        stream.cancel()

    until(epp.idle)


def test_a_burst_that_comes_while_the_loop_is_busy_is_not_dropped(start):
    """The C core drops streams at random once 1,000 are not accepted; here none is."""
    epp = start(slots=1, max_streams=5000)
    busy = threading.Event()
    epp.data_plane.post(lambda _: busy.wait(60))
    with client_process(BURST, epp.address, "sent") as client:
        busy.set()

        until(lambda: epp.state().requests == 1499, 60)
        client.kill()
        until(epp.idle, 60)
