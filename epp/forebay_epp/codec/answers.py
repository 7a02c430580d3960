"""What the status of an answer says about the server that gave it.

Acting on it belongs in core/health.py.
"""

from __future__ import annotations

from forebay_epp.core.terms import Verdict

# A proxy answers with these for a server that it cannot reach or that breaks off, and servers do
# for what they depend on. 501, 505 and similar are about the request.
_UNREACHABLE = frozenset({502, 503, 504})


def verdict(status: int, *, whole: bool = True) -> Verdict:
    """Judge an answer.

    Args:
        status: of HTTP; 0 is none.
        whole: whether the answer came to its end. One that breaks off may be the server's fault or
            that of a client who has left: the proxy shows both in the same way.
    """
    if status == 0 or (not whole and status < 400):
        return Verdict.UNKNOWN
    if status in _UNREACHABLE:
        return Verdict.UNREACHABLE
    return Verdict.ERROR if status == 500 else Verdict.GOOD
