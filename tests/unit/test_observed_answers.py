"""Ties between requests and the streams that show their answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_epp.codec.extproc.framing import routed_headers
from forebay_epp.codec.extproc.watching import PLAIN, SECRET_LENGTH, Filter, Tie, calling, tied
from forebay_epp.ties import CLAIM_SECONDS, LOST_IN_A_ROW, Ties
from forebay_extproc.v3 import external_processor_pb2 as pb

SECRET = "0123456789abcdef" * 2


@pytest.mark.parametrize(
    "owner", ["", "10.0.0.1:9002", "[2001:db8:1234:5678:9abc:def0:1234:5678]:9002"]
)
def test_a_tie_joins_the_metadata_that_is_there(owner):
    """Written by hand, read by protobuf, with the destination beside it."""
    data = routed_headers("10.0.0.7:8000", None) + tied(Tie(SECRET, owner))

    metadata = pb.ProcessingResponse.FromString(data).dynamic_metadata

    assert metadata["envoy.lb"]["x-gateway-destination-endpoint"] == "10.0.0.7:8000"
    expected = {"tie": SECRET, "owner": owner} if owner else {"tie": SECRET}
    assert dict(metadata["forebay"].items()) == expected


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ((), PLAIN),
        ((("x-forebay-responses", "Observe"),), Filter(observed=True)),
        ((("x-forebay-responses", "Guess"),), PLAIN),
        ((("user-agent", "x"), ("x-forebay-tie", SECRET)), Filter(secret=SECRET)),
        ((("x-forebay-tie", "-"),), Filter(secret="")),
        ((("x-forebay-tie", SECRET + "0"),), Filter(secret="")),
    ],
)
def test_what_the_metadata_of_a_call_says(metadata, expected):
    """Envoy writes a dash where its own metadata has no tie."""
    assert calling(metadata) == expected


def test_a_tie_is_claimed_once():
    """Whoever comes second gets nothing."""
    ties = Ties()
    tie = ties.give(7, 0.0)

    assert (ties.claim(tie.secret), ties.claim(tie.secret)) == (7, None)
    assert ties.lose(1e9) is None


def test_a_tie_is_lost_after_a_while():
    """Then it cannot be claimed any more."""
    ties = Ties()
    tie = ties.give(7, 0.0)

    assert ties.lose(CLAIM_SECONDS / 2) is None
    assert (ties.lose(CLAIM_SECONDS), ties.claim(tie.secret)) == (7, None)


def test_without_streams_that_observe_no_tie_is_waited_for():
    """Until one comes, for whatever answer."""
    ties = Ties()
    for number in range(LOST_IN_A_ROW):
        ties.give(number, 0.0)
        assert ties.lose(CLAIM_SECONDS) == number

    ties.give(10, 5.0)
    assert ties.lose(5.0) == 10
    ties.claim("0" * SECRET_LENGTH)
    ties.give(11, 6.0)
    assert ties.lose(6.0) is None


@given(st.integers(1, 1000))
def test_secrets_differ(count):
    """Also beyond what one call to the system yields."""
    ties = Ties("10.0.0.1:9002")

    given_out = [ties.give(number, 0.0) for number in range(count)]

    assert len({tie.secret for tie in given_out}) == count
    assert {len(tie.secret) for tie in given_out} == {SECRET_LENGTH}
    assert {tie.owner for tie in given_out} == {"10.0.0.1:9002"}
