"""The ext_proc state machine: what a proxy says in, what it gets back, what flow control hears."""

from __future__ import annotations

import json
import random
import sys
from itertools import pairwise

import pytest
from ext_proc_peer import http_headers
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay_control.plan import ModelPlan, Plan, SaturationMode, SaturationPlan, TargetPlan
from forebay_epp.codec import openai
from forebay_epp.codec.callers import CallerHeaders
from forebay_epp.codec.extproc.events import (
    ABANDONED,
    FIRST_CHUNK,
    HEADERS_ONLY,
    Abandoned,
    Arrived,
    BodyPart,
    Finished,
    Progress,
    Rejected,
)
from forebay_epp.codec.extproc.framing import DESTINATION
from forebay_epp.codec.extproc.stream import ExtProcStream, State
from forebay_epp.core.observation.shadowed import ShadowedController
from forebay_epp.core.terms import Endpoint, EndpointMetrics, Outcome
from forebay_epp.data_plane import DataPlane
from forebay_epp.traffic import Traffic
from forebay_extproc.v3 import external_processor_pb2 as pb

LIMIT = 1 << 20
UNTRUSTING = Plan()
BODY = b'{"model":"m","prompt":"hello"}'
JSON_ANSWER = b'{"model":"m","usage":{"prompt_tokens":7,"completion_tokens":9}}'


def headers(end=False, modes=(pb.FULL_DUPLEX_STREAMED,) * 2, early_body=False, **given):
    """A request_headers message."""
    values = {":method": "POST", ":path": "/v1/chat/completions"}
    values.update({name.replace("_", "-"): value for name, value in given.items()})
    message = pb.ProcessingRequest(request_headers=http_headers(values, end=end))
    if modes:
        message.protocol_config.request_body_mode = modes[0]
        message.protocol_config.response_body_mode = modes[1]
        message.protocol_config.send_body_without_waiting_for_header_response = early_body
    return message


def body(data=BODY, end=True):
    return pb.ProcessingRequest(request_body=pb.HttpBody(body=data, end_of_stream=end))


def answer_headers(status="200", content_type="application/json", end=False, **given):
    values = {":status": status, "content-type": content_type}
    values.update({name.replace("_", "-"): value for name, value in given.items()})
    return pb.ProcessingRequest(response_headers=http_headers(values, end=end))


def answer_body(data=JSON_ANSWER, end=True):
    return pb.ProcessingRequest(response_body=pb.HttpBody(body=data, end_of_stream=end))


class Peer:
    """A stream, everything it has sent, and the last event of each kind."""

    def __init__(self, limit=LIMIT, default_model=None, plan=UNTRUSTING):
        self.stream = ExtProcStream(limit, default_model, CallerHeaders(plan))
        self.request: Arrived | None = None
        self.rejected: Rejected | None = None
        self.finished: Finished | None = None

    def say(self, message):
        """Send a message; return the event."""
        event = self.stream.receive(message.SerializeToString())
        match event:
            case Arrived():
                self.request = event
            case Rejected():
                self.rejected = event
            case Finished():
                self.finished = event
        return event

    def take(self):
        """Take the messages that the stream wants to send."""
        out = [pb.ProcessingResponse.FromString(data) for data in self.stream.outbox]
        self.stream.outbox.clear()
        return out

    def arrived(self, *messages):
        """Send messages of which the last completes the request."""
        *before, last = [self.say(message) for message in messages]
        assert all(event is None or isinstance(event, BodyPart) for event in before)
        assert isinstance(last, Arrived)
        return self


def set_headers(common):
    for option in common.header_mutation.set_headers:
        assert option.header.value == ""
    return {o.header.key: o.header.raw_value.decode() for o in common.header_mutation.set_headers}


def pieces(messages, field):
    return [
        getattr(m, field).response.body_mutation.streamed_response
        for m in messages
        if m.HasField(field)
    ]


# --- full duplex


def test_full_duplex_answers_headers_then_body_after_the_decision():
    """Nothing is said before; then the destination in header and metadata, then the same bytes."""
    peer = Peer().arrived(
        headers(), body(BODY[:5], end=False), body(BODY[5:], end=False), body(b"")
    )
    assert peer.take() == []

    peer.stream.dispatch("10.0.0.1:8000", None)

    first, second = peer.take()
    assert first.request_headers.response.clear_route_cache
    assert set_headers(first.request_headers.response) == {DESTINATION: "10.0.0.1:8000"}
    assert first.dynamic_metadata["envoy.lb"][DESTINATION] == "10.0.0.1:8000"
    piece = second.request_body.response.body_mutation.streamed_response
    assert (piece.body, piece.end_of_stream) == (BODY, True)


@given(size=st.integers(0, 200_000))
@settings(max_examples=25)
def test_a_large_body_is_cut_and_whole(size):
    """At most 62,000 bytes each; only the last says end."""
    data = json.dumps({"model": "m", "prompt": "x" * size}).encode()
    peer = Peer().arrived(headers(), body(data))

    peer.stream.dispatch("10.0.0.1:8000", None)

    sent = pieces(peer.take(), "request_body")
    assert b"".join(piece.body for piece in sent) == data
    assert [piece.end_of_stream for piece in sent] == [False] * (len(sent) - 1) + [True]
    assert max(len(piece.body) for piece in sent) <= 62_000


def test_request_trailers_are_the_end_of_the_body():
    """No body message said so: the echo does not either, the trailers' answer follows."""
    trailers = pb.ProcessingRequest(request_trailers=pb.HttpTrailers())
    peer = Peer().arrived(headers(), body(end=False), trailers)

    peer.stream.dispatch("10.0.0.1:8000", None)

    sent = peer.take()
    assert [piece.end_of_stream for piece in pieces(sent, "request_body")] == [False]
    assert sent[-1].HasField("request_trailers")


def test_a_bodiless_request_is_submitted_without_a_model():
    """It is classified, not waved through."""
    peer = Peer().arrived(headers(end=True, **{":method": "GET", ":path": "/health"}))

    peer.stream.dispatch("10.0.0.1:8000", None)

    assert peer.request.model == ""
    assert [m.WhichOneof("response") for m in peer.take()] == ["request_headers"]


def test_a_proxy_that_shows_no_modes_nor_pseudo_headers_is_served():
    """NGINX Gateway Fabric: values in `value`, no :path; the body must be JSON with a model."""
    message = headers(modes=None)
    del message.request_headers.headers.headers[:]
    message.request_headers.headers.headers.add(key="content-type", value="application/json")
    peer = Peer().arrived(message, body())

    assert peer.stream.half_close() is None
    event = peer.stream.dispatch("10.0.0.1:8000", None)

    assert (event, peer.request.model) == (Finished(0, blind=True), "m")
    assert peer.stream.ended
    assert [m.WhichOneof("response") for m in peer.take()] == ["request_headers", "request_body"]
    assert peer.stream.reset() is None


def test_a_request_for_the_list_of_models_can_be_answered():
    """With JSON and 200; the stream ends, and nothing is left of it."""
    peer = Peer().arrived(headers(end=True, **{":method": "GET", ":path": "/v1/models/a%2Fb"}))
    assert peer.request.asked_model == "a/b"

    peer.stream.answer(b"{}")

    (message,) = peer.take()
    immediate = message.immediate_response
    assert (immediate.status.code, immediate.body) == (200, b"{}")
    assert {o.header.key: o.header.raw_value for o in immediate.headers.set_headers} == {
        "content-type": b"application/json",
        "x-forebay-outcome": b"Answered",
    }
    assert (peer.stream.state, peer.stream.ended) == (State.DONE, True)
    assert peer.stream.reset() is None


def test_a_request_for_the_list_of_models_may_be_left_to_a_server():
    """Then it is like any other without a model."""
    peer = Peer().arrived(headers(end=True, **{":method": "GET", ":path": "/v1/models"}))

    peer.stream.dispatch("10.0.0.1:8000", None)

    assert peer.request.model == ""
    assert [m.WhichOneof("response") for m in peer.take()] == ["request_headers"]


# --- buffered and streamed


def test_buffered_waves_headers_through_and_decides_on_the_body():
    """One answer per message; an unchanged body is not sent back."""
    modes = (pb.BUFFERED, pb.BUFFERED)
    peer = Peer()
    peer.say(headers(modes=modes))
    assert [m.WhichOneof("response") for m in peer.take()] == ["request_headers"]

    assert isinstance(peer.say(body()), Arrived)
    peer.stream.dispatch("10.0.0.1:8000", None)

    (decision,) = peer.take()
    common = decision.request_body.response
    assert set_headers(common) == {DESTINATION: "10.0.0.1:8000"}
    assert not common.HasField("body_mutation")
    assert decision.dynamic_metadata["envoy.lb"][DESTINATION] == "10.0.0.1:8000"


def test_buffered_changes_body_and_length_together():
    """Envoy answers 500 when they differ."""
    peer = Peer()
    peer.say(headers(modes=(pb.BUFFERED, pb.NONE)))
    peer.say(body())
    peer.take()

    peer.stream.dispatch("10.0.0.1:8000", "another-name")

    (decision,) = peer.take()
    changed = decision.request_body.response.body_mutation.body
    assert json.loads(changed) == {"model": "another-name", "prompt": "hello"}
    assert set_headers(decision.request_body.response)["content-length"] == str(len(changed))


FORM = (
    b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    b"\xff\xfe\r\n--b--\r\n"
)


def test_the_model_of_a_form_is_read_and_rewritten():
    """Audio comes as multipart; the length is that of the new form."""
    given = {":path": "/v1/audio/transcriptions", "content-type": "multipart/form-data; boundary=b"}
    peer = Peer()
    peer.say(headers(modes=(pb.BUFFERED, pb.NONE), **given))
    assert isinstance(peer.say(body(FORM)), Arrived)
    peer.take()

    peer.stream.dispatch("10.0.0.1:8000", "whisper-large-v3")

    (decision,) = peer.take()
    changed = decision.request_body.response.body_mutation.body
    assert peer.request.model == "whisper"
    assert changed == FORM.replace(b"whisper", b"whisper-large-v3")
    assert set_headers(decision.request_body.response)["content-length"] == str(len(changed))


def test_a_request_that_names_no_model_is_for_the_default_one():
    """And is sent on under the name it is rewritten to."""
    peer = Peer(default_model="chat")
    peer.arrived(headers(), body(b'{"prompt":"hello"}'))

    peer.stream.dispatch("10.0.0.1:8000", "chat-v1")

    assert peer.request.model == "chat"
    (sent,) = pieces(peer.take(), "request_body")
    assert json.loads(sent.body) == {"prompt": "hello", "model": "chat-v1"}


def test_a_path_where_the_model_is_optional_passes_without():
    """As an unmatched request."""
    peer = Peer().arrived(headers(**{":path": "/tokenize"}), body(b'{"prompt":"hello"}'))

    assert peer.request.model == ""


@pytest.mark.parametrize(
    ("name", "values", "outcome"),
    [
        ("content-encoding", ["gzip", "identity"], Outcome.REJECTED_UNSUPPORTED_ENCODING),
        (
            "content-type",
            ["multipart/form-data; boundary=b", "multipart/form-data; boundary=c"],
            Outcome.REJECTED_BAD_REQUEST,
        ),
    ],
)
def test_a_header_that_comes_twice_hides_nothing(name, values, outcome):
    """The server may believe the other one."""
    message = headers(**{":path": "/v1/audio/transcriptions"})
    for value in values:
        message.request_headers.headers.headers.add(key=name, raw_value=value.encode())
    peer = Peer()

    peer.say(message)
    peer.say(body(FORM))
    assert peer.rejected.outcome is outcome


def test_streamed_decides_on_the_headers_and_owes_an_answer_per_piece():
    """The body is not shown before; what came meanwhile is answered in order."""
    modes = (pb.STREAMED, pb.STREAMED)
    peer = Peer().arrived(headers(modes=modes))
    peer.say(body(b"one", end=False))
    assert peer.take() == []

    peer.stream.dispatch("10.0.0.1:8000", None)
    peer.say(body(b"two"))

    kinds = [m.WhichOneof("response") for m in peer.take()]
    assert kinds == ["request_headers", "request_body", "request_body"]


def test_streamed_reads_the_body_first_where_the_proxy_sends_it():
    """`send_body_without_waiting_for_header_response` allows to know the model."""
    modes = (pb.STREAMED, pb.STREAMED)
    peer = Peer().arrived(
        headers(modes=modes, early_body=True), body(BODY[:4], end=False), body(BODY[4:])
    )

    peer.stream.dispatch("10.0.0.1:8000", "other")

    first, second, third = peer.take()
    assert peer.request.model == "m"
    assert first.HasField("request_headers")
    assert json.loads(second.request_body.response.body_mutation.body)["model"] == "other"
    assert third.request_body.response.body_mutation.clear_body


# --- the answer


def dispatched(target=None, modes=(pb.FULL_DUPLEX_STREAMED,) * 2):
    peer = Peer()
    peer.say(headers(modes=modes))
    peer.say(body())
    peer.stream.dispatch("10.0.0.1:8000", target)
    peer.take()
    return peer


def test_a_json_answer_passes_and_its_usage_is_read():
    """The echo is byte for byte; the end frees the slot and closes the stream."""
    peer = dispatched()
    assert peer.say(answer_headers()) is None
    assert peer.say(answer_body(JSON_ANSWER[:9], end=False)) is None
    assert peer.say(answer_body(JSON_ANSWER[9:])) == Finished(200, openai.Usage(7, 9), whole=True)

    sent = peer.take()
    assert sent[0].HasField("response_headers")
    assert b"".join(piece.body for piece in pieces(sent, "response_body")) == JSON_ANSWER
    assert (peer.stream.ended, peer.stream.failure) == (True, None)


def test_the_progress_of_a_streamed_answer_is_told_every_32_tokens():
    """Wherever chunks begin and end; an answer of one JSON object tells none."""
    peer = dispatched()
    peer.say(answer_headers(content_type="text/event-stream"))
    peer.say(answer_body(b'data: {"choices":[]}\n\n', end=False))
    text = 63 * b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
    events = [
        peer.say(answer_body(text[at : at + 20], end=False)) for at in range(0, len(text), 20)
    ]

    assert [event for event in events if event] == [Progress(32), Progress(64)]


def test_an_event_stream_is_seen_to_begin():
    """Its first bytes are the first token; a JSON answer's come when the last token has."""
    peer = dispatched()
    peer.say(answer_headers(content_type="text/event-stream; charset=utf-8"))

    assert peer.say(answer_body(b"data: {}\n\n", end=False)) is FIRST_CHUNK
    assert peer.say(answer_body(b"data: {}\n\n", end=False)) is None


@pytest.mark.parametrize("streamed", [True, False])
def test_a_request_says_whether_it_asks_for_a_stream(streamed):
    """So that flow control knows whether to expect a first token."""
    data = json.dumps({"model": "m", "stream": streamed}).encode()
    assert Peer().arrived(headers(), body(data)).request.streamed is streamed


@given(cut=st.lists(st.integers(1, 160), max_size=4, unique=True))
def test_usage_of_an_event_stream_is_read_wherever_it_is_cut(cut):
    """The event with usage may be split over chunks at every position."""
    text = (
        b'data: {"choices":[{"delta":{"content":"a"}}]}\r\n\r\n'
        b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":9,'
        b'"prompt_tokens_details":{"cached_tokens":3}}}\n\ndata: [DONE]\n\n'
    )
    edges = [0, *sorted(cut), len(text)]
    peer = dispatched()
    peer.say(answer_headers(content_type="text/event-stream"))

    for start, end in pairwise(edges):
        peer.say(answer_body(text[start:end], end=end == len(text)))

    assert peer.finished.usage == openai.Usage(7, 9, 3)
    assert b"".join(p.body for p in pieces(peer.take(), "response_body")) == text


@given(cut=st.lists(st.integers(1, 70), max_size=5, unique=True))
def test_the_clients_model_name_comes_back_wherever_the_answer_is_cut(cut):
    """The target's name is replaced even when it is split over chunks."""
    text = (
        b'data: {"id":"1","model":"target-name","x":"model"}\n\ndata: {"model": "target-name"}\n\n'
    )
    edges = [0, *sorted(cut), len(text)]
    peer = dispatched(target="target-name")
    peer.say(answer_headers(content_type="text/event-stream"))

    for start, end in pairwise(edges):
        peer.say(answer_body(text[start:end], end=end == len(text)))

    sent = b"".join(piece.body for piece in pieces(peer.take(), "response_body"))
    assert sent == text.replace(b'"target-name"', b'"m"')


def test_a_changed_answer_loses_its_length():
    """The name that comes back may be longer or shorter."""
    peer = dispatched(target="target-name")

    peer.say(answer_headers(content_length="63"))

    (sent,) = peer.take()
    assert list(sent.response_headers.response.header_mutation.remove_headers) == ["content-length"]


def test_response_trailers_end_the_answer():
    """Servers of gRPC and HTTP/2: the last body message does not say end."""
    peer = dispatched()
    peer.say(answer_headers())
    peer.say(answer_body(end=False))

    event = peer.say(pb.ProcessingRequest(response_trailers=pb.HttpTrailers()))

    assert event == Finished(200, openai.Usage(7, 9), whole=True)
    assert peer.take()[-1].HasField("response_trailers")


def test_an_answer_without_body_ends_with_its_headers():
    """HEAD, 204."""
    assert dispatched().say(answer_headers(status="204", end=True)) == Finished(204, whole=True)


@pytest.mark.parametrize("mode", [pb.BUFFERED, pb.STREAMED])
def test_other_response_modes_continue_each_message(mode):
    """No body is sent back unless it has changed."""
    peer = dispatched(modes=(pb.BUFFERED, mode))
    peer.say(answer_headers())

    assert isinstance(peer.say(answer_body()), Finished)

    last = peer.take()[-1]
    assert last.HasField("response_body")
    assert not last.response_body.response.HasField("body_mutation")


def test_a_local_reply_of_the_proxy_abandons_a_queued_request():
    """Envoy's own timeout is shown as response headers of a request that never went out."""
    peer = Peer().arrived(headers(), body())

    assert peer.say(answer_headers(status="504")) is ABANDONED
    assert peer.say(answer_body(b"timeout")) == Finished(504, whole=True)
    assert [m.WhichOneof("response") for m in peer.take()] == ["response_headers", "response_body"]


# --- ends


def test_half_close_in_each_state():
    """Before headers: a clean end. In the body: 400. While answered: the end of the request."""
    silent = Peer()
    assert (silent.stream.half_close(), silent.stream.ended) == (None, True)
    reading = Peer()
    reading.say(headers())
    assert isinstance(reading.stream.half_close(), Rejected)
    assert reading.take()[0].immediate_response.status.code == 400
    answered = dispatched()
    answered.say(answer_headers())
    assert answered.stream.half_close() == Finished(200)
    unanswered = dispatched()
    assert unanswered.stream.half_close() == Finished(0, blind=True)
    for over in (silent, reading, answered, unanswered):
        assert (over.stream.ended, over.stream.reset()) == (True, None)


@pytest.mark.parametrize("content_type", ["text/event-stream", "application/json"])
def test_what_ends_behind_headers_alone_says_so(content_type):
    """In mode NONE it may be the answer, or what the proxy shows of it; JSON comes at once."""
    modes = (pb.FULL_DUPLEX_STREAMED, pb.NONE)
    peer = Peer().arrived(headers(modes=modes), body())
    peer.stream.dispatch("10.0.0.1:8000", None)
    streamed = content_type == "text/event-stream"

    assert peer.say(answer_headers(content_type=content_type)) == (
        HEADERS_ONLY if streamed else None
    )
    assert peer.stream.half_close() == Finished(200, headers_only=streamed)


def test_reset_in_each_state():
    """A stream that is gone gives its slot back, once."""
    queued = Peer().arrived(headers(), body())
    assert [queued.stream.reset(), queued.stream.reset()] == [ABANDONED, None]
    answered = dispatched()
    assert [answered.stream.reset(), answered.stream.reset()] == [Finished(0), None]
    assert Peer().stream.reset() is None


@pytest.mark.parametrize("outcome", sorted(set(Outcome) - {Outcome.DISPATCHED, Outcome.ANSWERED}))
def test_a_refusal_is_an_openai_error_with_the_outcome(outcome):
    """Status, headers in raw_value, a JSON body, and the end of the stream."""
    peer = Peer().arrived(headers(), body())

    peer.stream.refuse(outcome, "the reason", 7)

    immediate = peer.take()[0].immediate_response
    given = {o.header.key: o.header.raw_value.decode() for o in immediate.headers.set_headers}
    assert immediate.status.code == openai.HTTP_STATUS[outcome]
    assert given == {
        "content-type": "application/json",
        "x-forebay-outcome": outcome,
        "retry-after": "7",
        "x-llm-d-request-dropped-reason": str(outcome),
    }
    error = json.loads(immediate.body)["error"]
    assert (error["message"], error["code"]) == ("the reason", outcome)
    assert peer.stream.ended


def test_too_large_is_refused_as_soon_as_it_is_known():
    """By content-length at once, else by the byte that is one too many."""
    by_header, by_body = Peer(100), Peer(100)

    assert isinstance(by_header.say(headers(content_length="101")), Rejected)
    by_body.say(headers())
    assert by_body.say(body(b"x" * 60, end=False)) == BodyPart(60)
    assert isinstance(by_body.say(body(b"x" * 60, end=False)), Rejected)

    for peer in (by_header, by_body):
        assert peer.take()[0].immediate_response.status.code == 413


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["10.0.0.1:1", "10.0.0.2:1"], {"10.0.0.1:1", "10.0.0.2:1"}),
        ("10.0.0.1:1, 10.0.0.2:1", {"10.0.0.1:1", "10.0.0.2:1"}),
        ([], set()),
    ],
)
def test_a_subset_hint_is_read_from_either_message(value, expected):
    """As a list or a comma list; an empty one allows no endpoint."""
    for where in (0, 1):
        messages = [headers(), body()]
        hint = messages[where].metadata_context.filter_metadata["envoy.lb.subset_hint"]
        hint[f"{DESTINATION}-subset"] = value
        peer = Peer().arrived(*messages)

        assert peer.request.subset == frozenset(expected)


def test_no_hint_is_no_subset():
    """None means every endpoint."""
    assert Peer().arrived(headers(), body()).request.subset is None


# --- anything at all

MESSAGES = st.one_of(
    st.builds(
        headers,
        end=st.booleans(),
        modes=st.one_of(st.none(), st.tuples(st.sampled_from(range(6)), st.sampled_from(range(6)))),
        early_body=st.booleans(),
    ),
    st.sampled_from(
        [headers(**{":method": "GET", "upgrade": "websocket"}), headers(**{":method": "CONNECT"})]
    ),
    st.builds(body, data=st.sampled_from([BODY, b"", b"{", b"\xff"]), end=st.booleans()),
    st.just(pb.ProcessingRequest(request_trailers=pb.HttpTrailers())),
    st.builds(answer_headers, end=st.booleans()),
    st.builds(answer_body, data=st.sampled_from([JSON_ANSWER, b""]), end=st.booleans()),
    st.just(pb.ProcessingRequest(response_trailers=pb.HttpTrailers())),
    st.just(pb.ProcessingRequest()),
)
STEPS = st.lists(
    st.one_of(
        MESSAGES,
        st.binary(max_size=40),
        st.sampled_from(["dispatch", "rewrite", "refuse", "half_close", "reset"]),
    ),
    max_size=12,
)


@given(steps=STEPS)
@settings(max_examples=400)
def test_whatever_comes_in_whatever_order_has_one_end(steps):  # noqa: C901, PLR0912  # one case per step
    """Never an exception; one arrival and one end of it; no clean end without an answer."""
    peer = Peer()
    stream = peer.stream
    events = []
    seen_headers = answered = was_reset = False
    for step in steps:
        before = stream.state
        event = None
        match step:
            case "dispatch" | "rewrite":
                if before is State.QUEUED:
                    target = "t" if step == "rewrite" else None
                    event = stream.dispatch("10.0.0.1:1", target)
            case "refuse":
                if before is State.QUEUED:
                    stream.refuse(Outcome.EVICTED_TTL, "late", 1)
                    event = "refused"
            case "half_close":
                if not stream.ended:
                    event = stream.half_close()
            case "reset":
                event = stream.reset()
                was_reset = True
            case bytes():
                if not stream.ended:
                    event = stream.receive(step)
            case _:
                if not stream.ended:
                    event = peer.say(step)
        events.append(event)
        seen_headers = seen_headers or stream.state in {State.BODY, State.QUEUED}
        kinds = {message.WhichOneof("response") for message in peer.take()}
        answered = answered or bool(
            kinds & {"immediate_response", "request_headers", "response_headers"}
        )
        if stream.ended and stream.failure is None and seen_headers and not was_reset:
            assert answered

    arrivals = sum(isinstance(event, Arrived) for event in events)
    ends = sum(isinstance(event, Finished) or event == "refused" for event in events)
    abandoned = sum(isinstance(event, Abandoned) for event in events)
    assert arrivals <= 1
    assert ends <= 1
    assert abandoned <= 1


# --- what else a proxy may do


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/files"])
def test_a_compressed_body_is_refused_where_its_model_matters(path):
    """It cannot be read, and must not pass unread."""
    peer = Peer()

    event = peer.say(headers(content_encoding="gzip", **{":path": path}))

    if path == "/v1/files":
        assert (event, peer.take()) == (None, [])
    else:
        assert isinstance(event, Rejected)
        assert peer.take()[0].immediate_response.status.code == 415


def test_a_proxy_that_writes_values_into_value_is_read():
    """NGINX Gateway Fabric's client leaves raw_value empty."""
    message = headers(modes=None)
    message.request_headers.headers.headers.add(key="content-length", value=str(LIMIT + 1))
    peer = Peer()

    assert isinstance(peer.say(message), Rejected)
    assert peer.take()[0].immediate_response.status.code == 413


def test_a_proxy_that_shows_no_body_gets_its_decision_on_the_headers():
    """Body mode NONE: the request is classified without its model."""
    peer = Peer().arrived(headers(modes=(pb.NONE, pb.NONE)))

    peer.stream.dispatch("10.0.0.1:8000", "other")

    assert [m.WhichOneof("response") for m in peer.take()] == ["request_headers"]


@pytest.mark.parametrize("modes", [(pb.BUFFERED, pb.NONE), (pb.STREAMED, pb.NONE)])
def test_patience_is_asked_of_a_proxy_that_counts_the_time(modes):
    """While the request is queued and no longer."""
    peer = Peer()
    peer.say(headers(modes=modes))
    if peer.stream.state is not State.QUEUED:
        peer.say(body())
    peer.take()

    peer.stream.extend_timeout(2.5)
    asked = peer.take()
    peer.stream.dispatch("10.0.0.1:8000", None)
    peer.take()
    peer.stream.extend_timeout(2.5)

    assert [m.override_message_timeout.ToMilliseconds() for m in asked] == [2500]
    assert peer.take() == []


def test_no_patience_is_asked_in_full_duplex():
    """No message timeout runs there, and a message more would be a spurious one."""
    peer = Peer().arrived(headers(), body())

    peer.stream.extend_timeout(2.5)

    assert peer.take() == []


def test_a_bodiless_request_in_buffered_mode_is_decided_on_its_headers():
    """There will be no body to answer."""
    modes = (pb.BUFFERED, pb.NONE)
    peer = Peer().arrived(headers(end=True, modes=modes, **{":method": "GET"}))

    peer.stream.dispatch("10.0.0.1:8000", None)

    (decision,) = peer.take()
    assert set_headers(decision.request_headers.response) == {DESTINATION: "10.0.0.1:8000"}


def test_a_request_that_is_refused_behind_a_half_close_is_answered():
    """The client of NGINX Gateway Fabric still reads."""
    peer = Peer().arrived(headers(modes=None), body())
    peer.stream.half_close()

    peer.stream.refuse(Outcome.EVICTED_TTL, "late", 1)

    assert peer.take()[0].immediate_response.status.code == 429
    assert (peer.stream.ended, peer.stream.failure) == (True, None)


def test_what_was_held_back_is_sent_before_the_trailers():
    """The end of a body that looks like the beginning of a model's name."""
    peer = dispatched(target="target")
    peer.say(answer_headers())
    peer.say(answer_body(b'{"x":"', end=False))

    peer.say(pb.ProcessingRequest(response_trailers=pb.HttpTrailers()))

    sent = peer.take()
    assert b"".join(piece.body for piece in pieces(sent, "response_body")) == b'{"x":"'
    assert sent[-1].HasField("response_trailers")


def test_a_compressed_answer_passes_untouched():
    """Nothing can be read of it or replaced in it, and its length stays."""
    peer = dispatched(target="target")
    data = b'\x1f\x8b"model":"target"'
    peer.say(answer_headers(content_encoding="gzip"))
    (first,) = peer.take()

    peer.say(answer_body(data))

    assert not first.response_headers.response.header_mutation.remove_headers
    assert [piece.body for piece in pieces(peer.take(), "response_body")] == [data]
    assert peer.finished.usage is None


@pytest.mark.parametrize(
    "modes", [(pb.FULL_DUPLEX_STREAMED,) * 2, (pb.BUFFERED, pb.NONE), (pb.STREAMED, pb.STREAMED)]
)
@pytest.mark.parametrize("bad", [b"", b"[]", b"{", b"\xff", b'{"model":"' + b"m" * 2**20 + b'"}'])
def test_a_bad_body_is_refused_in_every_mode(modes, bad):
    """400 in OpenAI's words, and the end; what the body said is not repeated."""
    peer = Peer(limit=2 << 20)
    peer.say(headers(modes=modes, early_body=True))
    peer.take()

    assert isinstance(peer.say(body(bad)), Rejected)

    (answer,) = peer.take()
    assert answer.immediate_response.status.code == 400
    assert json.loads(answer.immediate_response.body)["error"]["type"] == "invalid_request_error"
    assert len(answer.immediate_response.body) < 300
    assert peer.stream.ended


# --- what a hostile client or server can make of it


def frames_deeper(frames, call):
    """Call with less of the stack left."""
    return frames_deeper(frames - 1, call) if frames else call()


def test_a_body_that_was_read_with_more_stack_than_is_left_at_dispatch_is_refused():
    """The parser recurses; decisions are applied deeper in the stack than messages are read."""
    for depth in range(sys.getrecursionlimit(), 0, -1):
        peer = Peer()
        peer.say(headers())
        if peer.say(body(b'{"model":"m","x":' + b"[" * depth + b"]" * depth + b"}")):
            peer.take()
            if peer.stream.state is State.QUEUED:
                break

    event = frames_deeper(10, lambda: peer.stream.dispatch("10.0.0.1:8000", "other"))

    first = peer.take()[0]
    if event is None:  # interpreters that count their own frames apart from the parser's
        assert first.HasField("request_headers")
    else:
        assert (event, peer.stream.ended) == (Finished(0), True)
        assert first.immediate_response.status.code == 400


def test_a_body_that_cannot_be_rewritten_costs_neither_the_loop_nor_a_slot():
    """The data plane goes on, and no slot is held for a request that was never sent."""
    plan = Plan(
        saturation=SaturationPlan(SaturationMode.ADAPTIVE),
        models=(ModelPlan("m", "Standard", targets=(TargetPlan("other"),)),),
    )
    controller = ShadowedController(plan, random.Random(1))
    controller.set_endpoints([Endpoint("10.0.0.1:8000")], 0.0)
    controller.observe(EndpointMetrics("10.0.0.1:8000", 0, 0, 0.0, 0.0), 0.0)
    free = controller.state(0.0).endpoints[0].free
    data_plane = DataPlane(controller, Traffic(), clock=lambda: 0.0)
    data_plane.serving = True

    for depth in range(sys.getrecursionlimit() - 100, sys.getrecursionlimit()):
        exchange = data_plane.open(lambda: None)
        nested = b'{"model":"m","x":' + b"[" * depth + b"]" * depth + b"}"
        exchange.receive(headers().SerializeToString())
        exchange.receive(body(nested).SerializeToString())
        answer = pb.ProcessingResponse.FromString(exchange.outbox[0])
        assert answer.WhichOneof("response") in {"request_headers", "immediate_response"}
        exchange.close()

    assert data_plane.unfinished == 0
    assert controller.state(0.0).endpoints[0].free == free > 0


@pytest.mark.parametrize("status", ["9" * 5000, "", "-1", "2000", "ok"], ids=range(5))
def test_a_status_that_is_none_is_an_error(status):
    """Whatever a server calls it; Python refuses to read very long numbers."""
    peer = dispatched()

    peer.say(answer_headers(status=status))

    assert peer.say(answer_body()).status == 500


def test_a_partly_buffered_answer_comes_whole():
    """It is one message, which does not say end where the rest passes unseen."""
    peer = dispatched(target="target", modes=(pb.BUFFERED, pb.BUFFERED_PARTIAL))
    peer.say(answer_headers())
    peer.take()

    peer.say(answer_body(b'{"model":"target","id":"', end=False))

    (sent,) = peer.take()
    assert sent.response_body.response.body_mutation.body == b'{"model":"m","id":"'


@pytest.mark.parametrize("late", [answer_body(), answer_body(b"", end=False), headers(), body()])
def test_nothing_is_said_after_the_end(late):
    """The transport closes the stream once the outbox is sent."""
    peer = dispatched()
    peer.say(answer_headers())
    peer.say(answer_body())
    peer.take()

    assert peer.say(late) is None
    assert peer.take() == []
    assert peer.stream.failure is None


@pytest.mark.parametrize("modes", [(pb.FULL_DUPLEX_STREAMED,) * 2, (pb.NONE, pb.BUFFERED)])
def test_a_stream_that_shows_an_answer_only_is_passed_on(modes):
    """A reply of the proxy's own, or a filter set up so: continued to its end, which is clean."""
    peer = Peer()
    first = answer_headers("503")
    first.protocol_config.request_body_mode, first.protocol_config.response_body_mode = modes

    assert peer.say(first) is ABANDONED
    peer.say(answer_body(b"overflow"))

    shown, echo = peer.take()
    assert shown.HasField("response_headers")
    assert echo.HasField("response_body")
    if modes[1] == pb.FULL_DUPLEX_STREAMED:
        assert pieces([echo], "response_body")[0].body == b"overflow"
    assert (peer.stream.ended, peer.stream.failure, peer.rejected) == (True, None, None)


def test_an_answer_without_its_headers_is_passed_on_too():
    """A filter may be told to skip them."""
    peer = Peer()

    assert peer.say(answer_body(b"x", end=False)) is ABANDONED
    peer.say(answer_body(b"y"))

    assert [piece.body for piece in pieces(peer.take(), "response_body")] == [b"x", b"y"]
    assert (peer.stream.ended, peer.stream.failure) == (True, None)


UPGRADES = [
    {":method": "GET", "upgrade": "websocket", ":path": "/v1/realtime"},
    {":method": "CONNECT", ":path": ""},
]


@pytest.mark.parametrize("request_headers", UPGRADES)
def test_a_conversation_passes_in_both_directions_until_it_ends(request_headers):
    """Decided on its headers; what follows is no body, and only its end frees the slot."""
    peer = Peer().arrived(headers(**request_headers))
    assert (peer.request.model, peer.take()) == ("", [])

    peer.stream.dispatch("10.0.0.1:8000", None)

    (routed,) = peer.take()
    common = routed.request_headers.response
    assert set_headers(common)[DESTINATION] == "10.0.0.1:8000"
    assert peer.say(answer_headers("101")) is None
    peer.say(body(b"ping", end=False))
    peer.say(answer_body(b"pong", end=False))
    peer.say(body(b"", end=True))
    shown, ping, pong, last = peer.take()
    assert shown.HasField("response_headers")
    assert [piece.body for piece in pieces([ping, last], "request_body")] == [b"ping", b""]
    assert [piece.end_of_stream for piece in pieces([ping, last], "request_body")] == [False, True]
    assert [piece.body for piece in pieces([pong], "response_body")] == [b"pong"]
    assert not peer.stream.ended
    assert peer.stream.half_close() == Finished(101)
    assert peer.stream.reset() is None


@pytest.mark.parametrize("modes", [(pb.BUFFERED, pb.NONE), (pb.STREAMED, pb.STREAMED)])
def test_a_conversation_is_decided_on_its_headers_in_every_mode(modes):
    """A proxy that buffered it would wait for an end that does not come."""
    peer = Peer().arrived(headers(modes=modes, **UPGRADES[0]))

    peer.stream.dispatch("10.0.0.1:8000", None)

    (routed,) = peer.take()
    assert routed.HasField("request_headers")


def test_what_comes_before_a_conversation_is_open_follows_its_decision():
    """A little of it; more ends the stream and leaves the queue."""
    peer = Peer().arrived(headers(**UPGRADES[0]))
    peer.say(body(b"early", end=False))
    peer.stream.dispatch("10.0.0.1:8000", None)
    routed, early = peer.take()
    assert routed.HasField("request_headers")
    assert pieces([early], "request_body")[0].body == b"early"

    hasty = Peer().arrived(headers(**UPGRADES[0]))
    assert hasty.say(body(b"x" * 62_001, end=False)) is ABANDONED
    assert "did not wait" in hasty.stream.failure


def test_an_upgrade_header_does_not_hide_the_model():
    """Where a model is read it is read all the same."""
    peer = Peer().arrived(headers(upgrade="websocket"), body())

    assert peer.request.model == "m"


PARTIAL = (pb.BUFFERED_PARTIAL, pb.NONE)


@pytest.mark.parametrize(
    ("part", "model"),
    [
        (b'{"model":"m","prompt":"hel', "m"),
        (b'{ "a": [{"model": "inner"}], "b": "\\"model\\": \\"x\\"", "model" : "m", "c": ', "m"),
        (b'{"model":"m","x":{},"model":"n","prompt":"', "n"),
        (b'{"prompt":"hel', ""),
        (b'{"model":"unfini', ""),
        (b'{"model":7,"prompt":"hel', ""),
        (b'{"x":"model","y":"m', ""),
        (b'{"p":"' + b'\\"' * 500_000, ""),
        (b"", ""),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_body_that_the_proxy_cuts_is_classified_by_its_beginning(part, model):
    """The rest is never shown; it is not refused for that."""
    peer = Peer(4 << 20).arrived(headers(modes=PARTIAL), body(part, end=False))

    peer.stream.dispatch("10.0.0.1:8000", None)

    assert peer.request.model == model
    waved, routed = peer.take()
    assert waved.HasField("request_headers")
    assert set_headers(routed.request_body.response)[DESTINATION] == "10.0.0.1:8000"
    assert not routed.request_body.response.HasField("body_mutation")


def test_a_body_that_the_proxy_cuts_cannot_be_renamed():
    """The client gets an error, and the server no request for a model that it does not have."""
    peer = Peer().arrived(headers(modes=PARTIAL), body(b'{"model":"m","p":"x', end=False))

    assert peer.stream.dispatch("10.0.0.1:8000", "target") == Finished(0)

    assert peer.take()[-1].immediate_response.status.code == 413


def test_a_whole_body_of_such_a_proxy_is_read_as_ever():
    """It says that it is whole."""
    peer = Peer().arrived(headers(modes=PARTIAL), body())
    peer.stream.dispatch("10.0.0.1:8000", "target")

    assert json.loads(peer.take()[-1].request_body.response.body_mutation.body)["model"] == "target"


@pytest.mark.parametrize("modes", [(pb.FULL_DUPLEX_STREAMED,) * 2, (pb.BUFFERED, pb.BUFFERED)])
@pytest.mark.parametrize("target", ["target", None])
def test_an_answer_that_will_be_changed_must_not_be_compressed(modes, target):
    """In a compressed one the client's model name could not be put back."""
    peer = Peer().arrived(headers(modes=modes, accept_encoding="gzip"), body())
    peer.stream.dispatch("10.0.0.1:8000", target)

    messages = peer.take()
    common = (
        messages[0].request_headers.response
        if modes[0] == pb.FULL_DUPLEX_STREAMED
        else messages[1].request_body.response
    )
    removed = list(common.header_mutation.remove_headers)
    assert removed == (["accept-encoding"] if target else [])


TRUSTING = Plan(tenant_header="x-team", trust_deadline_headers=True)


def test_what_trusted_headers_say_comes_with_the_request():
    """Others are as if they were not there."""
    peer = Peer(plan=TRUSTING)
    peer.arrived(headers(**{"x-team": "acme", "x-slo-ttft-ms": "500"}), body())

    assert (peer.request.caller.tenant, peer.request.caller.due_in_seconds) == ("acme", 0.5)
    assert Peer().arrived(headers(x_team="acme"), body()).request.caller.tenant == ""


def test_a_trusted_header_that_means_nothing_is_refused():
    """The error names it."""
    peer = Peer(plan=TRUSTING)
    peer.say(headers(x_slo_ttft_ms="soon"))

    assert peer.rejected.outcome is Outcome.REJECTED_BAD_REQUEST
    assert "x-slo-ttft-ms" in peer.rejected.message
    assert b"x-slo-ttft-ms" in peer.take()[-1].immediate_response.body


# --- streams that show the answer to another stream's request


def watching() -> Peer:
    peer = Peer()
    peer.stream.watch()
    return peer


@pytest.mark.parametrize(
    "last",
    [
        answer_headers("503", end=True),
        pb.ProcessingRequest(response_trailers=pb.HttpTrailers()),
        "half-close",
        "reset",
    ],
    ids=lambda last: last if isinstance(last, str) else last.WhichOneof("request"),
)
def test_an_answer_that_is_shown_ends_once_and_nothing_is_said(last):
    """Its status counts; how it ends is not known, so it passes for whole."""
    peer = watching()
    events = [peer.say(headers())]
    if not isinstance(last, pb.ProcessingRequest) or not last.HasField("response_headers"):
        events.append(peer.say(answer_headers("503")))
    match last:
        case "half-close":
            events.append(peer.stream.half_close())
        case "reset":
            events.append(peer.stream.reset())
        case _:
            events.append(peer.say(last))

    *before, end = events
    assert set(before) == {None}
    assert (end.status, end.whole) == (503, True)
    assert peer.stream.reset() is None
    assert peer.take() == []


def test_what_is_shown_and_cannot_be_read_ends_the_stream_only():
    """The request counts as ended, with no status, because no other message will tell."""
    peer = watching()

    event = peer.stream.receive(b"\xff\xff")

    assert isinstance(event, Finished)
    assert peer.stream.failure == "not a ProcessingRequest"


def test_an_answer_of_no_interest_ends_its_stream_in_order():
    """The proxy does not mind: it shows answers, and waits for nothing."""
    stream = Peer().stream
    stream.ignore()

    assert (stream.ended, stream.failure, list(stream.outbox)) == (True, None, [])
    assert stream.receive(answer_headers(end=True).SerializeToString()) is None
