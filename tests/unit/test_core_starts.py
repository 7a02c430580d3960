"""core/starts.py: an answer that does not begin although others have is stuck."""

from __future__ import annotations

import pytest

from forebay_epp.core.starts import STUCK_TTFTS, Starts
from forebay_epp.core.terms import Request

TTFT_SECONDS = 1.0
PATIENCE_SECONDS = STUCK_TTFTS * TTFT_SECONDS


def request(starts: Starts, at: float, *, streamed: bool = True) -> Request:
    """A request that is sent at a moment."""
    made = Request(1, "m", 100, None, None, 60.0, streamed=streamed)
    made.dispatched_at = at
    starts.sent(made, at)
    return made


def begin(starts: Starts, made: Request, at: float) -> None:
    made.first_token_at = at
    starts.began(made, at)


@pytest.fixture
def starts() -> Starts:
    """Of an endpoint that has begun one answer, at 1 s, after the usual time."""
    made = Starts(0.0)
    begin(made, request(made, 0.0), TTFT_SECONDS)
    return made


def test_an_answer_is_stuck_after_three_usual_times(starts):
    """Counted from when it was sent, however many are sent later."""
    request(starts, 2.0)
    request(starts, 4.0)

    assert not starts.stuck(2.0 + PATIENCE_SECONDS)
    assert starts.stuck(2.1 + PATIENCE_SECONDS)


def test_each_answer_that_begins_gives_the_others_more_time(starts):
    """A server that goes on beginning answers is only busy."""
    first = request(starts, 2.0)
    request(starts, 2.0)
    begin(starts, first, 3.0)

    assert not starts.stuck(3.0 + PATIENCE_SECONDS)
    assert starts.stuck(3.1 + PATIENCE_SECONDS)


def test_nothing_is_stuck_where_no_answer_has_begun():
    """The server may be slow to start, and there is no usual time yet."""
    starts = Starts(0.0)
    request(starts, 0.0)

    assert not starts.stuck(1000.0)


def test_nothing_is_stuck_once_the_answers_that_had_begun_have_ended(starts):
    """An idle server is not compared with what it was."""
    begun = request(starts, 1.0)
    begin(starts, begun, 2.0)
    request(starts, 3.0)
    starts.ended(begun)
    assert starts.begun == 1
    assert starts.stuck(100.0)

    other = Request(2, "m", 100, None, None, 60.0)
    other.first_token_at = 1.0
    starts.ended(other)

    assert (starts.begun, starts.stuck(100.0)) == (0, False)


def test_answers_that_are_not_streamed_are_not_awaited(starts):
    """Their first token is not seen before their end."""
    whole = request(starts, 2.0, streamed=False)

    assert not starts.stuck(1000.0)

    starts.ended(whole)
    request(starts, 1000.0)
    assert starts.stuck(1000.1 + PATIENCE_SECONDS)


def test_the_usual_time_follows_slowly(starts):
    """A tenth of each difference: one slow answer among many makes none stuck later by much."""
    slow = request(starts, 2.0)
    begin(starts, slow, 13.0)  # 11 s: the usual time is 2 s now
    request(starts, 20.0)

    assert not starts.stuck(20.0 + 2 * PATIENCE_SECONDS)
    assert starts.stuck(20.1 + 2 * PATIENCE_SECONDS)
