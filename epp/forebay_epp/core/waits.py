"""Predicts how long a request will wait in the queue. Nothing is refused because of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from forebay_epp.core.bands import Band
    from forebay_epp.core.terms import Request
    from forebay_epp.core.tracked import TrackedEndpoint

    InFlight = tuple[Request, TrackedEndpoint]

SMOOTHING = 0.05
LEAST_SECONDS = 1e-3


class Waits:
    """Learns how long requests keep their slots, and predicts waits by it.

    By Little's law (Operations Research 9(3), 1961) slots get free at the rate of requests in
    flight over the mean time that each keeps its slot; until an answer has ended, the oldest
    request's time so far is taken for it. First what waits in higher bands gets them, and what
    comes there meanwhile, at the rate at which higher bands drain; then what waits in the band
    itself. The flows of a band are taken for one queue, so where they share it fairly, a prediction
    is too high for a short flow and too low for a long one.
    """

    __slots__ = ("_slot_seconds",)

    def __init__(self) -> None:
        self._slot_seconds = 0.0

    def learn(self, slot_seconds: float) -> None:
        """Take note of how long an answered request kept its slot."""
        known = self._slot_seconds or slot_seconds
        self._slot_seconds = known + SMOOTHING * (slot_seconds - known)

    def predict(
        self, band: Band, bands: Iterable[Band], in_flight: Mapping[int, InFlight], now: float
    ) -> float | None:
        """Return the seconds that a request coming to the band now would wait.

        Args:
            band: the request's.
            bands: all, highest priority first.
            in_flight: requests in flight on all endpoints, the oldest first.
            now: monotonic seconds.

        Returns:
            None where nothing is in flight, or higher bands take all.
        """
        if not in_flight:
            return None
        slot_seconds = self._slot_seconds
        if not slot_seconds:
            oldest, _ = next(iter(in_flight.values()))
            slot_seconds = now - oldest.dispatched_at
        rate = len(in_flight) / max(slot_seconds, LEAST_SECONDS)
        ahead = 1
        for other in bands:
            ahead += len(other.arrival)
            if other is band:
                break
            rate -= other.drain_rate(now)
        return ahead / rate if rate > 0 else None
