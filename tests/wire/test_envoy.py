"""An EPP behind real Envoy: what clients and model servers see."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from dataclasses import replace

import aiohttp
import pytest
from envoy_process import Envoy, ModelServer
from ext_proc_peer import EPPThread, until

from forebay_control.plan import (
    DEFAULT_BANDS,
    LimitsPlan,
    ModelPlan,
    Plan,
    SaturationMode,
    SaturationPlan,
    TargetPlan,
)
from forebay_epp.core.terms import Outcome

PARTIAL = {"request_body_mode": "BUFFERED_PARTIAL", "response_body_mode": "NONE"}
MODES = {
    "duplex": {},
    "duplex-none": {"response_body_mode": "NONE"},
    "buffered": {"request_body_mode": "BUFFERED", "response_body_mode": "BUFFERED"},
    "buffered-none": {"request_body_mode": "BUFFERED", "response_body_mode": "NONE"},
    "streamed": {"request_body_mode": "STREAMED", "response_body_mode": "STREAMED"},
}
PLAN = Plan(
    bands=tuple(replace(band, ttl_seconds=20.0) for band in DEFAULT_BANDS),
    models=(
        ModelPlan("chat", "Critical"),
        ModelPlan("alias", "Standard", (TargetPlan("a-longer-target-name"),)),
    ),
    limits=LimitsPlan(max_body_bytes=2 << 20),
    saturation=SaturationPlan(SaturationMode.CONCURRENCY, max_concurrency=1),
)


class Stack:
    """Model server, EPP and an Envoy per body mode."""

    def __init__(self, folder, transport: str) -> None:
        self.server = ModelServer()
        self.epp = EPPThread(
            transport, plan=PLAN, endpoints=(self.server.address,), max_streams=10_000
        )
        self._folder = folder
        self._envoys: dict[str, Envoy] = {}

    def envoy(self, mode: str = "duplex", **options) -> Envoy:
        name = f"{mode}{options}"
        if name not in self._envoys:
            self._envoys[name] = Envoy(
                self._folder,
                self.epp.transport.port,
                **(MODES | {"buffered-partial": PARTIAL})[mode],
                **options,
            )
        return self._envoys[name]

    def stop(self) -> None:
        for envoy in self._envoys.values():
            envoy.stop()
        self.epp.stop()
        self.server.stop()


@pytest.fixture(scope="module", params=["aio", "completion-queue"])
def module_stack(request, tmp_path_factory):
    stack = Stack(tmp_path_factory.mktemp("envoy"), request.param)
    yield stack
    stack.stop()


@pytest.fixture
def stack(module_stack):
    """The stack, idle and with nothing seen."""
    module_stack.server.seen.clear()
    module_stack.server.hold.set()
    yield module_stack
    module_stack.server.hold.set()
    until(lambda: module_stack.epp.state().in_flight == 0)
    until(lambda: module_stack.epp.state().requests == 0)


@pytest.mark.parametrize("mode", MODES)
def test_a_request_reaches_the_chosen_server_unchanged(stack, mode):
    """Every body mode of the proxy: bytes in, the same bytes at the server, the answer back."""
    body = json.dumps({"model": "chat", "prompt": "ä" * 100_000}, ensure_ascii=False)

    status, _, answer = stack.envoy(mode).request(body.encode())

    assert (status, json.loads(answer)["usage"]["completion_tokens"]) == (200, 4)
    assert [seen["body"] for seen in stack.server.seen] == [body]


@pytest.mark.parametrize("mode", MODES)
def test_a_bodiless_request_is_routed_too(stack, mode):
    """GET /health takes the queue like all others."""
    status, _, _ = stack.envoy(mode).request(None, path="/health")

    assert (status, stack.server.seen[0]["path"]) == (200, "/health")


@pytest.mark.parametrize("mode", MODES)
def test_models_are_listed_although_every_slot_is_taken(stack, mode):
    """By the EPP, without a server and without the queue; one of them by its name."""
    envoy = stack.envoy(mode)
    stack.server.hold.clear()
    busy = threading.Thread(target=envoy.request, args=('{"model":"chat"}',))
    busy.start()
    until(lambda: len(stack.server.seen) == 1)

    status, headers, answer = envoy.request(None, path="/v1/models")
    one_status, _, one = envoy.request(None, path="/v1/models/alias")
    stack.server.hold.set()
    busy.join()

    assert (status, headers["content-type"]) == (200, "application/json")
    assert headers["x-forebay-outcome"] == "Answered"
    listed = json.loads(answer)
    assert (listed["object"], [model["id"] for model in listed["data"]]) == (
        "list",
        ["chat", "alias"],
    )
    assert (one_status, json.loads(one)) == (200, listed["data"][1])
    assert len(stack.server.seen) == 1


@pytest.mark.parametrize("mode", ["duplex", "buffered", "streamed"])
def test_an_event_stream_passes(stack, mode):
    """All events arrive, in order."""
    body = json.dumps({"model": "chat", "stream": True})

    status, headers, answer = stack.envoy(mode).request(body)

    assert (status, headers["content-type"]) == (200, "text/event-stream")
    assert answer.endswith(b"data: [DONE]\n\n")
    assert answer.count(b"data: ") == 4


@pytest.mark.parametrize("mode", ["duplex", "buffered"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_target_model_is_sent_and_the_clients_name_comes_back(stack, mode, stream):
    """The body is rewritten with its length, and the answer names what the client asked for."""
    status, _, answer = stack.envoy(mode).request(
        json.dumps({"model": "alias", "prompt": "x", "stream": stream})
    )

    sent = json.loads(stack.server.seen[0]["body"])
    assert (status, sent) == (
        200,
        {"model": "a-longer-target-name", "prompt": "x", "stream": stream},
    )
    assert b'"alias"' in answer
    assert b"a-longer-target-name" not in answer


@pytest.mark.parametrize("mode", ["duplex", "buffered"])
def test_the_model_of_a_form_is_rewritten_too(stack, mode):
    """Every other byte of it reaches the server as it was."""
    text = (
        '--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
        f"{'ä' * 100_000}\r\n"
        '--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nalias\r\n--b--\r\n'
    )

    status, _, _ = stack.envoy(mode).request(
        text.encode(),
        path="/v1/audio/transcriptions",
        **{"content-type": "multipart/form-data; boundary=b"},
    )

    assert status == 200
    assert stack.server.seen[0]["body"] == text.replace("alias", "a-longer-target-name")


@pytest.mark.parametrize("mode", MODES)
def test_a_forged_destination_is_not_obeyed(stack, mode):
    """A client cannot choose the server, not even by naming one that exists."""
    elsewhere = ModelServer()
    try:
        status, _, _ = stack.envoy(mode).request(
            '{"model":"chat"}', **{"x-gateway-destination-endpoint": elsewhere.address}
        )
    finally:
        elsewhere.stop()

    assert (status, len(stack.server.seen), elsewhere.seen) == (200, 1, [])


def test_a_client_cannot_tell_envoy_how_to_send(stack):
    """Envoy obeys x-envoy-* headers of callers that it takes for internal: retries, time-outs.

    With them a client could have each of its requests sent to a server many times.
    """
    envoy = stack.envoy()
    stack.server.hold.clear()
    threading.Timer(1.0, stack.server.hold.set).start()

    status, _, _ = envoy.request(
        '{"model":"chat"}',
        **{
            "x-forwarded-for": "10.0.0.9",
            "x-envoy-internal": "true",
            "x-envoy-retry-on": "5xx,reset",
            "x-envoy-max-retries": "9",
            "x-envoy-upstream-rq-per-try-timeout-ms": "100",
            "x-envoy-upstream-rq-timeout-ms": "900",
        },
    )

    assert (status, len(stack.server.seen)) == (200, 1)


@pytest.mark.parametrize("mode", ["duplex", "buffered"])
@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b'{"prompt":"x"}', 400),
        (b'{"model":1}', 400),
        (b'{"model":"a","x":NaN}', 400),
        (b'{"model":"a\x00b"}', 400),
        (b'{"model":"\\ud800"}', 400),
        (b'{"model":"a","x":"\xff"}', 400),
        (b'{"model":"' + b"m" * (1 << 20) + b'"}', 400),
        (b'{"model":"a","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        (b'{"model":"a","x":"' + b"x" * (3 << 20) + b'"}', 413),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_body_that_cannot_be_read_is_refused(stack, mode, body, status):
    """OpenAI's error with the right status; the server never sees the request."""
    got, headers, answer = stack.envoy(mode).request(body)

    assert (got, headers["content-type"]) == (status, "application/json")
    error = json.loads(answer)["error"]
    assert headers["x-forebay-outcome"] == error["code"]
    assert error["type"] == "invalid_request_error"
    assert stack.server.seen == []


def test_a_compressed_body_is_refused_with_415(stack):
    """It cannot be classified and is never inflated."""
    status, _, answer = stack.envoy().request(b"\x1f\x8b", **{"content-encoding": "gzip"})

    assert (status, "gzip" in json.loads(answer)["error"]["message"]) == (415, True)


@pytest.mark.parametrize("mode", MODES)
def test_a_request_waits_for_a_slot_and_then_runs(stack, mode):
    """With one slot taken the second request is queued, unseen by the server."""
    stack.server.hold.clear()
    answers = []
    threads = [
        threading.Thread(
            target=lambda: answers.append(stack.envoy(mode).request('{"model":"chat"}')[0])
        )
        for _ in range(2)
    ]
    stack.envoy(mode)
    for thread in threads:
        thread.start()
    until(lambda: stack.epp.state().requests == 1)
    until(lambda: len(stack.server.seen) == 1)

    stack.server.hold.set()
    for thread in threads:
        thread.join(20)

    assert (answers, len(stack.server.seen)) == ([200, 200], 2)


def test_a_buffering_proxy_is_asked_for_patience(stack):
    """Its message timeout of 0.3 s runs while the request waits; the EPP extends it."""
    envoy = stack.envoy("buffered", message_timeout="0.3s")
    stack.server.hold.clear()
    answers = []
    first, second = (
        threading.Thread(target=lambda: answers.append(envoy.request('{"model":"chat"}')[0]))
        for _ in range(2)
    )
    first.start()
    until(lambda: len(stack.server.seen) == 1)
    second.start()
    until(lambda: stack.epp.state().requests == 1)
    waited_until = time.monotonic() + 0.6
    until(lambda: time.monotonic() > waited_until)

    stack.server.hold.set()
    first.join(20)
    second.join(20)

    assert answers == [200, 200]


def test_a_client_that_leaves_while_queued_is_forgotten(stack):
    """Its request never reaches a server."""
    stack.server.hold.clear()
    first = threading.Thread(target=stack.envoy().request, args=('{"model":"chat"}',))
    first.start()
    until(lambda: len(stack.server.seen) == 1)
    leaving = stack.envoy().connect()
    leaving.request("POST", "/v1/completions", '{"model":"chat"}')
    until(lambda: stack.epp.state().requests == 1)

    leaving.close()

    until(lambda: stack.epp.state().requests == 0)
    stack.server.hold.set()
    first.join(20)
    assert len(stack.server.seen) == 1


def test_a_client_that_leaves_while_answered_frees_its_slot(stack):
    """The next request gets the slot although the server has not finished."""
    stack.server.hold.clear()
    leaving = stack.envoy().connect()
    leaving.request("POST", "/v1/completions", '{"model":"chat"}')
    until(lambda: stack.epp.state().in_flight == 1)

    leaving.close()

    until(lambda: stack.epp.state().in_flight == 0)


def test_a_subset_hint_that_matches_nothing_is_refused(stack):
    """The gateway allows only servers that are not in the pool: 503, not a wrong server."""
    status, headers, _ = stack.envoy(subset=("10.9.9.9:1",)).request('{"model":"chat"}')

    assert (status, headers["x-forebay-outcome"]) == (503, "RejectedNoEndpoints")


def test_a_subset_hint_that_matches_is_obeyed(stack):
    """The hint names the pool's server and a stranger."""
    envoy = stack.envoy(subset=(stack.server.address, "10.9.9.9:1"))

    assert envoy.request('{"model":"chat"}')[0] == 200


@pytest.mark.parametrize("mode", ["duplex", "streamed"])
def test_a_websocket_talks_to_a_server_and_holds_a_slot(stack, mode):
    """Words go both ways for as long as it is open; the next request gets the slot behind it."""
    envoy = stack.envoy(mode)

    async def talk() -> tuple[list[str], int]:
        async with aiohttp.ClientSession() as session:
            url = f"http://127.0.0.1:{envoy.http}/v1/realtime"
            async with session.ws_connect(url) as socket:
                heard = []
                for word in ("one", "two " * 50_000):
                    await socket.send_str(word)
                    heard.append(await socket.receive_str(timeout=20))
                held = stack.epp.state().in_flight
        return heard, held

    heard, held = asyncio.run(talk())

    assert (heard, held) == (["one", "two " * 50_000], 1)
    until(lambda: stack.epp.state().in_flight == 0)
    assert envoy.request('{"model":"chat"}')[0] == 200
    assert [seen["path"] for seen in stack.server.seen] == ["/v1/realtime", "/v1/chat/completions"]


def test_a_websocket_whose_client_vanishes_frees_its_slot(stack):
    """Without a closing word."""
    connection = stack.envoy().connect()
    connection.request(
        "GET",
        "/v1/realtime",
        headers={
            "connection": "Upgrade",
            "upgrade": "websocket",
            "sec-websocket-version": "13",
            "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA==",
        },
    )
    until(lambda: stack.epp.state().in_flight == 1)

    connection.close()

    until(lambda: stack.epp.state().in_flight == 0)


def test_a_local_reply_of_envoy_comes_as_envoy_gave_it(stack):
    """No upgrade but WebSocket's is allowed: Envoy says so itself, and not 500."""
    envoy, traffic = stack.envoy(), stack.epp.traffic
    before = traffic.streams_opened

    status, _, _ = envoy.request(None, path="/x", connection="Upgrade", upgrade="other")

    assert (status, traffic.streams_opened - before, stack.server.seen) == (403, 1, [])


def test_a_body_beyond_the_proxys_buffer_is_classified_by_its_beginning(stack):
    """BUFFERED_PARTIAL: the EPP sees a part, the server all of it."""
    envoy = stack.envoy("buffered-partial")
    text = json.dumps({"model": "chat", "prompt": "x" * 300_000})

    status, _, _ = envoy.request(text)

    assert (status, [seen["body"] for seen in stack.server.seen]) == (200, [text])
    outcomes = stack.epp.traffic.outcomes
    assert outcomes["Critical", "chat", Outcome.DISPATCHED]


@pytest.mark.parametrize("mode", MODES)
def test_concurrent_requests_of_all_kinds_leave_nothing_behind(stack, mode):
    """A burst through few slots: all answered, every slot and the queue free afterwards."""
    envoy = stack.envoy(mode)
    answers = []

    def client() -> None:
        for _ in range(5):
            answers.append(envoy.request('{"model":"chat","stream":true}')[0])
            answers.append(envoy.request(None, path="/v1/models")[0])

    threads = [threading.Thread(target=client) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert answers == [200] * 100
    assert envoy.stat("http.inference.ext_proc.streams_failed") == 0
