"""How many slots an endpoint has: a limit that the plan gives, or one that is learned.

A limit estimates a number from what scrapes show. Spending it does not belong here (endpoints.py).
"""

from forebay_epp.core.limits.adaptive import AdaptiveLimit
from forebay_epp.core.limits.fixed import FixedLimit

Limit = FixedLimit | AdaptiveLimit

__all__ = ["AdaptiveLimit", "FixedLimit", "Limit"]
