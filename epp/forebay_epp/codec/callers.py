"""What callers say of their requests in headers, as far as the plan trusts them.

Headers that the plan does not trust are not read. Flow control acts on the others.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec

from forebay_control.plan import MAX_NAME_LENGTH, MAX_SECONDS, MAX_TENANT_LENGTH

if TYPE_CHECKING:
    from collections.abc import Mapping

    from forebay_control.plan import Plan

# The first of each is the name of today, the others are its older ones.
OBJECTIVE = ("x-llm-d-inference-objective", "x-gateway-inference-objective")
TENANT = ("x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id")
DUE = ("x-llm-d-slo-ttft-ms", "x-slo-ttft-ms")
TTL = ("x-forebay-ttl-ms",)

MAX_MILLISECONDS = MAX_SECONDS * 1000


class BadHeaderError(Exception):
    """A header has a value that it cannot have; the text is for the client."""


class Caller(msgspec.Struct, frozen=True, gc=False):
    """What one request's headers say.

    Attributes:
        objective: the InferenceObjective it names; "" for none.
        tenant: whose it is; "" where that is not said.
        due_in_seconds: when its answer should begin; None where that is not said.
        ttl_seconds: how long it may wait; infinity where that is not said.
    """

    objective: str = ""
    tenant: str = ""
    due_in_seconds: float | None = None
    ttl_seconds: float = math.inf


SILENT = Caller()


class CallerHeaders:
    """The headers that a plan trusts.

    Attributes:
        names: all of them, in lower case.
    """

    __slots__ = ("_due", "_objective", "_tenant", "_ttl", "names")

    def __init__(self, plan: Plan) -> None:
        self._objective = OBJECTIVE if plan.trust_objective_header else ()
        header = plan.tenant_header
        # Either name means the pair.
        self._tenant = TENANT if header in TENANT else (header,) if header else ()
        self._due = DUE if plan.trust_deadline_headers else ()
        self._ttl = TTL if plan.trust_deadline_headers else ()
        self.names = frozenset((*self._objective, *self._tenant, *self._due, *self._ttl))

    def read(self, headers: Mapping[str, str]) -> Caller:
        """Read what a request's headers say.

        Raises:
            BadHeaderError: one that must be a number is none.
        """
        if self.names.isdisjoint(headers):
            return SILENT
        due_in_seconds = _seconds(headers, self._due)
        ttl_seconds = _seconds(headers, self._ttl)
        return Caller(
            _first(headers, self._objective)[1][:MAX_NAME_LENGTH],
            _first(headers, self._tenant)[1][:MAX_TENANT_LENGTH],
            due_in_seconds,
            math.inf if ttl_seconds is None else ttl_seconds,
        )


def _first(headers: Mapping[str, str], names: tuple[str, ...]) -> tuple[str, str]:
    """Return the first of these headers that is present, and its value; empty if none is."""
    return next(((name, headers[name]) for name in names if name in headers), ("", ""))


def _seconds(headers: Mapping[str, str], names: tuple[str, ...]) -> float | None:
    name, text = _first(headers, names)
    if not name:
        return None
    try:
        milliseconds = float(text)
    except ValueError:
        milliseconds = math.nan
    if not 0.0 < milliseconds <= MAX_MILLISECONDS:
        raise BadHeaderError(
            f"header {name} must be a number of milliseconds above 0 and at most "
            f"{MAX_MILLISECONDS}, is {text[:40]!r}"
        )
    return milliseconds / 1000
