"""Dispatches in proportion to weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay_epp.core.fairness.virtual_time import VirtualTime

if TYPE_CHECKING:
    from forebay_epp.core.terms import Cost


class WeightedFair(VirtualTime):
    """Each flow gets dispatches in proportion to its weight.

    Of two flows of weights v and w that could use any free slot, neither is ever further ahead of
    the other than 1/v + 1/w in dispatches over weight.
    """

    __slots__ = ()

    def service(self, cost: Cost) -> float:
        """Count dispatches."""
        return cost.requests


class WeightedFairTokens(VirtualTime):
    """Each flow gets estimated tokens, of prompts and answers, in proportion to its weight.

    The estimate is made at dispatch and stands, so it needs no usage: a model's tokens are those
    that its answers have come to on average. Where usage is read, `TokenFair` is exact.
    """

    __slots__ = ()

    def service(self, cost: Cost) -> float:
        """Count what is expected at dispatch."""
        return cost.prompt_tokens + cost.completion_tokens if cost.requests else 0.0
