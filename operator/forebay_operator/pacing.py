"""Pacing: delays that grow after failures, and a token bucket."""

from __future__ import annotations

import random


def jittered(seconds: float, jitter: float = 0.2) -> float:
    """Return a delay shortened by a random part of at most `jitter`, so that load spreads."""
    return random.uniform(1.0 - jitter, 1.0) * seconds  # noqa: S311  # hides nothing


class Backoff:
    """Delays that double from the first to the longest.

    Args:
        longest_seconds: the limit.
        first_seconds: the first delay, and the one after `reset`.
        jitter: random part by which a delay is shortened at most, between 0 and 1.
    """

    def __init__(
        self, longest_seconds: float, first_seconds: float = 0.5, jitter: float = 0.2
    ) -> None:
        self._longest_seconds = longest_seconds
        self._first_seconds = first_seconds
        self._jitter = jitter
        self._seconds = first_seconds

    def next_seconds(self) -> float:
        """Return the next delay."""
        seconds = self._seconds
        self._seconds = min(2 * seconds, self._longest_seconds)
        return jittered(seconds, self._jitter)

    def reset(self) -> None:
        """Start with the first delay again."""
        self._seconds = self._first_seconds


class RateLimit:
    """A token bucket, full at the start.

    Args:
        per_second: how many tokens come each second.
        burst: how many it holds.
        now: monotonic seconds.
    """

    def __init__(self, per_second: float, burst: float, now: float) -> None:
        self._per_second = per_second
        self._burst = burst
        self._tokens = burst
        self._filled_at = now

    def take(self, now: float) -> bool:
        """Take a token; return False where there is none."""
        earned = (now - self._filled_at) * self._per_second
        self._tokens = min(self._burst, self._tokens + earned)
        self._filled_at = now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True
