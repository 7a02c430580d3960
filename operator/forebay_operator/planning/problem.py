"""A problem of a resource, described for its owner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forebay_operator.resources import Metadata


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a resource has no effect, or not all of it.

    Attributes:
        kind: of the resource.
        name: namespace/name of it.
        reason: one word in CamelCase, as in a condition.
        message: what is wrong and what to do.
        pool: where it is, if that matters.
    """

    kind: str
    name: str
    reason: str
    message: str
    pool: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.reason}: {self.message}"


def problem_of(kind: str, metadata: Metadata, reason: str, message: str, pool: str = "") -> Problem:
    """Return the problem of the resource with this metadata."""
    return Problem(kind, f"{metadata.namespace}/{metadata.name}", reason, message, pool)
