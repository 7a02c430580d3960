"""The lanes of a band: which of them have something that could be dispatched, and whose turn it is.

Which flow a lane belongs to does not belong here (levels.py), nor what may wait (bands.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay_epp.core.flows import ANYWHERE, Flow, Lane, Site, Turns, earlier
from forebay_epp.core.least import Least
from forebay_epp.core.ordering import ORDERINGS
from forebay_epp.core.terms import NEVER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from forebay_control.plan import OrderingName
    from forebay_epp.core.terms import Request


class Lanes:
    """The requests of a band in the order of their turns.

    A lane is open until none of its endpoints is found to have a free slot; then it is parked at
    each of them. There it costs nothing until a slot of one becomes free: `wake` names that
    endpoint, and of all lanes, open or parked there, the one whose turn it is comes next.

    Args:
        ordering: of the requests of one flow.
        levels: of flows.

    Attributes:
        sites: those of parked lanes, by address.
    """

    __slots__ = ("_contested", "_levels", "_open", "_ordering", "_untried", "sites")

    def __init__(self, ordering: OrderingName, levels: int) -> None:
        self._ordering = ORDERINGS[ordering]
        self._levels = levels
        self._open: Least[Lane] | Turns = Least(Lane.turn) if levels == 1 else Turns(levels - 1)
        self._untried = Site(ANYWHERE, levels)
        self.sites: dict[str, Site] = {}
        self._contested: Least[Site] = Least(Site.key)

    def add(self, flow: Flow, request: Request, *, parked: bool) -> None:
        """Add a request of a flow; `parked`: no endpoint in its subset hint has a free slot."""
        lane = flow.lanes.get(request.subset)
        if lane is None:
            lane = flow.lanes[request.subset] = Lane(flow, request.subset, self._ordering())
            lane.parked = parked
        request.subset = lane.subset  # equal hints are one object
        head = lane.queue.push(request)
        if head != lane.head:
            lane.head = head
            if lane.parked:
                self._wait_at_sites(lane)
            elif lane.subset is None:
                self._open.add(lane)
            else:
                self._untried.add(lane)

    def left(self, lane: Lane) -> None:
        """Take note that a request has left its lane."""
        lane.head = lane.queue.rank()
        if lane.head == NEVER:
            if lane.parked:
                self._leave_sites(lane)
                lane.parked = False
            elif lane.subset is None:
                self._open.discard(lane)
            else:
                self._untried.discard(lane)
            if lane.subset is not None:
                del lane.flow.lanes[lane.subset]

    def wake(self, addresses: Iterable[str]) -> None:
        """Name endpoints that may have got a free slot."""
        for address in (*addresses, ANYWHERE):
            site = self.sites.get(address)
            if site is not None:
                self._contested.add(site)

    def next(self, is_open: Callable[[str], bool]) -> Lane | None:
        """Return the lane whose next request is the next of the band, or None.

        Args:
            is_open: says whether the endpoint of this address has a free slot.
        """
        lane = self._open.first()
        if self._untried:
            lane = earlier(self._untried.first(), lane)
        if self.sites:
            lane = earlier(self._first_parked(is_open), lane)
        return lane

    def park(self, lane: Lane) -> None:
        """Let a lane wait until an endpoint that it may go to gets a free slot."""
        if not lane.parked:
            if lane.subset is None:
                self._open.discard(lane)
            else:
                self._untried.discard(lane)
            lane.parked = True
            self._wait_at_sites(lane)
        for address in lane.sites:
            self._contested.discard(self.sites[address])

    def _first_parked(self, is_open: Callable[[str], bool]) -> Lane | None:
        contested = self._contested
        while (site := contested.first()) is not None:
            if site.address == ANYWHERE or is_open(site.address):
                return site.first()
            contested.discard(site)
        return None

    def _wait_at_sites(self, lane: Lane) -> None:
        for address in lane.sites:
            site = self.sites.get(address)
            if site is None:
                site = self.sites[address] = Site(address, self._levels)
            site.add(lane)

    def _leave_sites(self, lane: Lane) -> None:
        for address in lane.sites:
            site = self.sites[address]
            site.discard(lane)
            if not site:
                del self.sites[address]
