"""Answers that real Envoy shows to the EPP in streams of their own, and what does not go well."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import closing

import grpc
import pytest
from envoy_process import Envoy, ModelServer
from ext_proc_peer import EPPThread, Stream, channel, http_headers, until
from ports import free_port

from forebay_control.plan import ModelPlan, Plan, SaturationMode, SaturationPlan, TargetPlan
from forebay_epp.codec.extproc.watching import SECRET_LENGTH
from forebay_epp.core.terms import Endpoint
from forebay_extproc.v3 import external_processor_pb2 as pb

PLAN = Plan(
    models=(ModelPlan("alias", "Standard", (TargetPlan("a-longer-target-name"),)),),
    saturation=SaturationPlan(SaturationMode.CONCURRENCY, max_concurrency=1),
)
UPGRADE = (
    b"GET /v1/realtime HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


def watches(epp: EPPThread) -> dict[str, int]:
    """What became of the streams that show answers."""
    return {kind: count for kind, count in epp.traffic.watches.items() if count}


def http_filters(bootstrap: dict) -> list[dict]:
    (listener,) = bootstrap["static_resources"]["listeners"]
    return listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]


def decide_only(bootstrap: dict) -> None:
    """Remove the filter that observes."""
    filters = http_filters(bootstrap)
    filters[:] = [each for each in filters if "observability_mode" not in each["typed_config"]]


def observe_only(bootstrap: dict) -> None:
    """Have the filter that decides not say that there is another one."""
    filters = http_filters(bootstrap)
    for each in filters:
        config = each["typed_config"]
        if "processing_mode" in config and "observability_mode" not in config:
            del config["grpc_service"]["initial_metadata"]


@pytest.fixture
def server():
    server = ModelServer()
    yield server
    server.stop()


@pytest.fixture
def epp(start, server):
    return start(plan=PLAN, endpoints=(server.address,))


@pytest.fixture
def envoy(request, tmp_path, epp):
    edit = getattr(request, "param", lambda _: None)
    envoy = Envoy(tmp_path, epp.transport.port, edit, responses="Observe")
    yield envoy
    envoy.stop()


def begin(envoy: Envoy, server: ModelServer, answers: list[int]) -> threading.Thread:
    """Send a request and return once it is at the server, which holds it."""
    server.hold.clear()
    seen = len(server.seen)
    thread = threading.Thread(target=lambda: answers.append(envoy.request('{"model":"m"}')[0]))
    thread.start()
    until(lambda: len(server.seen) == seen + 1)
    return thread


def test_an_answer_holds_its_slot_until_it_ends(envoy, epp, server):
    """The only slot: the second request is dispatched by the end of the first one's answer."""
    answers: list[int] = []
    first = begin(envoy, server, answers)
    second = threading.Thread(target=lambda: answers.append(envoy.request('{"model":"m"}')[0]))
    second.start()
    until(lambda: epp.state().requests == 1)
    assert (epp.state().in_flight, len(server.seen)) == (1, 1)

    server.hold.set()
    first.join(20)
    second.join(20)

    assert answers == [200, 200]
    until(epp.idle)
    assert watches(epp) == {"tied": 2}


def test_no_token_passes_through_the_endpoint_picker(envoy, epp):
    """Nor is the answer touched: the model has the target's name, and nothing counts tokens."""
    status, _, answer = envoy.request('{"model":"alias","stream":true}')

    assert (status, b"a-longer-target-name" in answer) == (200, True)
    until(epp.idle)
    assert dict(epp.traffic.completion_tokens) == {}
    assert watches(epp) == {"tied": 1}


def test_the_server_sees_nothing_of_the_tie(envoy, epp, server):
    """It travels as metadata of Envoy's; headers that a client calls so are ignored."""
    envoy.request('{"model":"m"}')
    plain = set(server.seen[0]["headers"])
    until(epp.idle)

    forged = {"x_forebay_tie": "0" * SECRET_LENGTH, "x_forebay_owner": "127.0.0.1:1"}
    status, _, _ = envoy.request('{"model":"m"}', **forged)

    assert status == 200
    assert not [name for name in plain if "forebay" in name.lower()]
    until(epp.idle)
    assert watches(epp) == {"tied": 2}


def test_a_client_that_leaves_frees_the_slot(envoy, epp, server):
    """Before the answer has begun: only the end of the second stream can say so."""
    server.hold.clear()
    with closing(envoy.connect()) as connection:
        connection.request("POST", "/v1/completions", '{"model":"m"}')
        until(lambda: len(server.seen) == 1)
        until(lambda: watches(epp) == {"tied": 1})

    until(epp.idle)


def test_the_statuses_of_quick_answers_are_seen(tmp_path, server):
    """Each stream is reset right behind its messages, many of which are not yet read by then."""
    epp = EPPThread("completion-queue", endpoints=(server.address,), slots=100)
    envoy = Envoy(tmp_path, epp.transport.port, responses="Observe")

    def ask() -> None:
        for _ in range(20):
            envoy.request('{"model":"m"}')

    clients = [threading.Thread(target=ask) for _ in range(24)]
    try:
        for client in clients:
            client.start()
        for client in clients:
            client.join(60)
        until(epp.idle)
        assert epp.traffic.responses["none"] < 24
        assert sum(epp.traffic.responses.values()) == 480
    finally:
        envoy.stop()
        epp.stop()


def test_a_server_that_is_away_is_noticed(envoy, epp):
    """The proxy's own 503 comes into view, too."""
    away = [Endpoint(f"127.0.0.1:{free_port()}")]
    epp.ask(lambda now: epp.controller.set_endpoints(away, now))

    assert envoy.request('{"model":"m"}')[0] == 503

    until(epp.idle)
    until(lambda: epp.state().endpoints[0].out)


def test_a_large_body_reaches_the_server_whole(envoy, epp, server):
    """The stream that decides ends with the last piece."""
    body = json.dumps({"model": "m", "prompt": "x" * 500_000})

    status, _, _ = envoy.request(body)

    assert (status, server.seen[0]["body"] == body) == (200, True)
    until(epp.idle)


def test_a_conversation_holds_its_slot_until_it_closes(envoy, epp):
    """What follows an upgrade passes through the stream that decides, whose end means nothing."""
    with closing(socket.create_connection(("127.0.0.1", envoy.http), 20)) as connection:
        connection.sendall(UPGRADE)
        assert connection.recv(1024).startswith(b"HTTP/1.1 101")
        until(lambda: watches(epp) == {"tied": 1})
        assert epp.state().in_flight == 1

    until(epp.idle)


@pytest.mark.parametrize("envoy", [decide_only], indirect=True)
def test_without_the_filter_that_observes_slots_are_freed_all_the_same(envoy, epp):
    """Each after a wait at first, and at once when none has ever come into view."""
    assert [envoy.request('{"model":"m"}')[0] for _ in range(5)] == [200] * 5

    until(epp.idle)
    until(lambda: watches(epp) == {"missing": 5})


@pytest.mark.parametrize("envoy", [observe_only], indirect=True)
def test_without_the_filter_that_decides_streams_end_cleanly(envoy, epp):
    """They are counted, and the answer is that of a proxy that shows none."""
    assert [envoy.request('{"model":"m"}')[0] for _ in range(3)] == [200] * 3

    until(epp.idle)
    until(lambda: set(watches(epp)) == {"untied"})


def test_the_end_of_an_endpoint_picker_cuts_no_answer(envoy, epp, server):
    """Its streams break; the answer does not pass through them."""
    answers: list[int] = []
    running = begin(envoy, server, answers)
    until(lambda: watches(epp) == {"tied": 1})

    epp.stop()
    server.hold.set()
    running.join(20)

    assert answers == [200]


def test_an_answer_is_shown_to_the_endpoint_picker_that_decided(tmp_path, transport, server):
    """Of three behind one Envoy, by the address that each puts into its ties."""
    epps = [
        EPPThread(transport, endpoints=(server.address,), slots=100, advertised=True)
        for _ in range(3)
    ]

    def know_all(bootstrap: dict) -> None:
        (cluster,) = (
            each for each in bootstrap["static_resources"]["clusters"] if each["name"] == "epp"
        )
        hosts = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
        for epp in epps[1:]:
            where = {"address": "127.0.0.1", "port_value": epp.transport.port}
            hosts.append({"endpoint": {"address": {"socket_address": where}}})

    envoy = Envoy(tmp_path, epps[0].transport.port, know_all, responses="Observe")
    try:
        assert {envoy.request('{"model":"m"}')[0] for _ in range(60)} == {200}
        for epp in epps:
            until(epp.idle)
        assert sum(watches(epp).get("tied", 0) for epp in epps) == 60
        assert {kind for epp in epps for kind in watches(epp)} == {"tied"}
        assert sum(bool(watches(epp)) for epp in epps) > 1
    finally:
        envoy.stop()
        for epp in epps:
            epp.stop()


# --- streams that no Envoy would open


def decided(peer: grpc.Channel) -> str:
    """Have a request dispatched as the first filter does; return the secret of its tie."""
    stream = Stream(peer, x_forebay_responses="Observe")
    stream.send(
        request_headers=http_headers({":method": "GET", ":path": "/health"}, end=True),
        protocol_config=pb.ProtocolConfiguration(request_body_mode=pb.FULL_DUPLEX_STREAMED),
    )
    secret = stream.answer().dynamic_metadata["forebay"]["tie"]
    assert list(stream.call) == []
    assert stream.call.code() is grpc.StatusCode.OK
    return secret


def observing(peer: grpc.Channel, secret: str) -> Stream:
    stream = Stream(peer, x_forebay_tie=secret)
    stream.send(request_headers=http_headers({":method": "GET"}), observability_mode=True)
    return stream


def test_a_second_stream_for_one_answer_ends_and_frees_nothing(start):
    """The slot is the first one's."""
    epp = start()
    with channel(epp.address) as peer:
        secret = decided(peer)
        first = observing(peer, secret)
        until(lambda: watches(epp) == {"tied": 1})
        second = observing(peer, secret)
        assert (list(second.call), second.call.code()) == ([], grpc.StatusCode.OK)
        assert epp.state().in_flight == 1
        assert watches(epp) == {"tied": 1, "unknown": 1}

        first.half_close()
        until(epp.idle)


def test_a_late_stream_ends_and_frees_nothing(start):
    """The slot was freed once, by the wait for it; a new request may have it."""
    epp = start()
    with channel(epp.address) as peer:
        late = decided(peer)
        until(lambda: watches(epp) == {"missing": 1})
        secret = decided(peer)
        assert list(observing(peer, late).call) == []
        assert epp.state().in_flight == 1

        shown = observing(peer, secret)
        shown.send(response_headers=http_headers({":status": "200"}))
        shown.half_close()
        until(epp.idle)
    assert watches(epp) == {"tied": 1, "unknown": 1, "missing": 1}


def test_a_guessed_tie_frees_nothing(start):
    """It ends like the tie of another endpoint picker."""
    epp = start()
    with channel(epp.address) as peer:
        decided(peer)
        for guess in ("0" * SECRET_LENGTH, "x" * 5000, "-", ""):
            stray = observing(peer, guess)
            assert (list(stray.call), stray.call.code()) == ([], grpc.StatusCode.OK)
        assert epp.state().in_flight == 1
