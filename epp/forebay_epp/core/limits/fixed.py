"""A limit that the plan gives."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forebay_control.plan import SaturationPlan
    from forebay_epp.core.terms import EndpointMetrics


class FixedLimit:
    """The number of the plan. Scrapes do not change it, and it is settled for good."""

    __slots__ = ("closing_kv_usage", "settled_until", "value")

    learned = False

    def __init__(self, plan: SaturationPlan) -> None:
        self.settled_until = math.inf
        self.closing_kv_usage = math.inf  # scrapes do not count
        self.reconfigure(plan)

    def reconfigure(self, plan: SaturationPlan) -> None:
        """Take the number of a new plan."""
        self.value = plan.max_concurrency

    def started(self, running: int) -> None:
        """Learn nothing."""

    def stuck(self) -> None:
        """Learn nothing."""

    def ended(self, now: float, *, occupied: bool) -> None:
        """Change nothing."""

    def observe(
        self, page: EndpointMetrics, occupancy: int, arrivals: int, ended: int, now: float
    ) -> None:
        """Learn nothing."""
