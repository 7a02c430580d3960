"""The request's half of an ext_proc stream: read what the proxy shows, and send it on its way.

The order of messages belongs in stream.py, the way of bodies in modes.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay_epp.codec import openai
from forebay_epp.codec.callers import SILENT, BadHeaderError
from forebay_epp.codec.extproc import framing, watching
from forebay_epp.codec.extproc.events import Arrived, BodyPart, Rejected
from forebay_epp.codec.extproc.modes import DUPLEX_REQUEST, RequestMode, request_mode
from forebay_epp.core.terms import Outcome

if TYPE_CHECKING:
    from collections import deque

    from forebay_epp.codec.callers import CallerHeaders
    from forebay_epp.codec.extproc.watching import Tie
    from forebay_extproc.v3 import external_processor_pb2 as pb

SUBSET_NAMESPACE = "envoy.lb.subset_hint"
SUBSET = "x-gateway-destination-endpoint-subset"

# A client that talks before its WebSocket is open is impatient; one that sends more is an attacker.
MAX_EARLY_BYTES = framing.MAX_CHUNK_BYTES

_READ_HEADERS = frozenset(
    (":method", ":path", "content-length", "content-type", "content-encoding", "upgrade")
)


class ProtocolError(Exception):
    """The peer breaks the protocol: the stream ends with this text."""


class RequestHalf:
    """What is known of a request.

    Args:
        outbox: where messages to the proxy go.
        max_body_bytes: larger bodies are rejected.
        default_model: the model that is meant where a request that could name one does not; None
            where there is none to mean, and the request is rejected if it must name one.
        headers: those that callers are trusted with.
        reads_prefix: whether the beginnings of prompts are named.

    Attributes:
        model: the name the client wrote; "" where none could be read.
        conversation: a WebSocket or CONNECT: what follows the headers passes as it comes.
        renamed: whether the body has another model name than the client's.
    """

    __slots__ = (
        "_asked_model",
        "_body",
        "_caller",
        "_chunks",
        "_content_type",
        "_default_model",
        "_headers",
        "_max_body_bytes",
        "_mode",
        "_model_field",
        "_outbox",
        "_path",
        "_prefix",
        "_reads_prefix",
        "_size_bytes",
        "_streamed",
        "_subset",
        "_trailers",
        "conversation",
        "model",
        "renamed",
    )

    def __init__(
        self,
        outbox: deque[bytes],
        max_body_bytes: int,
        default_model: str | None,
        headers: CallerHeaders,
        *,
        reads_prefix: bool,
    ) -> None:
        self._outbox = outbox
        self._max_body_bytes = max_body_bytes
        self._default_model = default_model
        self._headers = headers
        self._reads_prefix = reads_prefix
        self._prefix: tuple[int, ...] = ()
        self.model = ""
        self.conversation = False
        self.renamed = False
        self._mode: RequestMode = DUPLEX_REQUEST
        self._path = ""
        self._model_field = openai.ModelField.NONE
        self._asked_model: str | None = None
        self._content_type = ""
        self._caller = SILENT
        self._subset: frozenset[str] | None = None
        self._size_bytes = 0
        self._chunks: list[bytes] = []
        self._body: bytes | None = None
        self._trailers = False
        self._streamed = False

    def set_mode(self, number: int) -> None:
        """Expect the body in this mode of ext_proc.proto; without a call, in full duplex."""
        self._mode = request_mode(number)

    @property
    def duplex(self) -> bool:
        """Whether nothing more passes through the stream once the whole body has gone."""
        return self._mode.duplex

    @property
    def arms_timeout(self) -> bool:
        """Whether the proxy's message timeout runs while it waits for the decision."""
        return not self._mode.duplex

    # --- read

    def take_headers(self, message: pb.ProcessingRequest) -> Arrived | Rejected | None:
        """Read the headers, and reject at once what cannot be read as a whole."""
        self._read_subset(message)
        found: dict[str, str] = {}
        trusted = self._headers.names
        for header in message.request_headers.headers.headers:
            key = header.key
            if key in _READ_HEADERS or key in trusted:
                value = header.raw_value.decode("latin-1") or header.value
                # A header that comes twice is one list, so that neither can hide the other.
                found[key] = f"{found[key]}, {value}" if key in found else value
        method, self._path = found.get(":method", ""), found.get(":path", "")
        self._model_field = openai.model_field(method, self._path)
        self._asked_model = openai.asked_model(method, self._path)
        self._content_type = found.get("content-type", "")
        try:
            self._caller = self._headers.read(found)
        except BadHeaderError as error:
            return Rejected(Outcome.REJECTED_BAD_REQUEST, str(error))
        named = self._model_field is not openai.ModelField.NONE
        length = found.get("content-length", "")
        if length.isdecimal() and len(length) < 20 and int(length) > self._max_body_bytes:
            return self._too_large()
        encoding = found.get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity") and named:
            return Rejected(
                Outcome.REJECTED_UNSUPPORTED_ENCODING,
                f"content-encoding {encoding[:40]!r} is not supported: send the body uncompressed",
            )
        if message.request_headers.end_of_stream:
            return self._complete(None)
        # The header must not be a way around reading the model.
        if method == "CONNECT" or ("upgrade" in found and not named):
            self.conversation = True
            return self._arrived(None)
        early = message.protocol_config.send_body_without_waiting_for_header_response
        expected = self._mode.expect_body(self._outbox, early=early)
        return None if expected else self._arrived(None)

    def take_body(self, message: pb.ProcessingRequest) -> Arrived | BodyPart | Rejected:
        """Read a message of the body."""
        self._read_subset(message)
        body = message.request_body
        piece = body.body
        last = self._mode.take(body)
        self._size_bytes += len(piece)
        if self._size_bytes > self._max_body_bytes:
            return self._too_large()
        if piece:
            self._chunks.append(piece)
        return self._complete(self._join()) if last else BodyPart(len(piece))

    def take_trailers(self, message: pb.ProcessingRequest) -> Arrived | Rejected:
        """Trailers are the end of a body whose last message did not say so."""
        self._read_subset(message)
        self._trailers = True
        return self._complete(self._join())

    def take_late_body(self, body: pb.HttpBody, *, decided: bool) -> None:
        """Take a part of the body that comes after the request was complete without it.

        Raises:
            ProtocolError: there may be none in this mode, or too much of it before the decision.
        """
        if self.conversation and self._mode.duplex:
            self._converse(body, decided=decided)
        elif self._mode.take_late(self._outbox, decided=decided):
            self._size_bytes += len(body.body)
        else:
            raise ProtocolError("unexpected request_body after its end")

    def take_late_trailers(self, *, decided: bool) -> None:
        """Take trailers that come after the request was complete without them."""
        if decided:
            self._outbox.append(framing.CONTINUE_TRAILERS)
        else:
            self._trailers = True

    def drop(self) -> None:
        """Forget the body."""
        self._chunks.clear()
        self._body = None

    def _converse(self, body: pb.HttpBody, *, decided: bool) -> None:
        if decided:
            self._outbox.extend(
                framing.pieces(framing.REQUEST_BODY, body.body, end_of_stream=body.end_of_stream)
            )
            return
        self._size_bytes += len(body.body)
        self._chunks.append(body.body)
        if body.end_of_stream or self._size_bytes > MAX_EARLY_BYTES:
            raise ProtocolError("the client did not wait for the answer to its upgrade")

    def _join(self) -> bytes:
        chunks = self._chunks
        body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self._chunks = []
        return body

    def _complete(self, body: bytes | None) -> Arrived | Rejected:
        """Read the model of a request that is complete; `body` is None where it has none."""
        field = self._model_field
        if field is not openai.ModelField.NONE and not (body is None and not self._path):
            try:
                if self._mode.cut:
                    self.model = openai.read_cut_model(body or b"", self._content_type)
                else:
                    self.model, self._streamed = openai.read_asked(
                        body or b"",
                        self._content_type,
                        optional=field is openai.ModelField.OPTIONAL,
                        default=self._default_model,
                    )
            except openai.BadRequestError as error:
                return Rejected(Outcome.REJECTED_BAD_REQUEST, str(error), error.param)
            if self._reads_prefix and body:
                self._prefix = openai.read_prefix(body, self.model)
        return self._arrived(body)

    def _arrived(self, body: bytes | None) -> Arrived:
        self._body = body
        return Arrived(
            *(self.model, self._size_bytes, self._subset, self._caller, self._asked_model),
            *(self._prefix, self._streamed),
        )

    def _too_large(self) -> Rejected:
        return Rejected(
            Outcome.REJECTED_TOO_LARGE,
            f"the request body is larger than {self._max_body_bytes} bytes",
        )

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
        self._subset = frozenset(address.strip() for address in addresses if address.strip())

    # --- send

    def rename(self, model: str) -> Rejected | None:
        """Write another model name into the body, if it has one.

        Returns:
            Why that cannot be done.
        """
        if not self.model or self._body is None:
            return None
        if self._mode.cut:
            return Rejected(
                Outcome.REJECTED_TOO_LARGE,
                "the model's name cannot be replaced: the proxy shows only the beginning of a body "
                "of this size",
            )
        try:
            self._body = openai.with_model(self._body, model, self._content_type)
        except openai.BadRequestError as error:
            return Rejected(Outcome.REJECTED_BAD_REQUEST, str(error))
        self.renamed = True
        return None

    def route(self, endpoint: str, tie: Tie | None = None) -> None:
        """Send the request to `endpoint` (ip:port), and leave a tie for its answer."""
        body, self._body = self._body, None
        early, self._chunks = self._chunks, []
        length = len(body) if self.renamed and body is not None else None
        outbox = self._outbox
        first = len(outbox)
        self._mode.route(outbox, endpoint, body, length, end_of_stream=not self._trailers)
        if tie is not None:
            outbox[first] += watching.tied(tie)
        for piece in early:
            outbox.extend(framing.pieces(framing.REQUEST_BODY, piece, end_of_stream=False))
        if self._trailers:
            outbox.append(framing.CONTINUE_TRAILERS)
