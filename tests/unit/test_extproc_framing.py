"""The messages written and read by hand are protobuf's."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay_epp.codec.extproc import framing
from forebay_extproc.v3 import external_processor_pb2 as pb

# Lengths around each size of varint; what large bodies consist of does not matter.
BODIES = st.one_of(st.binary(max_size=300), st.integers(16_000, 17_000).map(bytes))


def streamed(body: bytes, *, end: bool) -> pb.BodyResponse:
    return pb.BodyResponse(
        response=pb.CommonResponse(
            body_mutation=pb.BodyMutation(
                streamed_response=pb.StreamedBodyResponse(body=body, end_of_stream=end)
            )
        )
    )


@given(body=BODIES, end=st.booleans())
def test_a_streamed_piece_is_what_protobuf_would_write(body, end):
    """Field numbers, lengths and omitted defaults are right for any size."""
    request = pb.ProcessingResponse(request_body=streamed(body, end=end))
    response = pb.ProcessingResponse(response_body=streamed(body, end=end))

    assert framing.streamed(framing.REQUEST_BODY, body, end_of_stream=end) == (
        request.SerializeToString()
    )
    assert framing.streamed(framing.RESPONSE_BODY, body, end_of_stream=end) == (
        response.SerializeToString()
    )


@given(body=BODIES, end=st.booleans(), metadata=st.booleans())
def test_a_response_body_is_read_as_protobuf_reads_it(body, end, metadata):
    """With and without metadata behind it."""
    message = pb.ProcessingRequest(response_body=pb.HttpBody(body=body, end_of_stream=end))
    if metadata:
        message.metadata_context.filter_metadata["envoy.lb"]["key"] = "value"

    read = framing.read_streamed(message.SerializeToString())

    assert read is not None
    assert read[1:] == (body, end)


@given(data=st.binary(max_size=60).map(lambda tail: b"\x2a" + tail))
@settings(max_examples=1000)
def test_what_is_read_by_hand_is_read_alike_by_protobuf(data):
    """Arbitrary bytes: either the hand-written reader passes, or both agree."""
    try:
        read = framing.read_streamed(data)
    except IndexError:
        return
    if read is None:
        return

    try:
        message = pb.ProcessingRequest.FromString(data)
    except DecodeError:
        return  # what follows the body is not read by hand; it changes nothing about the body
    if message.WhichOneof("request") == "response_body" and not _repeats(data):
        assert read[1:] == (message.response_body.body, message.response_body.end_of_stream)


def test_a_length_of_too_many_bytes_is_not_read():
    """As in protobuf; reading an endless one would take the square of its size."""
    message = b"\x2a\x83\x80\x80\x80\x80\x00\x0a\x01x"

    with pytest.raises(IndexError):
        framing.read_streamed(message)
    with pytest.raises(DecodeError):
        pb.ProcessingRequest.FromString(message)


def _repeats(data: bytes) -> bool:
    """Whether a later field overrides the first one, which no proxy sends."""
    return pb.ProcessingRequest.FromString(data).SerializeToString() != data
