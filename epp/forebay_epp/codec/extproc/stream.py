"""One ext_proc stream as a state machine: bytes in, bytes and events out.

Rule 1: all knowledge of Envoy's external processing protocol is here; nothing here knows grpc,
time or queues. Rule 2: once a request has been seen, the stream ends only after an answer to it,
because a proxy that sees a clean end without one forwards the request unexamined.

    HEADERS ──> BODY ──> QUEUED ──> RESPONSE ──> DONE
       └──────────┴─────────┴─ refuse, answer ────^

HEADERS: nothing seen. BODY: reading the request. QUEUED: the request is the flow controller's.
RESPONSE: dispatched, every message is answered at once. DONE: nothing more is expected.

How a request and its answer travel depends on the proxy's body modes, given in the first message:

* FULL_DUPLEX_STREAMED: the body is collected silently, then headers and body go out together.
* BUFFERED: headers are waved through, the decision rides on the answer to the body.
* STREAMED: the proxy sends headers on before it shows the body, unless it says otherwise, so the
  decision rides on the answer to the headers and the request is classified without its model.

A WebSocket or CONNECT is decided on its headers in every mode: what follows them is a conversation,
and passes in both directions as it comes. A stream that shows an answer before its request was
decided, or an answer only, is one of the proxy's own: it passes, too.

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
from forebay_epp.core.terms import Outcome
from forebay_extproc.v3 import external_processor_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable

SUBSET_NAMESPACE = "envoy.lb.subset_hint"
SUBSET = "x-gateway-destination-endpoint-subset"
OUTCOME = "x-forebay-outcome"

# A client that talks before its WebSocket is open is impatient; one that sends more is an attacker.
MAX_EARLY_BYTES = framing.MAX_CHUNK_BYTES

OBJECTIVE = "x-gateway-inference-objective"
MAX_OBJECTIVE_CHARACTERS = 253  # the name of a Kubernetes object

_READ_HEADERS = frozenset(
    {
        *(":method", ":path", "content-length", "content-type", "content-encoding", "upgrade"),
        OBJECTIVE,
    }
)


class State(Enum):
    """Where a stream stands; see the module's picture."""

    HEADERS = auto()
    BODY = auto()
    QUEUED = auto()
    RESPONSE = auto()
    DONE = auto()


class Event(Enum):
    """What a message means for flow control."""

    ARRIVED = auto()
    """The request is complete: `model`, `size_bytes`, `subset`, `objective` are set; submit it.

    Or answer it, where `asked_model` says that the client asks which models there are.
    """

    REFUSED = auto()
    """The request was refused by the codec itself, as `refusal` says; it was never submitted."""

    ABANDONED = auto()
    """The request needs no decision any more; cancel it if it was submitted."""

    FIRST_CHUNK = auto()
    """The answer has begun."""

    FINISHED = auto()
    """The answer has ended: `status` and `usage` are set; its slot is free."""

    FINISHED_BLIND = auto()
    """The proxy shows nothing of the answer: its end is unknown."""


class ExtProcStream:
    """The protocol state of one HTTP request.

    Bytes to send collect in `outbox`; once `ended` is set and the outbox is sent, the stream is to
    be closed, with status OK, or with INVALID_ARGUMENT and `failure` as its text if that is set.

    Args:
        max_body_bytes: larger request bodies are refused.
        default_model: the model that is meant where a request that could name one does not; None
            where there is none to mean, and the request is refused if it must name one.
    """

    __slots__ = (
        "_answered_headers",
        "_begun",
        "_body",
        "_chunks",
        "_content_type",
        "_conversation",
        "_cut",
        "_default_model",
        "_duplex",
        "_half_closed",
        "_max_body_bytes",
        "_model_field",
        "_owed_bodies",
        "_path",
        "_reader",
        "_request_mode",
        "_response_mode",
        "_restorer",
        "_trailers",
        "answered",
        "asked_model",
        "ended",
        "failure",
        "model",
        "objective",
        "outbox",
        "refusal",
        "size_bytes",
        "state",
        "status",
        "subset",
    )

    def __init__(self, max_body_bytes: int, default_model: str | None = None) -> None:
        self._max_body_bytes = max_body_bytes
        self._default_model = default_model
        self.state = State.HEADERS
        self.outbox: deque[bytes] = deque()
        self.ended = False
        self.failure: str | None = None
        self.model = ""
        self.size_bytes = 0
        self.subset: frozenset[str] | None = None
        self.objective = ""
        self.refusal: Outcome | None = None
        self.asked_model: str | None = None
        self.status = 0
        self.answered = False
        self._path = ""
        self._model_field = openai.ModelField.NONE
        self._content_type = ""
        self._conversation = False
        self._cut = False
        self._chunks: list[bytes] = []
        self._body: bytes | None = None
        self._request_mode: int = pb.FULL_DUPLEX_STREAMED
        self._response_mode: int = pb.FULL_DUPLEX_STREAMED
        self._duplex = False
        self._answered_headers = False
        self._begun = False
        self._owed_bodies = 0
        self._trailers = False
        self._half_closed = False
        self._restorer: openai.ModelRestorer | None = None
        self._reader: openai.JSONUsageReader | openai.EventUsageReader | None = None

    @property
    def lockstep(self) -> bool:
        """Whether nothing will be sent before the next message has come."""
        return self.state is State.RESPONSE

    def usage(self) -> openai.Usage | None:
        """Return the usage of the answer so far, or None where it cannot be read."""
        return self._reader.usage() if self._reader else None

    # --- what the proxy says

    def receive(self, data: bytes) -> Event | None:
        """Take one message from the proxy; whatever it contains, nothing is raised.

        What comes after the end of the stream has crossed it on the wire and means nothing.
        """
        if self.ended:
            return None
        if self._duplex and data and data[0] == framing.IN_RESPONSE_BODY:
            try:
                streamed = framing.read_streamed(data)
            except IndexError:
                streamed = None
            if streamed is not None:
                return self._echo(*streamed)
        try:
            message = pb.ProcessingRequest.FromString(data)
        except DecodeError:
            return self.fail("not a ProcessingRequest")
        kind = message.WhichOneof("request")
        handler = _HANDLERS.get((self.state, kind or ""))
        if handler is None:
            return self._unexpected(kind)
        return handler(self, message)

    def half_close(self) -> Event | None:
        """The proxy will send nothing more.

        One that never shows the answer does so right behind the body, and still reads. While an
        answer streams it is how Envoy reports that the client has gone.
        """
        self._half_closed = True
        match self.state:
            case State.HEADERS:
                self.ended = True
                self.state = State.DONE
            case State.BODY:
                return self._refuse(
                    Outcome.REJECTED_BAD_REQUEST, "the request ended before its body did"
                )
            case State.RESPONSE:
                blind = not self.status
                self.state = State.DONE
                self.ended = True
                return Event.FINISHED_BLIND if blind else Event.FINISHED
            case State.DONE:
                self.ended = True
            case State.QUEUED:
                pass
        return None

    def reset(self) -> Event | None:
        """The stream is gone; nothing can be sent any more."""
        state, self.state = self.state, State.DONE
        self.ended = True
        self.outbox.clear()
        self._chunks.clear()
        self._body = None
        if state is State.QUEUED:
            return Event.ABANDONED
        if state is State.RESPONSE:
            return Event.FINISHED
        return None

    # --- what flow control says

    def dispatch(self, endpoint: str, target_model: str | None) -> Event | None:
        """Send the queued request to `endpoint`, under another model name if one is given.

        Returns:
            FINISHED_BLIND where the proxy has already stopped sending; FINISHED where the body
            cannot be rewritten, so that the client is refused and nothing is sent.
        """
        body = self._body
        self._body = None
        if target_model is not None and self.model and body is not None:
            if self._cut:
                self.refuse(
                    Outcome.REJECTED_TOO_LARGE,
                    "the model's name cannot be replaced: the proxy shows only the beginning of "
                    "a body of this size",
                )
                return Event.FINISHED
            try:
                body = openai.with_model(body, target_model, self._content_type)
            except openai.BadRequestError as error:
                self.refuse(Outcome.REJECTED_BAD_REQUEST, str(error))
                return Event.FINISHED
            self._restorer = openai.ModelRestorer(target_model, self.model)
            length: int | None = len(body)
        else:
            length = None
        early, self._chunks = self._chunks, []
        if self._request_mode in _BUFFERED_MODES and self._answered_headers:
            self._send_buffered(endpoint, body, length)
        else:
            self.outbox.append(framing.routed_headers(endpoint, length))
            if self._request_mode == pb.STREAMED:
                self._send_owed_bodies(body if length is not None else None)
            elif body is not None:
                self._send_pieces(framing.REQUEST_BODY, body, end_of_stream=not self._trailers)
            for piece in early:
                self._send_pieces(framing.REQUEST_BODY, piece, end_of_stream=False)
        if self._trailers:
            self.outbox.append(framing.CONTINUE_TRAILERS)
        self.state = State.RESPONSE
        self._duplex = self._response_mode == pb.FULL_DUPLEX_STREAMED and self._restorer is None
        if self._half_closed:
            self.state = State.DONE
            self.ended = True
            return Event.FINISHED_BLIND
        return None

    def refuse(
        self,
        outcome: Outcome,
        message: str,
        retry_after_seconds: int | None = None,
        param: str | None = None,
    ) -> None:
        """Answer the request with an error and end the stream."""
        self.refusal = outcome
        headers = {}
        if retry_after_seconds is not None:
            headers["retry-after"] = str(retry_after_seconds)
        body = openai.error_body(outcome, message, param)
        self._answer(openai.HTTP_STATUS[outcome], outcome, body, headers)

    def answer(self, body: bytes) -> None:
        """Answer the request with this JSON and end the stream."""
        self._answer(200, Outcome.ANSWERED, body, {})

    def _answer(self, status: int, outcome: Outcome, body: bytes, more: dict[str, str]) -> None:
        self.state = State.DONE
        self.ended = True
        self._chunks.clear()
        self._body = None
        response = pb.ProcessingResponse()
        immediate = response.immediate_response
        immediate.status.code = status
        headers = {"content-type": "application/json", OUTCOME: str(outcome), **more}
        immediate.headers.set_headers.extend(
            framing.header(key, value) for key, value in headers.items()
        )
        immediate.body = body
        immediate.details = f"forebay_{outcome}"
        self.outbox.append(response.SerializeToString())

    def extend_timeout(self, seconds: float) -> None:
        """Ask the proxy for patience while the request waits.

        Only proxies whose message timeout runs meanwhile are asked; those in full duplex do not
        arm it.
        """
        if self._request_mode != pb.FULL_DUPLEX_STREAMED and self.state is State.QUEUED:
            response = pb.ProcessingResponse()
            response.override_message_timeout.FromMilliseconds(int(seconds * 1000))
            self.outbox.append(response.SerializeToString())

    # --- request

    def _on_headers(self, message: pb.ProcessingRequest) -> Event | None:
        self._read_modes(message)
        shows_body_first = message.protocol_config.send_body_without_waiting_for_header_response
        self._read_subset(message)
        self._chunks = []
        found: dict[str, str] = {}
        for header in message.request_headers.headers.headers:
            key = header.key
            if key in _READ_HEADERS:
                value = header.raw_value.decode("latin-1") or header.value
                # A header that comes twice is one list, so that neither can hide the other.
                found[key] = f"{found[key]}, {value}" if key in found else value
        method, self._path = found.get(":method", ""), found.get(":path", "")
        self._model_field = openai.model_field(method, self._path)
        self.asked_model = openai.asked_model(method, self._path)
        self._content_type = found.get("content-type", "")
        self.objective = found.get(OBJECTIVE, "")[:MAX_OBJECTIVE_CHARACTERS]
        self.state = State.BODY
        length = found.get("content-length", "")
        if length.isdecimal() and len(length) < 20 and int(length) > self._max_body_bytes:
            return self._too_large()
        encoding = found.get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity") and self._model_field is not openai.ModelField.NONE:
            return self._refuse(
                Outcome.REJECTED_UNSUPPORTED_ENCODING,
                f"content-encoding {encoding[:40]!r} is not supported: send the body uncompressed",
            )
        if message.request_headers.end_of_stream:
            return self._arrive(None)
        # The header must not be a way around reading the model.
        named = self._model_field is not openai.ModelField.NONE
        if method == "CONNECT" or ("upgrade" in found and not named):
            self._conversation = True
            return self._queue(None)
        if self._request_mode == pb.NONE or (
            self._request_mode == pb.STREAMED and not shows_body_first
        ):
            return self._queue(None)
        if self._request_mode in _BUFFERED_MODES:
            self._answered_headers = True
            self.outbox.append(framing.CONTINUE_HEADERS)
        return None

    def _read_modes(self, message: pb.ProcessingRequest) -> None:
        """The stream's first message says how the proxy sends bodies; older proxies do not say."""
        if message.HasField("protocol_config"):
            self._request_mode = message.protocol_config.request_body_mode
            self._response_mode = message.protocol_config.response_body_mode

    def _on_body(self, message: pb.ProcessingRequest) -> Event | None:
        self._read_subset(message)
        body = message.request_body
        if self._request_mode == pb.STREAMED:
            self._owed_bodies += 1
        self.size_bytes += len(body.body)
        if self.size_bytes > self._max_body_bytes:
            return self._too_large()
        if body.body:
            self._chunks.append(body.body)
        if body.end_of_stream or self._request_mode in _BUFFERED_MODES:
            # The rest is on its way to the server and is never shown.
            self._cut = self._request_mode == pb.BUFFERED_PARTIAL and not body.end_of_stream
            return self._arrive(self._join())
        return None

    def _on_trailers(self, message: pb.ProcessingRequest) -> Event | None:
        """Trailers are the end of a body whose last message did not say so."""
        self._read_subset(message)
        self._trailers = True
        return self._arrive(self._join())

    def _join(self) -> bytes:
        chunks = self._chunks
        body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self._chunks = []
        return body

    def _arrive(self, body: bytes | None) -> Event | None:
        """The request is complete; `body` is None where it has none."""
        field = self._model_field
        if field is not openai.ModelField.NONE and not (body is None and not self._path):
            try:
                if self._cut:
                    self.model = openai.read_cut_model(body or b"", self._content_type)
                else:
                    self.model = openai.read_model(
                        body or b"",
                        self._content_type,
                        optional=field is openai.ModelField.OPTIONAL,
                        default=self._default_model,
                    )
            except openai.BadRequestError as error:
                return self._refuse(Outcome.REJECTED_BAD_REQUEST, str(error), error.param)
        return self._queue(body)

    def _queue(self, body: bytes | None) -> Event:
        self._body = body
        self.state = State.QUEUED
        return Event.ARRIVED

    def _read_subset(self, message: pb.ProcessingRequest) -> None:
        """Take the proxy's subset hint from whichever message of the request carries it."""
        namespaces = message.metadata_context.filter_metadata
        if SUBSET_NAMESPACE not in namespaces:
            return
        fields = namespaces[SUBSET_NAMESPACE].fields
        if SUBSET not in fields:
            return
        value = fields[SUBSET]
        if value.WhichOneof("kind") == "list_value":
            addresses = [item.string_value for item in value.list_value.values]
        else:
            addresses = value.string_value.split(",")
        self.subset = frozenset(address.strip() for address in addresses if address.strip())

    def _send_buffered(self, endpoint: str, body: bytes | None, length: int | None) -> None:
        message = pb.ProcessingResponse()
        response = message.request_body.response
        framing.route(response, message, endpoint, length)
        if length is not None and body is not None:
            response.body_mutation.body = body
        self.outbox.append(message.SerializeToString())

    def _send_pieces(self, tag: bytes, body: bytes, *, end_of_stream: bool) -> None:
        pieces = framing.split(body)
        last = len(pieces) - 1
        for number, piece in enumerate(pieces):
            end = end_of_stream and number == last
            self.outbox.append(framing.streamed(tag, piece, end_of_stream=end))

    def _send_owed_bodies(self, changed: bytes | None) -> None:
        """Answer body messages that came before the decision; a changed body replaces the first."""
        for number in range(self._owed_bodies):
            if changed is None:
                self.outbox.append(framing.CONTINUE_BODY)
            elif number:
                self.outbox.append(framing.CLEAR_BODY)
            else:
                message = pb.ProcessingResponse()
                message.request_body.response.body_mutation.body = changed
                self.outbox.append(message.SerializeToString())
        self._owed_bodies = 0

    def _on_late_body(self, message: pb.ProcessingRequest) -> Event | None:
        """More body behind a decision on the headers alone: it passes as it is.

        Before the decision the answer is owed. A proxy in another mode sends none but in a
        conversation.
        """
        body = message.request_body
        if self._conversation and self._request_mode == pb.FULL_DUPLEX_STREAMED:
            return self._converse(body.body, end_of_stream=body.end_of_stream)
        if self._request_mode != pb.STREAMED:
            return self._unexpected("request_body after its end")
        self.size_bytes += len(body.body)
        if self.state is State.QUEUED:
            self._owed_bodies += 1
        else:
            self.outbox.append(framing.CONTINUE_BODY)
        return None

    def _converse(self, body: bytes, *, end_of_stream: bool) -> Event | None:
        if self.state is not State.QUEUED:
            self._send_pieces(framing.REQUEST_BODY, body, end_of_stream=end_of_stream)
            return None
        self.size_bytes += len(body)
        self._chunks.append(body)
        if end_of_stream or self.size_bytes > MAX_EARLY_BYTES:
            return self.fail("the client did not wait for the answer to its upgrade")
        return None

    def _on_late_trailers(self, _: pb.ProcessingRequest) -> Event | None:
        """Trailers behind a request that was complete without them."""
        if self.state is State.QUEUED:
            self._trailers = True
        else:
            self.outbox.append(framing.CONTINUE_TRAILERS)
        return None

    # --- response

    def _on_response_headers(self, message: pb.ProcessingRequest) -> Event | None:
        headers = message.response_headers
        events = encoded = False
        for header in headers.headers.headers:
            value = header.raw_value or header.value.encode()
            match header.key:
                case ":status":
                    self.status = int(value) if len(value) == 3 and value.isdigit() else 500
                case "content-type":
                    events = b"text/event-stream" in value
                case "content-encoding":
                    encoded = value not in (b"", b"identity")
        self.status = self.status or 200
        if not encoded and not self._conversation:
            self._reader = openai.EventUsageReader() if events else openai.JSONUsageReader()
        else:
            self._restorer = None
        self.outbox.append(
            framing.UNSIZED_RESPONSE_HEADERS
            if self._restorer is not None
            else framing.CONTINUE_RESPONSE_HEADERS
        )
        return self._finish() if headers.end_of_stream else None

    def _on_local_reply(self, message: pb.ProcessingRequest) -> Event | None:
        """The proxy answers the request itself (a timeout, a limit of its own): let it.

        Or it shows answers only; then this is all there is.
        """
        if self.state is State.HEADERS:
            self._read_modes(message)
        self._chunks = []
        self._body = None
        self.state = State.RESPONSE
        _HANDLERS[State.RESPONSE, message.WhichOneof("request") or ""](self, message)
        return Event.ABANDONED

    def _echo(self, inner: bytes, body: bytes, end_of_stream: bool) -> Event | None:  # noqa: FBT001  # unpacked from framing.read_streamed
        if len(body) <= framing.MAX_CHUNK_BYTES:
            self.outbox.append(framing.frame(framing.RESPONSE_BODY, len(inner)) + inner)
        else:
            self._send_pieces(framing.RESPONSE_BODY, body, end_of_stream=end_of_stream)
        return self._progress(body, end_of_stream=end_of_stream)

    def _on_response_body(self, message: pb.ProcessingRequest) -> Event | None:
        body = message.response_body.body
        end_of_stream = message.response_body.end_of_stream
        answer = body
        if self._restorer is not None:
            last = end_of_stream or self._response_mode in _BUFFERED_MODES
            answer = self._restorer.feed(body, last=last)
        if self._response_mode == pb.FULL_DUPLEX_STREAMED:
            if answer or end_of_stream or not body:
                self._send_pieces(framing.RESPONSE_BODY, answer, end_of_stream=end_of_stream)
        elif answer == body:
            self.outbox.append(framing.CONTINUE_RESPONSE_BODY)
        else:
            response = pb.ProcessingResponse()
            mutation = response.response_body.response.body_mutation
            if answer:
                mutation.body = answer
            else:
                mutation.clear_body = True
            self.outbox.append(response.SerializeToString())
        return self._progress(body, end_of_stream=end_of_stream)

    def _progress(self, body: bytes, *, end_of_stream: bool) -> Event | None:
        if self._reader is not None and body:
            self._reader.feed(body)
        if end_of_stream:
            return self._finish()
        if body and not self._begun:
            self._begun = True
            return Event.FIRST_CHUNK
        return None

    def _on_response_trailers(self, _: pb.ProcessingRequest) -> Event | None:
        if self._restorer is not None and self._response_mode == pb.FULL_DUPLEX_STREAMED:
            held = self._restorer.feed(b"", last=True)
            if held:
                self._send_pieces(framing.RESPONSE_BODY, held, end_of_stream=False)
        self.outbox.append(framing.CONTINUE_RESPONSE_TRAILERS)
        return self._finish()

    def _finish(self) -> Event | None:
        """Nothing can follow an answered end of the answer, so the stream need not wait for it."""
        self.answered = True
        self.state = State.DONE
        self.ended = True
        return Event.FINISHED

    # --- what should not happen

    def _too_large(self) -> Event:
        return self._refuse(
            Outcome.REJECTED_TOO_LARGE,
            f"the request body is larger than {self._max_body_bytes} bytes",
        )

    def _refuse(self, outcome: Outcome, message: str, param: str | None = None) -> Event:
        self.refuse(outcome, message, param=param)
        return Event.REFUSED

    def _unexpected(self, kind: str | None) -> Event | None:
        return self.fail(f"unexpected {kind or 'empty message'} in state {self.state.name}")

    def fail(self, failure: str) -> Event | None:
        """End the stream with an error, which a proxy that fails closed turns into a 500."""
        if self.ended:
            return None
        event = self.reset()
        self.failure = failure
        return event


_BUFFERED_MODES = frozenset({int(pb.BUFFERED), int(pb.BUFFERED_PARTIAL)})

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
