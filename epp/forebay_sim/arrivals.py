"""Arrival times of requests: open-loop schedules, which do not wait for answers. Pure."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Arrival:
    """A request of `name` that comes `at` seconds after the start."""

    at: float
    name: str


def poisson(rates: dict[str, float], seconds: float, seed: int) -> list[Arrival]:
    """Return independent Poisson arrivals for each name, in order of time.

    Args:
        rates: requests per second, above 0, by name.
        seconds: length of the schedule.
        seed: equal seeds give equal schedules.
    """
    streams = []
    for name, rate in sorted(rates.items()):
        source = random.Random(f"{seed}/{name}")  # noqa: S311  # a schedule, not a secret
        times = []
        at = source.expovariate(rate)
        while at < seconds:
            times.append(Arrival(at, name))
            at += source.expovariate(rate)
        streams.append(times)
    return list(heapq.merge(*streams))
