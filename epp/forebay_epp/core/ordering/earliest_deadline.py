"""The request that is due first (Liu and Layland, Journal of the ACM 20(1), 1973)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay_epp.core.ordering.ranked import RankedQueue

if TYPE_CHECKING:
    from forebay_epp.core.ordering import Rank
    from forebay_epp.core.terms import Request


class EarliestDeadline(RankedQueue):
    """Serves in order of `Request.due_at`, and of arrival where that is the same.

    When a request is due is said by the caller, where callers are trusted to; otherwise by its
    model's time to first token, and without one by its band's TTL. If all can be served in time, so
    they are. Under a lasting overload the earliest deadline misses many, one after another, which
    is what caps and TTLs are for.
    """

    __slots__ = ()

    def rank_of(self, request: Request) -> Rank:
        """Return when the request is due."""
        return request.due_at, request.sequence
