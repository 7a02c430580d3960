"""Requests as an observer of the data plane sees them, in a few words."""

from __future__ import annotations

from forebay_epp.codec.extproc.events import Finished
from forebay_epp.codec.openai import Usage
from forebay_epp.core.terms import Dispatched, Outcome, Refused, Request


def request(band: str = "Standard", flow: str = "chat") -> Request:
    """A request that arrived and was dispatched at 0."""
    return Request(1, flow, 10, band=band, flow=flow)


def decide(observer, band: str, flow: str, outcome: Outcome, waited_seconds: float = 0.0) -> None:
    """Tell of a request that has left flow control."""
    if outcome is Outcome.DISPATCHED:
        decision = Dispatched(1, "10.0.0.1:8000", waited_seconds)
    else:
        decision = Refused(1, outcome, 1, waited_seconds, "")
    observer.decided(request(band, flow), decision, waited_seconds)


def complete(
    observer, band: str, flow: str, status: int, seconds: float, prompt: int, completion: int
) -> None:
    """Tell of the end of an answer, so long after the request arrived."""
    finished = Finished(status, Usage(prompt, completion), whole=True)
    observer.completed(request(band, flow), finished, seconds)
