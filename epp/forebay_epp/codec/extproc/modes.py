"""How a proxy sends bodies and takes them back: one class per body mode.

The source is ProcessingMode.BodySendMode of Envoy's ext_proc.proto (v3). A mode that is not known
is treated as FULL_DUPLEX_STREAMED for requests and as NONE for answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay_epp.codec.extproc import framing
from forebay_extproc.v3 import external_processor_pb2 as pb

if TYPE_CHECKING:
    from collections import deque


class RequestMode:
    """FULL_DUPLEX_STREAMED: the body is collected silently and goes out behind the headers.

    Attributes:
        duplex: whether pieces pass on their own, so that no message timeout of the proxy runs.
        cut: the rest of the body is on its way to the server and is never shown.
    """

    __slots__ = ()

    duplex = True
    cut = False

    def expect_body(self, outbox: deque[bytes], *, early: bool) -> bool:  # noqa: ARG002  # matters to some
        """Answer what the proxy waits for before it sends the body.

        Args:
            outbox: where messages go.
            early: the proxy says that it shows the body before the headers are answered.

        Returns:
            Whether it does. If not, the decision rides on the answer to the headers.
        """
        return True

    def take(self, body: pb.HttpBody) -> bool:
        """Take a message of the body; return whether it is the last one."""
        return body.end_of_stream

    def take_late(self, outbox: deque[bytes], *, decided: bool) -> bool:  # noqa: ARG002  # likewise
        """Take a message that comes after the request was complete; False where none may come."""
        return False

    def route(
        self,
        outbox: deque[bytes],
        endpoint: str,
        body: bytes | None,
        length: int | None,
        *,
        end_of_stream: bool,
    ) -> None:
        """Send the request to `endpoint`.

        Args:
            outbox: where messages go.
            endpoint: ip:port.
            body: what was read of it; None for none.
            length: of the body where it was changed, otherwise None.
            end_of_stream: whether the request ends with the body.
        """
        outbox.append(framing.routed_headers(endpoint, length))
        if body is not None:
            outbox.extend(framing.pieces(framing.REQUEST_BODY, body, end_of_stream=end_of_stream))


class BufferedRequest(RequestMode):
    """BUFFERED: headers are waved through, the decision rides on the answer to the body."""

    __slots__ = ("_waved",)

    duplex = False

    def __init__(self) -> None:
        self._waved = False

    def expect_body(self, outbox: deque[bytes], *, early: bool) -> bool:  # noqa: ARG002  # it waits
        """Wave the headers through; the body comes then."""
        self._waved = True
        outbox.append(framing.CONTINUE_HEADERS)
        return True

    def take(self, body: pb.HttpBody) -> bool:  # noqa: ARG002  # there is one only
        """Take the message that is the body."""
        return True

    def route(
        self,
        outbox: deque[bytes],
        endpoint: str,
        body: bytes | None,
        length: int | None,
        *,
        end_of_stream: bool,
    ) -> None:
        """Decide on the body, or on the headers where there is none."""
        if self._waved:
            changed = body if length is not None else None
            outbox.append(framing.routed_body(endpoint, changed))
        else:
            super().route(outbox, endpoint, None, length, end_of_stream=end_of_stream)


class PartlyBufferedRequest(BufferedRequest):
    """BUFFERED_PARTIAL: the same, with the beginning of a body that is too long for the proxy."""

    __slots__ = ("cut",)

    def __init__(self) -> None:
        super().__init__()
        self.cut = False

    def take(self, body: pb.HttpBody) -> bool:
        """Take the message that is the body, or its beginning."""
        self.cut = not body.end_of_stream
        return True


class StreamedRequest(RequestMode):
    """STREAMED: each message of the body is answered by one.

    The proxy sends headers on before it shows the body, unless it says otherwise, so the decision
    rides on the answer to the headers and the request is classified without its model.
    """

    __slots__ = ("_owed",)

    duplex = False

    def __init__(self) -> None:
        self._owed = 0

    def expect_body(self, outbox: deque[bytes], *, early: bool) -> bool:  # noqa: ARG002  # nothing
        """Return whether the proxy sends it early."""
        return early

    def take(self, body: pb.HttpBody) -> bool:
        """Take a message, and owe the answer to it."""
        self._owed += 1
        return body.end_of_stream

    def take_late(self, outbox: deque[bytes], *, decided: bool) -> bool:
        """Before the decision the answer is owed; behind it the message passes as it is."""
        if decided:
            outbox.append(framing.CONTINUE_BODY)
        else:
            self._owed += 1
        return True

    def route(
        self,
        outbox: deque[bytes],
        endpoint: str,
        body: bytes | None,
        length: int | None,
        *,
        end_of_stream: bool,  # noqa: ARG002  # the proxy knows
    ) -> None:
        """Answer what has come so far; a changed body replaces the first message's."""
        outbox.append(framing.routed_headers(endpoint, length))
        for number in range(self._owed):
            if length is None or body is None:
                outbox.append(framing.CONTINUE_BODY)
            else:
                outbox.append(framing.CLEAR_BODY if number else framing.replaced_body(body))
        self._owed = 0


class UnshownRequest(RequestMode):
    """NONE: the proxy shows no body."""

    __slots__ = ()

    duplex = False

    def expect_body(self, outbox: deque[bytes], *, early: bool) -> bool:  # noqa: ARG002  # nothing
        """Return False: no body comes."""
        return False


class ResponseMode:
    """STREAMED: each message of an answer's body is answered by one.

    Attributes:
        shown: whether the body comes at all.
        whole: whether the body comes in one message.
        duplex: whether the proxy takes back what it is given, in pieces of any number.
    """

    __slots__ = ()

    shown = True
    whole = False
    duplex = False

    def give_back(
        self,
        outbox: deque[bytes],
        shown: bytes,
        wanted: bytes,
        *,
        end_of_stream: bool,  # noqa: ARG002  # the proxy knows
    ) -> None:
        """Answer a message whose body is `shown`; the client is to get `wanted`."""
        outbox.append(
            framing.CONTINUE_RESPONSE_BODY
            if wanted == shown
            else framing.replaced_response_body(wanted)
        )

    def give_back_held(self, outbox: deque[bytes], held: bytes) -> None:
        """Send what was held back before trailers."""


class UnshownResponse(ResponseMode):
    """NONE: the proxy shows no body."""

    __slots__ = ()

    shown = False


class BufferedResponse(ResponseMode):
    """BUFFERED, BUFFERED_PARTIAL: the body comes in one message, whole or its beginning."""

    __slots__ = ()

    whole = True


class DuplexResponse(ResponseMode):
    """FULL_DUPLEX_STREAMED: nothing reaches the client but what is given back."""

    __slots__ = ()

    duplex = True

    def give_back(
        self, outbox: deque[bytes], shown: bytes, wanted: bytes, *, end_of_stream: bool
    ) -> None:
        """Send what the client is to get, if it is anything yet."""
        if wanted or end_of_stream or not shown:
            pieces = framing.pieces(framing.RESPONSE_BODY, wanted, end_of_stream=end_of_stream)
            outbox.extend(pieces)

    def give_back_held(self, outbox: deque[bytes], held: bytes) -> None:
        """Send it."""
        if held:
            outbox.extend(framing.pieces(framing.RESPONSE_BODY, held, end_of_stream=False))


_REQUEST_MODES: dict[int, type[RequestMode]] = {
    pb.NONE: UnshownRequest,
    pb.STREAMED: StreamedRequest,
    pb.BUFFERED: BufferedRequest,
    pb.BUFFERED_PARTIAL: PartlyBufferedRequest,
}
DUPLEX_REQUEST = RequestMode()
DUPLEX_RESPONSE = DuplexResponse()
_UNSHOWN_RESPONSE = UnshownResponse()
_RESPONSE_MODES: dict[int, ResponseMode] = {
    pb.STREAMED: ResponseMode(),
    pb.BUFFERED: BufferedResponse(),
    pb.BUFFERED_PARTIAL: BufferedResponse(),
    pb.FULL_DUPLEX_STREAMED: DUPLEX_RESPONSE,
}


def request_mode(number: int) -> RequestMode:
    """Return the object for one stream whose request travels in this mode."""
    mode = _REQUEST_MODES.get(number)
    return DUPLEX_REQUEST if mode is None else mode()


def response_mode(number: int) -> ResponseMode:
    """Return the object for all streams whose answer travels in this mode."""
    return _RESPONSE_MODES.get(number, _UNSHOWN_RESPONSE)
