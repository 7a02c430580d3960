"""The messages of an ext_proc stream as bytes: those that never change, and those per token.

Most are protobuf's work, done once. Pieces of bodies are read and written by hand, because one
comes per token; tests compare them with protobuf's. Which message is due when belongs in stream.py.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from forebay_extproc.v3 import external_processor_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MAX_CHUNK_BYTES = 62_000
DESTINATION = "x-gateway-destination-endpoint"
LB_NAMESPACE = "envoy.lb"

# Tags of the messages that are written by hand: field number << 3 | 2 (length-delimited).
REQUEST_BODY = b"\x1a"
RESPONSE_BODY = b"\x22"
IN_RESPONSE_BODY = 0x2A
IN_REQUEST_HEADERS = b"\x12"
_BODY_FIELD = 0x0A
_END_OF_STREAM = b"\x10\x01"
_SHORT_VARINT = 0x80
_LENGTH_BYTES = 5  # a message of protobuf has at most 2 GiB


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= _SHORT_VARINT:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number: int, value: bytes) -> bytes:
    """Write a field of protobuf that is a string or a message; its number is at most 15."""
    return bytes((number << 3 | 2,)) + _varint(len(value)) + value


@lru_cache(maxsize=4096)
def frame(tag: bytes, size: int) -> bytes:
    """Header of a BodyResponse whose StreamedBodyResponse has `size` bytes.

    ProcessingResponse{tag: BodyResponse{1: CommonResponse{3: BodyMutation{3: ...}}}}
    """
    header = b"\x1a" + _varint(size)
    for outer in (b"\x1a", b"\x0a", tag):
        header = outer + _varint(size + len(header)) + header
    return header


def streamed(tag: bytes, body: bytes, *, end_of_stream: bool) -> bytes:
    """A streamed piece of body, serialised as protobuf does it but three times faster."""
    inner = b"\x0a" + _varint(len(body)) + body if body else b""
    if end_of_stream:
        inner += _END_OF_STREAM
    return frame(tag, len(inner)) + inner


def split(body: bytes, size_bytes: int = MAX_CHUNK_BYTES) -> Sequence[bytes]:
    """Cut a body into pieces of at most `size_bytes`; an empty body is one empty piece."""
    if len(body) <= size_bytes:
        return (body,)
    return [body[start : start + size_bytes] for start in range(0, len(body), size_bytes)]


def pieces(tag: bytes, body: bytes, *, end_of_stream: bool) -> Sequence[bytes]:
    """Cut a body into messages, the last of which says whether the stream ends."""
    if len(body) <= MAX_CHUNK_BYTES:
        return (streamed(tag, body, end_of_stream=end_of_stream),)
    *parts, last = split(body)
    messages = [streamed(tag, part, end_of_stream=False) for part in parts]
    return [*messages, streamed(tag, last, end_of_stream=end_of_stream)]


def header(key: str, value: str) -> pb.HeaderValueOption:
    """Return a header to set; an existing one is overwritten."""
    # Always raw_value: Envoy sets an empty header when only `value` is filled.
    return pb.HeaderValueOption(header=pb.HeaderValue(key=key, raw_value=value.encode()))


def route(
    response: pb.CommonResponse, message: pb.ProcessingResponse, endpoint: str, length: int | None
) -> None:
    """Write the destination, equal in header and metadata, and the length of a changed body.

    The answer to a changed body is changed, too, which takes one that is not compressed.
    """
    response.clear_route_cache = True
    headers = response.header_mutation.set_headers
    headers.append(header(DESTINATION, endpoint))
    if length is not None:
        headers.append(header("content-length", str(length)))
        response.header_mutation.remove_headers.append("accept-encoding")
    metadata = message.dynamic_metadata.get_or_create_struct(LB_NAMESPACE)
    metadata[DESTINATION] = endpoint


@lru_cache(maxsize=1024)
def routed_headers(endpoint: str, length: int | None) -> bytes:
    """Return the answer to request headers that sends the request to `endpoint`."""
    message = pb.ProcessingResponse()
    route(message.request_headers.response, message, endpoint, length)
    return message.SerializeToString()


def routed_body(endpoint: str, changed: bytes | None) -> bytes:
    """Return the answer to a whole body that sends the request to `endpoint`.

    The body is replaced where `changed` is not None.
    """
    message = pb.ProcessingResponse()
    response = message.request_body.response
    route(response, message, endpoint, None if changed is None else len(changed))
    if changed is not None:
        response.body_mutation.body = changed
    return message.SerializeToString()


def replaced_body(body: bytes) -> bytes:
    """Return the answer to a message of a request's body that puts another in its place."""
    message = pb.ProcessingResponse()
    message.request_body.response.body_mutation.body = body
    return message.SerializeToString()


def replaced_response_body(body: bytes) -> bytes:
    """Return the answer to a message of an answer's body that puts another in its place."""
    message = pb.ProcessingResponse()
    mutation = message.response_body.response.body_mutation
    if body:
        mutation.body = body
    else:
        mutation.clear_body = True
    return message.SerializeToString()


def immediate(status: int, body: bytes, headers: Mapping[str, str], details: str) -> bytes:
    """Return the message that answers the client in the server's place."""
    message = pb.ProcessingResponse()
    response = message.immediate_response
    response.status.code = status
    response.headers.set_headers.extend(header(key, value) for key, value in headers.items())
    response.body = body
    response.details = details
    return message.SerializeToString()


def patience(seconds: float) -> bytes:
    """Return the message that asks the proxy to wait for so long."""
    message = pb.ProcessingResponse()
    message.override_message_timeout.FromMilliseconds(int(seconds * 1000))
    return message.SerializeToString()


CONTINUE_HEADERS = pb.ProcessingResponse(request_headers=pb.HeadersResponse()).SerializeToString()
CONTINUE_BODY = pb.ProcessingResponse(request_body=pb.BodyResponse()).SerializeToString()
CLEAR_BODY = pb.ProcessingResponse(
    request_body=pb.BodyResponse(
        response=pb.CommonResponse(body_mutation=pb.BodyMutation(clear_body=True))
    )
).SerializeToString()
CONTINUE_TRAILERS = pb.ProcessingResponse(
    request_trailers=pb.TrailersResponse()
).SerializeToString()
CONTINUE_RESPONSE_HEADERS = pb.ProcessingResponse(
    response_headers=pb.HeadersResponse()
).SerializeToString()
UNSIZED_RESPONSE_HEADERS = pb.ProcessingResponse(
    response_headers=pb.HeadersResponse(
        response=pb.CommonResponse(
            header_mutation=pb.HeaderMutation(remove_headers=["content-length"])
        )
    )
).SerializeToString()
CONTINUE_RESPONSE_BODY = pb.ProcessingResponse(response_body=pb.BodyResponse()).SerializeToString()
CONTINUE_RESPONSE_TRAILERS = pb.ProcessingResponse(
    response_trailers=pb.TrailersResponse()
).SerializeToString()


def read_streamed(data: bytes) -> tuple[bytes, bytes, bool] | None:
    """Read a response body message by hand, for it is the one that comes per token.

    Returns:
        (HttpBody's bytes, which are a StreamedBodyResponse's too; body; end_of_stream), or None
        where the message is not in the usual form and protobuf has to read it.

    Raises:
        IndexError: the message ends too early, or a length does not end.
    """
    size = data[1]
    at = 2
    if size >= _SHORT_VARINT:
        size, at = _read_varint(data, 1)
    inner = data[at : at + size]
    if len(inner) != size:
        return None
    if not inner or inner == _END_OF_STREAM:
        return inner, b"", bool(inner)
    if inner[0] != _BODY_FIELD:
        return None
    size = inner[1]
    at = 2
    if size >= _SHORT_VARINT:
        size, at = _read_varint(inner, 1)
    body = inner[at : at + size]
    rest = inner[at + size :]
    if len(body) != size or (rest and rest != _END_OF_STREAM):
        return None
    return inner, body, bool(rest)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 7 * _LENGTH_BYTES, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < _SHORT_VARINT:
            return value, at
    raise IndexError("the length has too many bytes")
