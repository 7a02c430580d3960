"""Budgets: which endpoints have no room for a request yet, although they have a free slot."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forebay_epp.core.terms import Request
    from forebay_epp.core.tracked import TrackedEndpoint


class KVRoom:
    """Leaves out endpoints whose KV cache would run full before the request has its answer.

    An engine whose cache is full preempts: it computes again later what it has computed. One that
    holds nothing takes any request, and so does one that does not tell the size of its cache.
    """

    def keep(
        self, request: Request, endpoints: Sequence[TrackedEndpoint]
    ) -> Sequence[TrackedEndpoint]:
        """Return those with room for the tokens that are expected."""
        tokens = request.kv_tokens
        return [endpoint for endpoint in endpoints if endpoint.kv_room_tokens >= tokens]
