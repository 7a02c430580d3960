"""Scorers: how well an endpoint suits a request, from 0 to 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forebay_epp.core.endpoints import EndpointSet
    from forebay_epp.core.terms import Request
    from forebay_epp.core.tracked import TrackedEndpoint


class Load:
    """Prefers the endpoint of which the smallest part is occupied.

    Load is relative, slots taken over slots there are, so that servers of different size are used
    evenly. A limit that is not settled says little about the server, whose size may be that of the
    largest: it counts as the largest limit of the pool. Equal servers are so loaded equally
    whatever their limits have come to, and one whose limit was cut is filled until it shows what
    it takes.
    """

    def __init__(self, pool: EndpointSet) -> None:
        self._pool = pool

    def score(
        self,
        request: Request,  # noqa: ARG002  # all requests take one slot
        endpoints: Sequence[TrackedEndpoint],
        now: float,  # noqa: ARG002  # time changes a load when the pool is told of it
    ) -> list[float]:
        """Return the free part of each, below 0 where a trial goes beyond the limit."""
        largest = self._pool.largest_limit
        return [
            1.0 - endpoint.occupancy / (endpoint.limit.value if endpoint.settled else largest)
            for endpoint in endpoints
        ]


class KVCacheUsage:
    """Prefers the endpoint whose KV cache is the emptiest: 1 - usage, as the last scrape said.

    Where usage is not known, or no longer, it counts as full: unknown is not idle.
    """

    def __init__(self, pool: EndpointSet) -> None:
        """It has no use for the pool."""

    def score(
        self,
        request: Request,  # noqa: ARG002  # how much of it a request takes matters to the budgets
        endpoints: Sequence[TrackedEndpoint],
        now: float,  # noqa: ARG002  # endpoints know when a scrape is too old
    ) -> list[float]:
        """Return the unused part of each."""
        return [
            1.0 - endpoint.kv_usage if endpoint.fresh and endpoint.kv_usage is not None else 0.0
            for endpoint in endpoints
        ]
