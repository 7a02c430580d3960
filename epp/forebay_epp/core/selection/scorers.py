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


class PrefixCache:
    """Prefers the endpoint that has the most of the prompt in its prefix cache, while it pays.

    (saved - (wait - least wait)) / whole, and 0 where that is below: `saved` is the time to prefill
    what the endpoint has of the prompt, `wait` the time until the prompts that it was sent before
    are prefilled, least where that is of all the candidates, and `whole` the time to prefill the
    whole prompt. So an endpoint gains nothing by its cache once waiting there takes longer than
    prefilling again elsewhere. All of these are learned: the blocks from what was sent, checked
    against the server's own counter of hits (prefixes.py), and the speed from its answers
    (prefill.py). Before any speed is known the tokens count instead of seconds.
    """

    def __init__(self, pool: EndpointSet) -> None:
        self._prefixes = pool.prefixes

    def score(
        self, request: Request, endpoints: Sequence[TrackedEndpoint], now: float
    ) -> list[float]:
        """Return the part of the whole that each saves; nothing where none has any of it."""
        if not request.prefix:
            return []
        cached = self._prefixes.cached_tokens_of(endpoints, request)
        if not cached:
            return []
        prefills = [endpoint.prefill for endpoint in endpoints]
        rates = [prefill.rate for prefill in prefills]
        known = [rate for rate in rates if rate]
        if known:
            usual = sum(known) / len(known)
            rates = [rate or usual for rate in rates]
            for prefill in prefills:
                prefill.drain(now)
            waits = [prefill.backlog / rate for prefill, rate in zip(prefills, rates, strict=True)]
        else:
            rates = [1.0] * len(rates)
            waits = [prefill.backlog for prefill in prefills]
        least = min(waits)
        whole = request.prompt_tokens
        saved = zip(cached, waits, rates, strict=True)
        return [
            gain / whole if (gain := tokens - (wait - least) * rate) > 0.0 else 0.0
            for tokens, wait, rate in saved
        ]
