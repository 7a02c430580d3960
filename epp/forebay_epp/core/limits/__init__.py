"""How many slots an endpoint has: a limit that the plan gives, or one that is learned.

A limit estimates a number from what scrapes show. Spending it does not belong here (tracked.py).
To add a strategy, write a class with the methods of `Limit` in a file of its own, name it in
`forebay_control.plan.SaturationMode` and enter it in `LIMITS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from forebay_control.plan import SaturationMode
from forebay_epp.core.limits.adaptive import AdaptiveLimit
from forebay_epp.core.limits.fixed import FixedLimit

if TYPE_CHECKING:
    from collections.abc import Callable

    from forebay_control.plan import SaturationPlan
    from forebay_epp.core.terms import EndpointMetrics


class Limit(Protocol):
    """The limit of one endpoint.

    Attributes:
        value: slots.
        closing_kv_usage: a KV cache this full, as a fraction, closes an endpoint that is not idle.
        settled_until: until when, in monotonic seconds, `value` is taken for the server's capacity.
    """

    value: int
    closing_kv_usage: float
    settled_until: float

    @property
    def learned(self) -> bool:
        """Whether scrapes count.

        Only then do other clients' requests that they show take slots, and do requests whose end
        is not reported hold theirs until a scrape.
        """

    def reconfigure(self, plan: SaturationPlan) -> None:
        """Take a new plan of the same mode."""

    def started(self, running: int) -> None:
        """Learn that so many requests run, because their answers have begun."""

    def stuck(self) -> None:
        """Learn that what was sent does not begin, though others have begun sooner."""

    def ended(self, now: float, *, occupied: bool) -> None:
        """Learn that an answer has ended, before which all slots were taken or not."""

    def observe(
        self, page: EndpointMetrics, occupancy: int, arrivals: int, ended: int, now: float
    ) -> None:
        """Learn from one scrape.

        Args:
            page: what it said.
            occupancy: slots this EPP counts as taken.
            arrivals: requests sent to the server since the scrape before was started.
            ended: answers that have ended since then.
            now: monotonic seconds.
        """


LIMITS: dict[SaturationMode, Callable[[SaturationPlan], Limit]] = {
    SaturationMode.ADAPTIVE: AdaptiveLimit,
    SaturationMode.CONCURRENCY: FixedLimit,
}
