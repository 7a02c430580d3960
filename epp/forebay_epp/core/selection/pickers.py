"""Pickers: which endpoint is taken, given their scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forebay_epp.core.terms import RandomSource
    from forebay_epp.core.tracked import TrackedEndpoint


class MaxScore:
    """Takes the best one, and one at random of equals."""

    def __init__(self, random: RandomSource) -> None:
        self._random = random

    def pick(
        self, endpoints: Sequence[TrackedEndpoint], scores: Sequence[float]
    ) -> TrackedEndpoint:
        """Take one of at least one endpoint."""
        best = max(scores)
        if scores.count(best) == 1:
            return endpoints[scores.index(best)]
        pairs = zip(endpoints, scores, strict=True)
        equals = [endpoint for endpoint, score in pairs if score == best]
        return equals[self._random.randrange(len(equals))]


class PowerOfTwo:
    """Takes the better one of two that are drawn at random (Mitzenmacher, 2001).

    Where several EPPs choose by scores of the same age, they do not all rush to the same endpoint.
    """

    def __init__(self, random: RandomSource) -> None:
        self._random = random

    def pick(
        self, endpoints: Sequence[TrackedEndpoint], scores: Sequence[float]
    ) -> TrackedEndpoint:
        """Take one of at least one endpoint."""
        if len(endpoints) == 1:
            return endpoints[0]
        one = self._random.randrange(len(endpoints))
        other = self._random.randrange(len(endpoints) - 1)
        other += other >= one
        return endpoints[one if scores[one] >= scores[other] else other]
