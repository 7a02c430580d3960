"""When requests have waited for long enough.

Deadlines that requests bring are kept in bands.py; how they are evicted does not belong
here (controller.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay_epp.core.terms import NEVER, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from forebay_epp.core.bands import Band, Bands
    from forebay_epp.core.endpoints import EndpointSet
    from forebay_epp.core.terms import Request

DELETED = "the InferencePool of this endpoint picker is deleted"


class Expiry:
    """Evicts what waits from the bands of a pool in time.

    Args:
        no_endpoints_ttl_seconds: see below.
        bands: what waits.
        endpoints: whether there are any.
        evict: evicts a request with this outcome and message.

    Attributes:
        no_endpoints_ttl_seconds: how long requests wait while the pool has no endpoints.
        served_until: when everything goes, in monotonic seconds; infinity for never.
        next_at: when `run` may find anything.
    """

    __slots__ = (
        *("_bands", "_endpoints", "_evict", "_since"),
        *("next_at", "no_endpoints_ttl_seconds", "served_until"),
    )

    def __init__(
        self,
        no_endpoints_ttl_seconds: float,
        bands: Bands,
        endpoints: EndpointSet,
        evict: Callable[[Request, Outcome, str, float], None],
    ) -> None:
        self.no_endpoints_ttl_seconds = no_endpoints_ttl_seconds
        self.served_until = NEVER
        self.next_at = NEVER
        self._bands = bands
        self._endpoints = endpoints
        self._evict = evict
        self._since = -NEVER

    def endpoints_changed(self, now: float) -> None:
        """Restart the clock: the pool has its first endpoint, or none any more."""
        self._since = now

    def expect(self, request: Request, band: Band, now: float) -> None:
        """Take note of a request that comes to a band now."""
        if not band.arrival:  # behind others of its band it expires after them
            self.next_at = min(self.next_at, self.deadline(band, now))
        self.next_at = min(self.next_at, request.deadline)

    def deadline(self, band: Band, enqueued_at: float) -> float:
        """When a request of this band that came at `enqueued_at` expires.

        While the pool has no endpoints the clock is that of `noEndpoints`, and it restarts when
        that changes: requests that waited for the first endpoint then get their band's whole TTL.
        Both together are the most that a request may wait, however often endpoints come and go;
        a deleted pool ends it for all.
        """
        no_endpoints_ttl = self.no_endpoints_ttl_seconds
        ttl = band.plan.ttl_seconds
        since = max(enqueued_at, self._since)
        return min(
            since + (ttl if self._endpoints.present else no_endpoints_ttl),
            enqueued_at + ttl + no_endpoints_ttl,
            self.served_until,
        )

    def run(self, now: float) -> None:
        """Evict what has waited for long enough."""
        self.next_at = NEVER
        for band in self._bands.all:
            self._expire_deadlines(band, now)
            while band.arrival:
                request = next(iter(band.arrival.values()))
                deadline = self.deadline(band, request.enqueued_at)
                if deadline > now:
                    self.next_at = min(self.next_at, deadline)
                    break
                if now >= self.served_until:
                    self._evict(request, Outcome.EVICTED_POOL_DELETED, DELETED, now)
                else:
                    self._evict_expired(request, f"band {request.band} allows", now)

    def _expire_deadlines(self, band: Band, now: float) -> None:
        """Evict what the requests' own deadlines say, however long the band lets them wait."""
        while True:
            deadline, request = band.first_deadline()
            if request is None or deadline > now:
                self.next_at = min(self.next_at, deadline)
                return
            self._evict_expired(request, "its deadline allows", now)

    def _evict_expired(self, request: Request, limit: str, now: float) -> None:
        waited = f"waited {now - request.enqueued_at:.1f} s"
        if self._endpoints.within(request.subset):
            message = f"{waited} for a free slot, longer than {limit}"
            self._evict(request, Outcome.EVICTED_TTL, message, now)
        else:
            message = f"{waited} while the pool had no endpoint for it"
            self._evict(request, Outcome.EVICTED_NO_ENDPOINTS, message, now)
