"""Endpoint selection: where the request at the head goes.

A filter (free slots, subset) and a ranking; when to dispatch is the controller's business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from forebay_epp.core.saturation import EndpointState
    from forebay_epp.core.terms import RandomSource


def pick(candidates: Iterable[EndpointState], random: RandomSource) -> EndpointState | None:
    """Pick the endpoint with most free slots, then least KV usage, then by lot.

    An endpoint that does not report its KV usage counts as half full. None when no candidate has
    a free slot.
    """
    best: list[EndpointState] = []
    most_free = 0
    least_kv = 0.0
    for endpoint in candidates:
        free = endpoint.free
        if free <= 0 or free < most_free:
            continue
        kv_usage = 0.5 if endpoint.kv_usage is None else endpoint.kv_usage
        if free > most_free or kv_usage < least_kv:
            best = [endpoint]
            most_free = free
            least_kv = kv_usage
        elif kv_usage == least_kv:
            best.append(endpoint)
    if not best:
        return None
    return best[0] if len(best) == 1 else best[random.randrange(len(best))]
