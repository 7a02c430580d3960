"""The results of a load's requests: one each, and their statistics. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Result:
    """One request's only outcome.

    Attributes:
        name: class of the request.
        status: HTTP status as text, or what went wrong with the connection.
        sent_at: seconds after the start of the load.
        first_at: when the first token came, or None.
        ended_at: when the answer ended.
    """

    name: str
    status: str
    sent_at: float
    first_at: float | None
    ended_at: float

    @property
    def ok(self) -> bool:
        """Whether the request was answered."""
        return self.status == "200"


def percentile(values: list[float], percent: float) -> float | None:
    """Return the smallest value that at least `percent` of the values do not exceed."""
    if not values:
        return None
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, int(rank) - 1)]


def first_token_ms(results: list[Result], name: str) -> list[float]:
    """Return the times to first token of the answered requests of a class."""
    return [
        (result.first_at - result.sent_at) * 1e3
        for result in results
        if result.name == name and result.ok and result.first_at is not None
    ]


def describe(results: list[Result], name: str) -> dict[str, Any]:
    """Return the figures of one class in the form of the demo's JSON."""
    mine = [result for result in results if result.name == name]
    first = first_token_ms(results, name)
    whole = [(result.ended_at - result.sent_at) * 1e3 for result in mine if result.ok]
    return {
        "offered": len(mine),
        "ok": len(whole),
        "statuses": dict(sorted(Counter(result.status for result in mine).items())),
        "ttft_ms": _percentiles(first),
        "e2e_ms": _percentiles(whole),
        "last_answer_seconds": max((r.ended_at for r in mine if r.ok), default=None),
    }


def _percentiles(values: list[float]) -> dict[str, float | None]:
    return {
        f"p{percent}": None if (value := percentile(values, percent)) is None else round(value, 1)
        for percent in (50, 99)
    }
