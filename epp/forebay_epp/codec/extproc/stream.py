"""One ext_proc stream as a state machine: bytes in, bytes and events out.

Rule 1: all knowledge of Envoy's external processing protocol is in this package; nothing here
knows grpc, time or queues. Rule 2: once a request has been seen, the stream ends only after an
answer to it, because a proxy that sees a clean end without one forwards the request unexamined.

    HEADERS ──> BODY ──> QUEUED ──> RESPONSE ──> DONE
       └──────────┴─────────┴─ refuse, answer ────^

HEADERS: nothing seen. BODY: reading the request. QUEUED: the request is the flow controller's.
RESPONSE: dispatched, every message is answered at once. DONE: nothing more is expected.
WATCHING: the stream shows the answer to another one's request, and nothing is ever answered.

This module says which message may come when; request.py and response.py say what is in them, and
modes.py how bodies travel. A WebSocket or CONNECT is decided on its headers in every mode: what
follows them is a conversation, and passes in both directions as it comes. A stream that shows an
answer before its request was decided, or an answer only, is one of the proxy's own: it passes, too.

The source is Envoy's external_processor.proto (v3) and the endpoint picker protocol of the
Gateway API inference extension (proposal 004).
"""

from __future__ import annotations

from collections import deque
from enum import Enum, auto
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from forebay_epp.codec import openai
from forebay_epp.codec.extproc import framing
from forebay_epp.codec.extproc.events import ABANDONED, UNTIED, Arrived, Finished, Rejected
from forebay_epp.codec.extproc.request import ProtocolError, RequestHalf
from forebay_epp.codec.extproc.response import ResponseHalf
from forebay_epp.core.terms import Outcome
from forebay_extproc.v3 import external_processor_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable

    from forebay_epp.codec.callers import CallerHeaders
    from forebay_epp.codec.extproc.events import Abandoned, BodyPart, Event
    from forebay_epp.codec.extproc.response import Seen
    from forebay_epp.codec.extproc.watching import Tie

OUTCOME = "x-forebay-outcome"
DROPPED_REASON = "x-llm-d-request-dropped-reason"  # the same under upstream's name, on refusals


class State(Enum):
    """The state of a stream; see the module's picture."""

    HEADERS = auto()
    BODY = auto()
    QUEUED = auto()
    RESPONSE = auto()
    WATCHING = auto()
    DONE = auto()


class ExtProcStream:
    """The protocol state of one HTTP request.

    Bytes to send collect in `outbox`; once `ended` is set and the outbox is sent, the stream is to
    be closed, with status OK, or with INVALID_ARGUMENT and `failure` as its text if that is set.

    Args:
        max_body_bytes: larger request bodies are rejected.
        default_model: the model that is meant where a request that could name one does not; None
            where there is none to mean, and the request is rejected if it must name one.
        headers: those that callers are trusted with.
        reads_prefix: whether the beginnings of prompts are named.
        observed: another stream shows the answer.
    """

    __slots__ = (
        *("_echoes", "_half_closed", "_observed", "_request", "_response", "_tied"),
        *("ended", "failure", "outbox", "state"),
    )

    def __init__(
        self,
        max_body_bytes: int,
        default_model: str | None,
        headers: CallerHeaders,
        *,
        reads_prefix: bool = False,
        observed: bool = False,
    ) -> None:
        self.state = State.HEADERS
        self.outbox: deque[bytes] = deque()
        self.ended = False
        self.failure: str | None = None
        self._request = RequestHalf(
            self.outbox, max_body_bytes, default_model, headers, reads_prefix=reads_prefix
        )
        self._response = ResponseHalf(self.outbox)
        self._echoes = False
        self._half_closed = False
        self._observed = observed
        self._tied = False

    @property
    def observed(self) -> bool:
        """Whether another stream shows the answer to the request, if `dispatch` ties it."""
        return self._observed and self._request.duplex

    @property
    def lockstep(self) -> bool:
        """Whether nothing will be sent before the next message has come."""
        return self.state is State.RESPONSE

    # --- what the proxy says

    def receive(self, data: bytes) -> Event | None:
        """Take one message from the proxy; whatever it contains, nothing is raised.

        What comes after the end of the stream has crossed it on the wire and means nothing.
        """
        if self.ended:
            return None
        if self._echoes and data and data[0] == framing.IN_RESPONSE_BODY:
            try:
                streamed = framing.read_streamed(data)
            except IndexError:
                streamed = None
            if streamed is not None:
                return self._pass(self._response.echo(*streamed))
        if self.state is State.WATCHING and data[:1] == framing.IN_REQUEST_HEADERS:
            return None
        try:
            message = pb.ProcessingRequest.FromString(data)
        except DecodeError:
            return self.fail("not a ProcessingRequest")
        kind = message.WhichOneof("request")
        if self.state is State.WATCHING:
            return self._glance(message, kind)
        handler = _HANDLERS.get((self.state, kind or ""))
        if handler is None:
            return self.fail(f"unexpected {kind or 'empty message'} in state {self.state.name}")
        try:
            return handler(self, message)
        except ProtocolError as error:
            return self.fail(str(error))

    def half_close(self) -> Event | None:
        """The proxy will send nothing more.

        One that never shows the answer does so right behind the body, and still reads. While an
        answer streams it is how Envoy reports that the client has gone.
        """
        match self.state:
            case State.BODY:
                text = "the request ended before its body did"
                return self._read(Rejected(Outcome.REJECTED_BAD_REQUEST, text))
            case State.QUEUED:
                self._half_closed = True
            case State.RESPONSE if self._tied:
                self._end(None)
            case State.RESPONSE:
                return self._end(self._response.finished(blind=not self._response.status))
            case State.WATCHING:
                return self._end(self._response.finished(whole=True))
            case State.HEADERS | State.DONE:
                self._end(None)
        return None

    def reset(self) -> Event | None:
        """The stream is gone; nothing can be sent any more."""
        state, self.state = self.state, State.DONE
        self.ended = True
        self.outbox.clear()
        if state is State.DONE:
            return None
        self._request.drop()
        if state is State.QUEUED:
            return ABANDONED
        if state is State.WATCHING:  # Envoy does not say how an answer that it shows has ended
            return self._response.finished(whole=True)
        return self._response.finished() if state is State.RESPONSE and not self._tied else None

    def fail(self, failure: str) -> Event | None:
        """End the stream with an error, which a proxy that fails closed turns into a 500."""
        if self.ended:
            return None
        event = self.reset()
        self.failure = failure
        return event

    # --- what flow control says

    def dispatch(
        self, endpoint: str, target_model: str | None, tie: Tie | None = None
    ) -> Finished | None:
        """Send the queued request to `endpoint`, under another model name if one is given.

        With a `tie` another stream shows the answer: this one ends, unless it is a conversation.

        Returns:
            The end, where the proxy shows nothing more, or where the body cannot be rewritten, so
            that the client is refused and nothing is sent.
        """
        request, response = self._request, self._response
        if target_model is not None:
            if rejected := request.rename(target_model):
                self.refuse(rejected.outcome, rejected.message)
                return response.finished()
            if request.renamed and tie is None:
                response.restore(target_model, request.model)
        request.route(endpoint, tie)
        if tie is not None:
            self._tied = True
            if not request.conversation:
                return self._end(None)
        elif self._half_closed:
            return self._end(response.finished(blind=True))
        self.state = State.RESPONSE
        self._echoes = response.echoes
        return None

    def refuse(
        self,
        outcome: Outcome,
        message: str,
        retry_after_seconds: int | None = None,
        param: str | None = None,
    ) -> None:
        """Answer the request with an error and end the stream; without effect behind an answer."""
        retry = retry_after_seconds
        headers = {DROPPED_REASON: str(outcome)}
        if retry is not None:
            headers["retry-after"] = str(retry)
        body = openai.error_body(outcome, message, param)
        self._answer(openai.HTTP_STATUS[outcome], outcome, body, headers)

    def answer(self, body: bytes) -> None:
        """Answer the request with this JSON and end the stream."""
        self._answer(200, Outcome.ANSWERED, body, {})

    def _answer(self, status: int, outcome: Outcome, body: bytes, more: dict[str, str]) -> None:
        if self.state in _ANSWERED:
            return
        self._end(None)
        self._request.drop()
        headers = {"content-type": "application/json", OUTCOME: str(outcome), **more}
        self.outbox.append(framing.immediate(status, body, headers, f"forebay_{outcome}"))

    def extend_timeout(self, seconds: float) -> None:
        """Ask for patience while the request waits, if the proxy's message timeout runs."""
        if self.state is State.QUEUED and self._request.arms_timeout:
            self.outbox.append(framing.patience(seconds))

    # --- request

    def _on_headers(self, message: pb.ProcessingRequest) -> Event | None:
        if message.observability_mode:
            self._end(None)
            return UNTIED
        self._read_modes(message)
        self.state = State.BODY
        return self._read(self._request.take_headers(message))

    def _read_modes(self, message: pb.ProcessingRequest) -> None:
        """The stream's first message says how the proxy sends bodies; older proxies do not say."""
        if message.HasField("protocol_config"):
            modes = message.protocol_config
            if modes.request_body_mode != pb.FULL_DUPLEX_STREAMED:
                self._request.set_mode(modes.request_body_mode)
            if modes.response_body_mode != pb.FULL_DUPLEX_STREAMED:
                self._response.set_mode(modes.response_body_mode)

    def _on_body(self, message: pb.ProcessingRequest) -> Event | None:
        return self._read(self._request.take_body(message))

    def _on_trailers(self, message: pb.ProcessingRequest) -> Event | None:
        return self._read(self._request.take_trailers(message))

    def _read(self, event: Arrived | BodyPart | Rejected | None) -> Event | None:
        if isinstance(event, Arrived):
            self.state = State.QUEUED
        elif isinstance(event, Rejected):
            self.refuse(event.outcome, event.message, param=event.param)
        return event

    def _on_late_body(self, message: pb.ProcessingRequest) -> Event | None:
        decided = self.state is not State.QUEUED
        self._request.take_late_body(message.request_body, decided=decided)
        return None

    def _on_late_trailers(self, _: pb.ProcessingRequest) -> Event | None:
        self._request.take_late_trailers(decided=self.state is not State.QUEUED)
        return None

    # --- response

    def watch(self) -> None:
        """Expect the answer to another stream's request, and nothing else, from the beginning."""
        self.state = State.WATCHING

    def ignore(self) -> None:
        """End the stream, which shows an answer of no interest; the proxy does not mind."""
        self._end(None)

    def _glance(self, message: pb.ProcessingRequest, kind: str | None) -> Finished | None:
        if kind == "response_headers":
            self._response.glance(message)
            ended = message.response_headers.end_of_stream
        else:
            ended = kind == "response_trailers"
        return self._end(self._response.finished(whole=True)) if ended else None

    def _on_local_reply(self, message: pb.ProcessingRequest) -> Abandoned:
        """The proxy answers the request itself (a timeout, a limit), or shows answers only."""
        if self.state is State.HEADERS:
            self._read_modes(message)
        self._request.drop()
        self.state = State.RESPONSE
        _HANDLERS[State.RESPONSE, message.WhichOneof("request") or ""](self, message)
        return ABANDONED

    def _on_response_headers(self, message: pb.ProcessingRequest) -> Event | None:
        conversation = self._request.conversation
        return self._pass(self._response.take_headers(message, conversation=conversation))

    def _on_response_body(self, message: pb.ProcessingRequest) -> Event | None:
        return self._pass(self._response.take_body(message))

    def _on_response_trailers(self, _: pb.ProcessingRequest) -> Event | None:
        return self._pass(self._response.take_trailers())

    def _pass(self, event: Seen) -> Event | None:
        """Nothing can follow an answered end of the answer, so the stream need not wait for it."""
        return self._end(event) if isinstance(event, Finished) else event

    def _end(self, event: Finished | None) -> Finished | None:
        self.state = State.DONE
        self.ended = True
        return event


_ANSWERED = frozenset({State.RESPONSE, State.DONE})

_HANDLERS: dict[
    tuple[State, str], Callable[[ExtProcStream, pb.ProcessingRequest], Event | None]
] = {
    (State.HEADERS, "request_headers"): ExtProcStream._on_headers,  # noqa: SLF001  # the table is the class's own
    (State.BODY, "request_body"): ExtProcStream._on_body,  # noqa: SLF001
    (State.BODY, "request_trailers"): ExtProcStream._on_trailers,  # noqa: SLF001
    (State.QUEUED, "request_body"): ExtProcStream._on_late_body,  # noqa: SLF001
    (State.QUEUED, "request_trailers"): ExtProcStream._on_late_trailers,  # noqa: SLF001
    (State.RESPONSE, "request_body"): ExtProcStream._on_late_body,  # noqa: SLF001
    (State.RESPONSE, "request_trailers"): ExtProcStream._on_late_trailers,  # noqa: SLF001
    (State.RESPONSE, "response_headers"): ExtProcStream._on_response_headers,  # noqa: SLF001
    (State.RESPONSE, "response_body"): ExtProcStream._on_response_body,  # noqa: SLF001
    (State.RESPONSE, "response_trailers"): ExtProcStream._on_response_trailers,  # noqa: SLF001
    (State.HEADERS, "response_headers"): ExtProcStream._on_local_reply,  # noqa: SLF001
    (State.HEADERS, "response_body"): ExtProcStream._on_local_reply,  # noqa: SLF001
    (State.HEADERS, "response_trailers"): ExtProcStream._on_local_reply,  # noqa: SLF001
    (State.BODY, "response_headers"): ExtProcStream._on_local_reply,  # noqa: SLF001
    (State.QUEUED, "response_headers"): ExtProcStream._on_local_reply,  # noqa: SLF001
}
