"""From the resources of one pool to its Plan and endpoints, and what is wrong with them. Pure.

`plan` does it for one pool. What a Plan is belongs in forebay_control, how resources come here in
cluster/ and standalone/, and how a plan travels in channel/.
"""

from __future__ import annotations

from forebay_operator.planning.changes import differences
from forebay_operator.planning.detached import unattached
from forebay_operator.planning.membership import (
    Holdings,
    claimant,
    means,
    not_a_pool,
    pools,
)
from forebay_operator.planning.planned import Planned, held, plan
from forebay_operator.planning.problem import Problem

__all__ = [
    "Holdings",
    "Planned",
    "Problem",
    "claimant",
    "differences",
    "held",
    "means",
    "not_a_pool",
    "plan",
    "pools",
    "unattached",
]
