"""Which answers of one endpoint have begun, and whether one that has not is stuck.

A server that runs a request begins its answer soon. One that has begun others, and does not begin
what it was sent, keeps it in a queue of its own. What follows from that belongs in limits/.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay_epp.core.terms import NEVER

if TYPE_CHECKING:
    from forebay_epp.core.terms import Request

STUCK_TTFTS = 3.0  # after so many usual times to the first token a request that was sent is stuck
SMOOTHING = 0.1


class Starts:
    """The answers to one endpoint's requests in flight.

    Attributes:
        begun: how many have begun.
    """

    __slots__ = ("_awaited", "_since", "_ttft_seconds", "begun")

    def __init__(self, now: float) -> None:
        self.begun = 0
        self._awaited = 0  # answers that will be seen to begin and have not
        self._since = now  # when one was sent, or another began, and did not yet begin
        self._ttft_seconds = NEVER  # usual time from dispatch to the first token

    def sent(self, request: Request, now: float) -> None:
        """A request is in flight."""
        if request.streamed:
            if not self._awaited:
                self._since = now
            self._awaited += 1

    def began(self, request: Request, now: float) -> None:
        """Its answer has begun."""
        self.begun += 1
        self._awaited -= request.streamed
        self._since = now
        seconds = now - request.dispatched_at
        if self._ttft_seconds == NEVER:
            self._ttft_seconds = seconds
        self._ttft_seconds += SMOOTHING * (seconds - self._ttft_seconds)

    def ended(self, request: Request) -> None:
        """It is not in flight any more."""
        if request.first_token_at < NEVER:
            self.begun -= 1
        else:
            self._awaited -= request.streamed

    def stuck(self, now: float) -> bool:
        """Whether one should have begun by now, since others have."""
        begin = self._awaited and self.begun
        return bool(begin and now > self._since + STUCK_TTFTS * self._ttft_seconds)
