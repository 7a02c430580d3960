"""Gives free slots away: from which band the next request comes, and to which endpoint it goes.

Whose turn it is inside a band does not belong here (lanes.py), nor which endpoint is best
(selection/), nor what may wait (controller.py).
"""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING

from forebay_epp.core.selection import Miss

if TYPE_CHECKING:
    from collections.abc import Callable

    from forebay_epp.core.bands import Band, Bands
    from forebay_epp.core.endpoints import EndpointSet
    from forebay_epp.core.footprints import Footprints
    from forebay_epp.core.selection import Selection
    from forebay_epp.core.terms import Request
    from forebay_epp.core.tracked import TrackedEndpoint


class Step(Enum):
    """What has come of an attempt to dispatch from a band."""

    SENT = auto()
    NOTHING = auto()  # nothing that could use a slot, or none that the band may use
    HELD_UP = auto()  # what comes after waits as well


class Dispatching:
    """Dispatches from the bands of a pool.

    Args:
        bands: what waits.
        endpoints: where slots are.
        selection: chooses among them.
        footprints: tells what to expect of a request.
        send: takes a request that is to leave its band now, and the endpoint that it goes to, and
            writes on it what that has cached of it.
    """

    __slots__ = ("_bands", "_endpoints", "_footprints", "_selection", "_send")

    def __init__(
        self,
        bands: Bands,
        endpoints: EndpointSet,
        selection: Selection,
        footprints: Footprints,
        send: Callable[[Request, TrackedEndpoint, float], None],
    ) -> None:
        self._bands = bands
        self._endpoints = endpoints
        self._selection = selection
        self._footprints = footprints
        self._send = send

    def run(self, opened: list[str], now: float) -> None:
        """Give free slots away, strictly by band, until there is none or no request can use one.

        A request for which there are slots but not enough room holds up what comes after it.
        Otherwise small requests would take the room that a large one waits for, one after another.
        Where the proxy names the endpoints, it holds up its lane only.

        Args:
            opened: endpoints that may have got a free slot since the last time. At all others
                nothing waits that could be dispatched, unless it has come since.
            now: monotonic seconds.
        """
        endpoints = self._endpoints
        bands = self._bands
        for band in bands.all:
            if band.lanes.sites:
                band.lanes.wake(opened)
        for band in bands.all:
            while band.arrival:
                due = bands.due() if bands.reserving else None
                if due is not None and due is not band:
                    if self._next(due, now, owed=True) is not Step.SENT:
                        due.credit = 0.0
                else:
                    step = self._next(band, now, owed=due is band)
                    if step is Step.HELD_UP:
                        return
                    if step is Step.NOTHING:
                        break
                if endpoints.free <= 0:
                    return

    def _next(self, band: Band, now: float, *, owed: bool) -> Step:
        """Dispatch the request whose turn it is in a band, past those that no slot will do for.

        The band's ceiling does not hold for what its reserved share owes it.
        """
        percent = band.plan.max_saturation_percent
        if percent < 100 and not owed and not self._may_use_slots(percent):
            return Step.NOTHING
        lanes = band.lanes
        while (lane := lanes.next(self._endpoints.is_open)) is not None:
            request = lane.queue.head()
            self._footprints.expect(request)
            endpoint = self._selection.pick(request, now)
            if isinstance(endpoint, Miss):
                if endpoint is Miss.NO_ROOM and request.subset is None:
                    return Step.HELD_UP
                lanes.park(lane)
                continue
            self._send(request, endpoint, now)
            band.pop(lane, now)
            if self._bands.reserving:
                self._bands.account(band)
            return Step.SENT
        return Step.NOTHING

    def _may_use_slots(self, percent: int) -> bool:
        """Whether one more request leaves the pool as empty as this ceiling demands."""
        free, slots = self._endpoints.free, self._endpoints.slots
        return 100 * (slots - free + 1) <= percent * slots or free == slots
