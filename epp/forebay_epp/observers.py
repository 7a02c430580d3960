"""Observers of the data plane, such as metrics (traffic.py) and the log.

An observer is called for every step of every request on the data-plane thread, so a method costs
well under a microsecond, does not block and does not raise. `now` is monotonic seconds.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from forebay_control.plan import Plan
    from forebay_epp.codec.extproc.events import Arrived, Finished
    from forebay_epp.core.terms import Decision, HealthChange, Outcome, Request, Shadowed, Usage


class Watch(StrEnum):
    """What became of a stream that shows an answer."""

    TIED = "tied"
    UNTIED = "untied"  # the proxy has no filter that ties, or passed this request by it
    UNKNOWN = "unknown"  # the tie is another EPP's, was claimed before, or was given up
    MISSING = "missing"  # none has come for a request that was dispatched


class Observer:
    """Receives the events whose methods it overrides."""

    def reconfigured(self, plan: Plan) -> None:
        """A plan is in force, the first one too."""

    def stream_opened(self) -> None:
        """An ext_proc stream has begun."""

    def stream_refused(self) -> None:
        """A stream exceeds the limit; `stream_opened` was called, and `stream_closed` will be."""

    def stream_closed(self) -> None:
        """An ext_proc stream is gone."""

    def arrived(self, request_id: int, event: Arrived, now: float) -> None:
        """A request is complete; either `answered` or `decided` follows."""

    def answered(self, request_id: int, outcome: Outcome, now: float) -> None:
        """The EPP has answered a request that was never submitted; it may not have arrived."""

    def decided(self, request: Request, decision: Decision, now: float) -> None:
        """A request has left flow control. `completed` follows where it was dispatched."""

    def first_token(self, request: Request, now: float) -> None:
        """The answer to a dispatched request has begun."""

    def completed(self, request: Request, event: Finished, now: float) -> None:
        """A dispatched request has ended."""

    def estimated(self, request: Request, usage: Usage) -> None:
        """A completed request that had no usage is taken to have used so much."""

    def watched(self, kind: Watch) -> None:
        """A stream that shows an answer has come, or one that was expected has not."""

    def shadowed(self, shadowed: Shadowed) -> None:
        """A plan that only observes would have decided this about a request."""

    def health_changed(self, change: HealthChange) -> None:
        """An endpoint is left out because it fails, or is back."""

    def stalled(self, seconds: float) -> None:
        """A turn of the data plane came late by so much."""


_METHODS = tuple(name for name in vars(Observer) if not name.startswith("_"))


class Observers(Observer):
    """Several observers as one.

    A method that one of them overrides is that one's own, so several cost no more than each does.
    """

    def __init__(self, *observers: Observer) -> None:
        for name in _METHODS:
            told = [
                getattr(observer, name)
                for observer in observers
                if getattr(type(observer), name) is not getattr(Observer, name)
            ]
            if told:
                setattr(self, name, told[0] if len(told) == 1 else _each(told))


def _each(methods: Sequence[Callable[..., None]]) -> Callable[..., None]:
    def tell(*arguments: object) -> None:
        for method in methods:
            method(*arguments)

    return tell
