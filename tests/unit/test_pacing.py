"""How fast the operator goes: delays after failures and rate limits, in virtual time."""

from __future__ import annotations

from forebay_operator.pacing import Backoff, RateLimit


def test_delays_double_up_to_the_longest_and_start_again_after_a_reset():
    """Without jitter they are exact."""
    backoff = Backoff(3.0, jitter=0.0)
    assert [backoff.next_seconds() for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    backoff.reset()
    assert backoff.next_seconds() == 0.5


def test_jitter_only_shortens_a_delay():
    """By at most its share."""
    delays = [Backoff(10.0, 8.0, jitter=0.5).next_seconds() for _ in range(200)]
    assert 4.0 <= min(delays) < 6.0 < max(delays) <= 8.0


def test_a_rate_limit_gives_a_burst_and_then_what_time_brings():
    """What is not taken does not add up beyond the burst."""
    limit = RateLimit(per_second=2.0, burst=3.0, now=0.0)
    assert [limit.take(0.0) for _ in range(4)] == [True, True, True, False]
    assert [limit.take(0.5) for _ in range(2)] == [True, False]
    assert [limit.take(100.0) for _ in range(4)] == [True, True, True, False]
