"""Fairness policies: which flow of one band is next.

A policy is the queue of all requests that compete for the same endpoints in one band; inside a
flow the ordering decides. Adding a policy is a class, a line in FAIRNESS and a plan.FairnessName.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay_control.plan import FairnessName
from forebay_epp.core.fairness.fcfs import FCFS
from forebay_epp.core.fairness.round_robin import RoundRobin

if TYPE_CHECKING:
    from collections.abc import Callable

    from forebay_epp.core.ordering import Ordering

Fairness = FCFS | RoundRobin

FAIRNESS: dict[FairnessName, Callable[[Callable[[], Ordering]], Fairness]] = {
    FairnessName.FCFS: FCFS,
    FairnessName.ROUND_ROBIN: RoundRobin,
}
