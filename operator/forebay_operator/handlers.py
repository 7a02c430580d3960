"""Every kopf decorator there is: the index of what the operator reacts to.

Only `on.event`: kopf's other handlers write annotations or finalizers on objects that are not ours
(facts/reliability.md 1.4). Handlers note what they are told and return; planning happens elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import kopf

from forebay_operator import cluster
from forebay_operator.resources import KINDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from forebay_operator.resources import Kind


def registry(on_event: Callable[[Kind, Any], None]) -> kopf.OperatorRegistry:
    """Return a registry in which every kind that is read has a handler."""
    found = kopf.OperatorRegistry()

    @kopf.on.login(registry=found)
    def login(**_: Any) -> kopf.ConnectionInfo:
        return cluster.login()

    for kind in KINDS:
        _watch(found, kind, on_event)
    return found


def _watch(found: kopf.OperatorRegistry, kind: Kind, on_event: Callable[[Kind, Any], None]) -> None:
    @kopf.on.event(
        group=kind.group, version=kind.version, plural=kind.plural, id="event", registry=found
    )
    async def event(event: Any, **_: Any) -> None:
        on_event(kind, event)
