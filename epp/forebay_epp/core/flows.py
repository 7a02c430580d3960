"""Flows of a band and their lanes, and whose turn it is.

How many may wait and for how long does not belong here (bands.py), nor how ranks come about
(fairness/).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay_epp.core.least import Least
from forebay_epp.core.terms import NEVER

if TYPE_CHECKING:
    from forebay_epp.core.fairness import Fairness
    from forebay_epp.core.ordering import Ordering, Rank

ANYWHERE = ""  # the site of a lane that any endpoint will do for

Subset = frozenset[str] | None
Turn = tuple[object, ...]


class Flow:
    """What one flow has in one band: its requests, or the flows inside it.

    Attributes:
        name: of the model or the tenant.
        outer: the flow that it is in, None at the outer level.
        weight: its share relative to others', for policies that know weights.
        rank: written by the fairness policy of its level.
        credit: likewise.
        requests: how many wait.
        size_bytes: of those that wait.
        lanes: those in which a request waits, by subset hint; the one without a hint stays.
        flows: how many flows are in it.
        fairness: the policy between these; None where there are none.
    """

    __slots__ = (
        "credit",
        "fairness",
        "flows",
        "lanes",
        "name",
        "outer",
        "rank",
        "requests",
        "size_bytes",
        "weight",
    )

    def __init__(
        self,
        name: str,
        weight: int = 1,
        outer: Flow | None = None,
        fairness: Fairness | None = None,
    ) -> None:
        self.name = name
        self.outer = outer
        self.weight = weight
        self.rank = 0.0
        self.credit = 0.0
        self.requests = 0
        self.size_bytes = 0
        self.lanes: dict[Subset, Lane] = {}
        self.flows = 0
        self.fairness = fairness


class Lane:
    """The requests of one flow that may go to the same endpoints.

    Attributes:
        flow: whose they are.
        path: the flows that it is in, outermost first.
        subset: addresses of the endpoints, or None for all.
        sites: the same in a fixed order; `ANYWHERE` for all.
        queue: the requests.
        head: the rank of the first of them by the ordering; infinity without any.
        parked: whether the lane waits at its sites because none of them had a free slot.
    """

    __slots__ = ("flow", "head", "parked", "path", "queue", "sites", "subset")

    def __init__(self, flow: Flow, subset: Subset, queue: Ordering) -> None:
        self.flow = flow
        self.path = (flow,) if flow.outer is None else (flow.outer, flow)
        self.subset = subset
        self.sites = (ANYWHERE,) if subset is None else tuple(sorted(subset))
        self.queue = queue
        self.head: Rank = NEVER
        self.parked = False

    def turn(self) -> Turn:
        """Return what decides between lanes of all flows: the flows' turns, then the ordering."""
        flow = self.flow
        outer = flow.outer
        return (flow.rank, self.head) if outer is None else (outer.rank, flow.rank, self.head)

    def inner_turn(self) -> Turn:
        """Return what decides between lanes of one outer flow: the turn of that is no matter."""
        return self.flow.rank, self.head

    def rank(self) -> Rank:
        """Return what decides between lanes of one flow."""
        return self.head


class Turns:
    """Lanes by turn, grouped by the flows they are in.

    A group of its own for each flow, because a charge changes the turn of all its lanes at once.

    Args:
        levels: of flows to group by. Where that is all, lanes in a group differ by their head only.
        level: which of them this is.
    """

    __slots__ = ("_groups", "_level", "_levels", "_next")

    def __init__(self, levels: int, level: int = 0) -> None:
        self._levels = levels
        self._level = level
        self._groups: dict[Flow, Turns | Least[Lane]] = {}
        self._next: Least[Flow] = Least(self._turn_of)

    def __len__(self) -> int:
        return len(self._groups)

    def add(self, lane: Lane) -> None:
        """Add a lane, or take note that its turn is earlier than it was."""
        flow = lane.path[self._level]
        group = self._groups.get(flow)
        if group is None:
            group = self._groups[flow] = self._group(lane)
        group.add(lane)
        self._next.add(flow)

    def discard(self, lane: Lane) -> None:
        """Let a lane leave, which is there."""
        flow = lane.path[self._level]
        group = self._groups[flow]
        group.discard(lane)
        if not group:
            self._next.discard(flow)
            del self._groups[flow]

    def first(self) -> Lane | None:
        """Return the lane whose turn it is, or None without any."""
        flow = self._next.first()
        return None if flow is None else self._groups[flow].first()

    def _group(self, lane: Lane) -> Turns | Least[Lane]:
        if self._level + 1 < self._levels:
            return Turns(self._levels, self._level + 1)
        return Least(Lane.rank if lane.path[self._level] is lane.flow else Lane.inner_turn)

    def _turn_of(self, flow: Flow) -> Turn | None:
        lane = self._groups[flow].first()
        if lane is None:
            return None
        return lane.turn() if self._level == 0 else lane.inner_turn()


class Site(Turns):
    """The lanes that wait for a slot of one endpoint.

    Attributes:
        address: of the endpoint.
    """

    __slots__ = ("address",)

    def __init__(self, address: str, levels: int) -> None:
        super().__init__(levels)
        self.address = address

    def key(self) -> tuple[Turn, str] | None:
        """Return what decides between sites."""
        lane = self.first()
        return None if lane is None else (lane.turn(), self.address)


def earlier(lane: Lane | None, other: Lane | None) -> Lane | None:
    """Return the one of two lanes whose turn is first."""
    if lane is None or (other is not None and other.turn() < lane.turn()):
        return other
    return lane
