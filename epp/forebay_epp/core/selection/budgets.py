"""Budgets: which endpoints have no room for a request yet, although they have a free slot."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forebay_epp.core.endpoints import EndpointSet
    from forebay_epp.core.terms import Request
    from forebay_epp.core.tracked import TrackedEndpoint


class PrefillRoom:
    """Leaves out endpoints in which prompts would wait longer to be prefilled than the plan's goal.

    A prompt that is larger than what is prefilled in time goes where none waits. An endpoint whose
    speed is not known takes any. What an endpoint has of a prompt in its prefix cache needs no
    room, and where the prompts before take less time than that saves it goes without room.
    """

    def __init__(self, pool: EndpointSet) -> None:
        self._prefixes = pool.prefixes

    def keep(
        self, request: Request, endpoints: Sequence[TrackedEndpoint], now: float
    ) -> Sequence[TrackedEndpoint]:
        """Return those with room for the prompt."""
        if not [endpoint for endpoint in endpoints if endpoint.prefill.rate]:
            return endpoints
        tokens = request.prompt_tokens
        kept = []
        for endpoint in endpoints:
            room = endpoint.prefill_room_tokens(now)
            if room >= tokens or (request.prefix and self._pays(endpoint, request, room)):
                kept.append(endpoint)
            else:
                endpoint.crowded = True
        return kept

    def _pays(self, endpoint: TrackedEndpoint, request: Request, room: float) -> bool:
        """Whether what is not cached of a prompt has room, or waits for less than is cached."""
        cached = self._prefixes.cached_tokens(endpoint, request)
        return cached > 0.0 and (
            room >= request.prompt_tokens - cached or endpoint.prefill.backlog <= cached
        )


class KVRoom:
    """Leaves out endpoints whose KV cache would run full before the request has its answer.

    An engine whose cache is full preempts: it computes again later what it has computed. One that
    holds nothing takes any request, and so does one that does not tell the size of its cache.
    """

    def __init__(self, pool: EndpointSet) -> None:
        """It has no use for the pool."""

    def keep(
        self,
        request: Request,
        endpoints: Sequence[TrackedEndpoint],
        now: float,  # noqa: ARG002  # time changes no cache that it is not told of
    ) -> Sequence[TrackedEndpoint]:
        """Return those with room for the tokens that are expected."""
        tokens = request.kv_tokens
        return [endpoint for endpoint in endpoints if endpoint.kv_room_tokens >= tokens]
