"""The last ten minutes of counters that otherwise only grow.

A copy of some dozen numbers every few seconds: a request costs nothing. How they are shown belongs
in report.py.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from forebay_epp.core.terms import Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from forebay_epp.traffic import ShadowCounts, Traffic

SAMPLE_SECONDS = 5.0
RECENT_SECONDS = 10.0
LONG_SECONDS = 600.0

_SERVED = frozenset((Outcome.DISPATCHED, Outcome.ANSWERED, Outcome.EVICTED_CANCELLED))

Refusals = dict[tuple[str, str], int]


@dataclass(frozen=True, slots=True)
class Sample:
    """The counters at one time.

    Attributes:
        at: monotonic seconds.
        starts: counts of the histogram of times to first token, by band.
        refusals: by band and outcome.
    """

    at: float
    starts: Mapping[str, Sequence[int]]
    refusals: Refusals


class History:
    """Samples of the counters, the oldest some ten minutes old."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._samples: deque[Sample] = deque(maxlen=round(LONG_SECONDS / SAMPLE_SECONDS) + 1)
        self._samples.append(Sample(time.monotonic(), {}, {}))

    @property
    def shadow(self) -> ShadowCounts:
        """What a plan that is computed beside the traffic would have done since the start."""
        return self._traffic.shadow

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            self.sample(time.monotonic())
            await asyncio.sleep(SAMPLE_SECONDS)

    def sample(self, now: float) -> None:
        """Remember the counters as they are now."""
        self._samples.append(self.now(now))

    def now(self, now: float) -> Sample:
        """Return the counters as they are now."""
        refusals: Refusals = {}
        for (band, _, outcome), count in dict(self._traffic.outcomes).items():
            if outcome not in _SERVED:
                key = (band, outcome.value)
                refusals[key] = refusals.get(key, 0) + count
        starts = {band: list(each.counts) for band, each in dict(self._traffic.starts).items()}
        return Sample(now, starts, refusals)

    def before(self, now: float, seconds: float) -> Sample:
        """Return the newest sample that is at least so old, or the oldest one there is."""
        older = [sample for sample in self._samples if now - sample.at >= seconds]
        return older[-1] if older else self._samples[0]


def quantile(
    bounds: Sequence[float], counts: Sequence[int], before: Sequence[int], part: float
) -> float | None:
    """Return a quantile of what a histogram has counted since, None where that is nothing.

    Interpolated inside a bucket, as Prometheus's histogram_quantile does it; what is above all
    bounds counts as the last one.

    Args:
        bounds: upper bounds of the buckets, ascending.
        counts: of values by bucket, the last one of values above all bounds.
        before: the same at the earlier time; empty for zeros.
        part: 0 to 1.
    """
    recent = [n - m for n, m in zip(counts, before or [0] * len(counts), strict=True)]
    rank = part * sum(recent)
    if not rank:
        return None
    lower = 0.0
    for bound, count in zip(bounds, recent, strict=False):
        if count and rank <= count:
            return lower + (bound - lower) * rank / count
        rank -= count
        lower = bound
    return lower
