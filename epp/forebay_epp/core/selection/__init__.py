"""Endpoint selection: where the request at the head goes.

Of the endpoints that the proxy allows and that have a free slot, filters leave out those that
cannot take the request, budgets those that have no room for it yet, scorers rate the others, and a
picker takes one by its score. Each step sees the request. When to dispatch does not belong here
(controller.py).

Where more endpoints are open than `MAX_CANDIDATES`, so many neighbours from a random one on are
considered, and all only if none of those is left. The cost of a choice does not grow with the pool
then, and the load stays even: with the least of d bins at random the fullest has about
log log n / log d balls more than the mean (Azar et al., Balanced Allocations, SIAM J. Computing
29(1), 1999), and neighbours do as well as independent lots where d is at least about log n
(Godfrey, Balls and Bins with Structure, SODA 2008).

Where a request goes never decides when it goes, nor who goes first: affinity is only between
endpoints that have a free slot for the request whose turn it is. So it reorders nothing. Each flow
is dispatched, and charged, at the same turns as without any, whatever servers are chosen, and
bounds on fairness hold unchanged. (Locality-aware fair scheduling, Cao et al., 2025, trades order
for locality within a deficit; here the deficit is 0, and locality is what is left: several servers
have room most of the time, as each has many slots.)

To add a step, write a class with the method of `Filter`, `Scorer` or `Picker` and enter it in
`FILTERS`, `BUDGETS`, `SCORERS` or `PICKERS`; a plan names scorers and the picker. If the filters
refuse all endpoints, the request's lane waits until one of them gets another free slot, in no one's
way. If the budgets do, what comes after the request waits too.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING, Protocol

from forebay_control.plan import PickerName, ScorerName
from forebay_epp.core.selection.budgets import KVRoom, PrefillRoom
from forebay_epp.core.selection.pickers import MaxScore, PowerOfTwo
from forebay_epp.core.selection.scorers import KVCacheUsage, Load, PrefixCache

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from forebay_control.plan import SelectionPlan
    from forebay_epp.core.endpoints import EndpointSet
    from forebay_epp.core.terms import RandomSource, Request
    from forebay_epp.core.tracked import TrackedEndpoint


class Miss(Enum):
    """Why no endpoint is chosen."""

    UNFIT = auto()  # none of those with a free slot can take the request
    NO_ROOM = auto()  # some can, but not yet


class Filter(Protocol):
    """Leaves out endpoints, because of what the request is or because of how much work it is."""

    def keep(
        self, request: Request, endpoints: Sequence[TrackedEndpoint], now: float
    ) -> Sequence[TrackedEndpoint]:
        """Return those that can, in the same order."""


class Scorer(Protocol):
    """Rates endpoints from one point of view. It is made with the pool that they are from."""

    def score(
        self, request: Request, endpoints: Sequence[TrackedEndpoint], now: float
    ) -> list[float]:
        """Return how well each suits the request, from 0 (not at all) to 1.

        An empty list says that none suits it better than another.
        """


class Picker(Protocol):
    """Takes one of the endpoints, given their scores."""

    def pick(
        self, endpoints: Sequence[TrackedEndpoint], scores: Sequence[float]
    ) -> TrackedEndpoint:
        """Take one of at least one endpoint."""


FILTERS: tuple[Callable[[], Filter], ...] = ()  # besides presence, subset and slots
BUDGETS: tuple[Callable[[EndpointSet], Filter], ...] = (KVRoom, PrefillRoom)
SCORERS: dict[ScorerName, Callable[[EndpointSet], Scorer]] = {
    ScorerName.LOAD: Load,
    ScorerName.KV_CACHE_USAGE: KVCacheUsage,
    ScorerName.PREFIX_CACHE: PrefixCache,
}
PICKERS: dict[PickerName, Callable[[RandomSource], Picker]] = {
    PickerName.MAX_SCORE: MaxScore,
    PickerName.POWER_OF_TWO: PowerOfTwo,
}
MAX_CANDIDATES = 8


class Selection:
    """The steps, in the order in which they are taken.

    Args:
        pool: the endpoints to choose from.
        plan: names scorers and picker.
        random: decides between equals.
    """

    def __init__(self, pool: EndpointSet, plan: SelectionPlan, random: RandomSource) -> None:
        self._pool = pool
        self._filters = [make() for make in FILTERS]
        self._budgets = [make(pool) for make in BUDGETS]
        self._random = random
        self.reconfigure(plan)

    def reconfigure(self, plan: SelectionPlan) -> None:
        """Take a new plan, which counts from the next choice on."""
        # Scores are only compared, so one scorer alone needs no weight.
        alone = len(plan.scorers) == 1
        self._scorers = [
            (SCORERS[scorer.type](self._pool), 1.0 if alone else float(scorer.weight))
            for scorer in plan.scorers
        ]
        self._picker = PICKERS[plan.picker](self._random)

    def pick(self, request: Request, now: float) -> TrackedEndpoint | Miss:
        """Choose among the endpoints of its subset that have a free slot, or say why none is.

        Args:
            request: the request to choose for.
            now: monotonic seconds.
        """
        endpoints = self._pool.open_within(request.subset)
        if len(endpoints) > MAX_CANDIDATES:
            some = self._sample(endpoints)
            if request.prefix:
                some += self._holders(request, some)
            found = self._pick(request, some, now)
            if not isinstance(found, Miss):
                return found
        return self._pick(request, endpoints, now)

    def _sample(self, endpoints: Sequence[TrackedEndpoint]) -> list[TrackedEndpoint]:
        """Return `MAX_CANDIDATES` of more endpoints: neighbours, from one drawn at random on."""
        start = self._random.randrange(len(endpoints))
        some = endpoints[start : start + MAX_CANDIDATES]
        return [*some, *endpoints[: MAX_CANDIDATES - len(some)]]

    def _holders(
        self, request: Request, others: Sequence[TrackedEndpoint]
    ) -> list[TrackedEndpoint]:
        """Return those that have its prompt's beginning cached, which chance may have passed by."""
        return [
            endpoint
            for endpoint in self._pool.prefixes.holders(request)
            if endpoint.free > 0
            and endpoint not in others
            and (request.subset is None or endpoint.address in request.subset)
        ]

    def pick_regardless(self, request: Request, now: float) -> TrackedEndpoint | None:
        """Choose among all endpoints of its subset, whether they have a free slot or not.

        Those that are left out for their failures, and those that the filters leave out, get it
        only where there is no other. None where the subset has no endpoint.

        Args:
            request: the request to choose for.
            now: monotonic seconds.
        """
        endpoints = self._pool.within(request.subset)
        some = self._sample(endpoints) if len(endpoints) > MAX_CANDIDATES else endpoints
        usable = [endpoint for endpoint in some if endpoint.usable]
        usable = usable or [endpoint for endpoint in endpoints if endpoint.usable]
        fit: Sequence[TrackedEndpoint] = usable
        for step in self._filters:
            fit = step.keep(request, fit, now)
        found = fit or usable or endpoints
        return self._best(request, found, now) if found else None

    def _pick(
        self, request: Request, endpoints: Sequence[TrackedEndpoint], now: float
    ) -> TrackedEndpoint | Miss:
        for step in self._filters:
            endpoints = step.keep(request, endpoints, now)
        if not endpoints:
            return Miss.UNFIT
        for step in self._budgets:
            endpoints = step.keep(request, endpoints, now)
        return self._best(request, endpoints, now) if endpoints else Miss.NO_ROOM

    def _best(
        self, request: Request, endpoints: Sequence[TrackedEndpoint], now: float
    ) -> TrackedEndpoint:
        if len(endpoints) == 1:
            return endpoints[0]
        totals: list[float] = []
        for scorer, weight in self._scorers:
            scores = scorer.score(request, endpoints, now)
            if not scores:
                continue
            if totals:
                pairs = zip(totals, scores, strict=True)
                totals = [total + weight * score for total, score in pairs]
            elif weight != 1.0:
                totals = [weight * score for score in scores]
            else:
                totals = scores
        if not totals:
            totals = [0.0] * len(endpoints)
        return self._picker.pick(endpoints, totals)
