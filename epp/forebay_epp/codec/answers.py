"""What the status of an answer says about the server that gave it.

What follows from it does not belong here (core/health.py).
"""

from __future__ import annotations

from forebay_epp.core.terms import Verdict

# A proxy answers with these for a server that it cannot reach or that breaks off, and servers do
# for what they depend on. 501 and 505 and the like are about the request.
_UNREACHABLE = frozenset({502, 503, 504})


def verdict(status: int) -> Verdict:
    """Judge an answer by its HTTP status; 0 is none."""
    if status == 0:
        return Verdict.UNKNOWN
    if status in _UNREACHABLE:
        return Verdict.UNREACHABLE
    return Verdict.ERROR if status == 500 else Verdict.GOOD
