"""Endpoint selection: where the request at the head goes.

A filter (free slots, subset) and a ranking; when to dispatch does not belong here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from forebay_epp.core.endpoints import EndpointState
    from forebay_epp.core.terms import RandomSource


def pick(
    candidates: Iterable[EndpointState], largest: int, random: RandomSource, now: float
) -> EndpointState | None:
    """Pick the least occupied of the endpoints that have a free slot, one at random of equals.

    Occupancy is relative: slots taken over slots there are, so that servers of different size are
    used evenly. A limit that is not settled says little about the server, whose size may be that
    of the largest: it counts as `largest`. Servers that are equal are so loaded equally whatever
    their limits have come to, and one whose limit was cut is filled until it shows what it takes.

    Args:
        candidates: endpoints to choose from.
        largest: the largest limit of the pool, in slots.
        random: decides between equals.
        now: monotonic seconds.

    Returns:
        An endpoint, or None when no candidate has a free slot.
    """
    best: EndpointState | None = None
    equals: list[EndpointState] | None = None
    best_taken = best_limit = 0
    for endpoint in candidates:
        if endpoint.free <= 0:
            continue
        taken = endpoint.occupancy
        own = endpoint.limit
        limit = own.value if now < own.settled_until else largest
        # taken / limit < best_taken / best_limit, in whole numbers
        if best is None or taken * best_limit < best_taken * limit:
            best, best_taken, best_limit = endpoint, taken, limit
            equals = None
        elif taken * best_limit == best_taken * limit:
            if equals is None:
                equals = [best]
            equals.append(endpoint)
    return best if equals is None else equals[random.randrange(len(equals))]
