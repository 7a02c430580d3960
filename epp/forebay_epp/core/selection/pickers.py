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
