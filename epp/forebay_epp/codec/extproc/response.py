"""The answer's half of an ext_proc stream: every message is answered at once.

Bodies pass byte for byte but for the client's model name, which is put back; the usage is read in
passing. The order of messages belongs in stream.py, the way of bodies in modes.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay_epp.codec import openai
from forebay_epp.codec.extproc import framing
from forebay_epp.codec.extproc.events import FIRST_CHUNK, HEADERS_ONLY, Finished, Progress
from forebay_epp.codec.extproc.modes import DUPLEX_RESPONSE, ResponseMode, response_mode

if TYPE_CHECKING:
    from collections import deque

    from forebay_epp.codec.extproc.events import Answer, HeadersOnly
    from forebay_extproc.v3 import external_processor_pb2 as pb

    Seen = Answer | None  # what a part of an answer tells

PROGRESS_TOKENS = 32  # after so many more, an answer's progress is reported


class ResponseHalf:
    """What is known of an answer.

    Attributes:
        status: of HTTP; 0 as long as no answer has been seen.
    """

    __slots__ = (
        *("_headers_only", "_mode", "_outbox", "_reader", "_report_at", "_restorer"),
        *("_unbegun_stream",),
        "status",
    )

    def __init__(self, outbox: deque[bytes]) -> None:
        self._outbox = outbox
        self.status = 0
        self._mode: ResponseMode = DUPLEX_RESPONSE
        self._unbegun_stream = False
        self._headers_only = False
        self._report_at = PROGRESS_TOKENS
        self._restorer: openai.ModelRestorer | None = None
        self._reader: openai.JSONUsageReader | openai.EventUsageReader | None = None

    def set_mode(self, number: int) -> None:
        """Expect the body in this mode of ext_proc.proto; without a call, in full duplex."""
        self._mode = response_mode(number)

    def restore(self, target_model: str, model: str) -> None:
        """Put the client's name of the model back where the answer has the target's."""
        self._restorer = openai.ModelRestorer(target_model, model)

    @property
    def echoes(self) -> bool:
        """Whether bodies go back as they come, so that `echo` does for them."""
        return self._mode.duplex and self._restorer is None

    def take_headers(
        self, message: pb.ProcessingRequest, *, conversation: bool
    ) -> Finished | HeadersOnly | None:
        """Read the headers; what follows those of a conversation is not an answer's body."""
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
        self._unbegun_stream = events
        if not encoded and not conversation:
            self._reader = openai.EventUsageReader() if events else openai.JSONUsageReader()
        else:
            self._restorer = None
        self._outbox.append(
            framing.UNSIZED_RESPONSE_HEADERS
            if self._restorer is not None
            else framing.CONTINUE_RESPONSE_HEADERS
        )
        if headers.end_of_stream:
            return self.finished(whole=True)
        if events and not self._mode.shown:
            self._headers_only = True
            return HEADERS_ONLY
        return None

    def echo(self, inner: bytes, body: bytes, end_of_stream: bool) -> Seen:  # noqa: FBT001  # unpacked from framing.read_streamed
        """Give a message's body back; the arguments are those of `framing.read_streamed`."""
        if len(body) <= framing.MAX_CHUNK_BYTES:
            self._outbox.append(framing.frame(framing.RESPONSE_BODY, len(inner)) + inner)
        else:
            self._outbox.extend(
                framing.pieces(framing.RESPONSE_BODY, body, end_of_stream=end_of_stream)
            )
        return self._progress(body, end_of_stream)

    def take_body(self, message: pb.ProcessingRequest) -> Seen:
        """Take a message of the body in any mode."""
        body = message.response_body.body
        end_of_stream = message.response_body.end_of_stream
        wanted = body
        if self._restorer is not None:
            wanted = self._restorer.feed(body, last=end_of_stream or self._mode.whole)
        self._mode.give_back(self._outbox, body, wanted, end_of_stream=end_of_stream)
        return self._progress(body, end_of_stream)

    def take_trailers(self) -> Finished:
        """Take the trailers, which end the answer."""
        if self._restorer is not None and self._mode.duplex:
            self._mode.give_back_held(self._outbox, self._restorer.feed(b"", last=True))
        self._outbox.append(framing.CONTINUE_RESPONSE_TRAILERS)
        return self.finished(whole=True)

    def glance(self, message: pb.ProcessingRequest) -> None:
        """Read the status of an answer that is only shown."""
        for header in message.response_headers.headers.headers:
            if header.key == ":status":
                value = header.raw_value or header.value.encode()
                self.status = int(value) if len(value) == 3 and value.isdigit() else 500
                return

    def finished(self, *, whole: bool = False, blind: bool = False) -> Finished:
        """Sum up the answer as far as it was seen."""
        usage = self._reader.usage() if self._reader else None
        return Finished(self.status, usage, whole, blind, self._headers_only and not whole)

    def _progress(self, body: bytes, end_of_stream: bool) -> Seen:  # noqa: FBT001  # once per token
        if self._reader is not None and body:
            self._reader.feed(body)
        if end_of_stream:
            return self.finished(whole=True)
        if body and self._unbegun_stream:
            self._unbegun_stream = False
            return FIRST_CHUNK
        if self._reader is not None and self._reader.tokens >= self._report_at:
            self._report_at = self._reader.tokens + PROGRESS_TOKENS
            return Progress(self._reader.tokens)
        return None
