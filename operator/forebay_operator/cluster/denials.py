"""The rights that the API server denies the operator, by namespace and resource.

A right that is missing in one namespace is reported and costs only that namespace. Each change is
reported once: in the log, in a metric, and to listeners. What to do without the right is decided
where it is missing.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from forebay_operator import metrics

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_NAMED = 10

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Denial:
    """A denied right: `resource` is the plural with its group, `namespace` "" the whole cluster."""

    resource: str
    namespace: str
    message: str

    def __str__(self) -> str:
        where = f"namespace {self.namespace}" if self.namespace else "the cluster"
        return f"{self.resource} in {where}: {self.message}"


class Denials:
    """The rights that are denied now.

    Args:
        tell: called with each new denial (True) and each that has ended (False).
    """

    def __init__(self, tell: Callable[[Denial, bool], None] = lambda _denial, _new: None) -> None:
        self._tell = tell
        self._held: dict[tuple[str, str], Denial] = {}

    def deny(self, resource: str, namespace: str, message: str) -> bool:
        """Note a denial; return whether it is new, which another message alone does not make it."""
        key = (resource, namespace)
        new = key not in self._held
        self._held[key] = denial = Denial(resource, namespace, message)
        if new:
            _log.error("denied: %s", denial)
            self._count(resource)
            self._tell(denial, True)
        return new

    def allow(self, resource: str, namespace: str) -> bool:
        """Note that a right works; return whether it was denied before."""
        denial = self._held.pop((resource, namespace), None)
        if denial is None:
            return False
        _log.info("no longer denied: %s", denial)
        self._count(resource)
        self._tell(denial, False)
        return True

    def holds(self, resource: str, namespace: str) -> bool:
        """Return whether a right is denied."""
        return (resource, namespace) in self._held

    def of(self, namespace: str) -> list[Denial]:
        """Return the denials that concern a namespace."""
        return [denial for denial in self._held.values() if denial.namespace in ("", namespace)]

    def __str__(self) -> str:
        """Describe them, for people."""
        lines = [str(self._held[key]) for key in sorted(self._held)]
        more = len(lines) - MAX_NAMED
        return "\n".join(lines[:MAX_NAMED] + ([f"and {more} more"] if more > 0 else []))

    def _count(self, resource: str) -> None:
        held = sum(denial.resource == resource for denial in self._held.values())
        metrics.DENIED.labels(resource).set(held)
