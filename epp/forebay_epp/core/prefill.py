"""The prompts that wait in one server to be prefilled, and how fast it prefills them.

Whether another prompt may go there does not belong here (selection/budgets.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay_epp.core.terms import NEVER

if TYPE_CHECKING:
    from forebay_epp.core.terms import EndpointMetrics, Request

LEAST_TOKENS = 2048  # of prompts that may always be there together: a step takes as many at once
LONG_TOKENS = 8192  # of a backlog that fills several steps
SLOW_STEPS = 2.0  # times the fastest: then a step prefills
FORGETTING = 1.01  # of the fastest step, for each page
SMOOTHING = 0.3


class Prefill:
    """The backlog of prompt tokens of one endpoint.

    Engines take prompts in order of arrival, so the beginning of an answer shows that the prompts
    that were sent before its own are done, and so do steps as fast as without any. vLLM counts the
    tokens of a prompt only when all of it is done, so in between the backlog is taken to fall at
    the rate that is known. The rate is learned from long backlogs: what was sent until such a
    backlog was there, over the time until it is known to be done. It is not known before.

    Attributes:
        rate: prompt tokens per second, 0 until it is known.
    """

    __slots__ = (
        "_done",
        "_drained_at",
        "_fastest",
        "_long_from",
        "_long_mark",
        "_long_since",
        "_paged_at",
        "_sent",
        "_sent_before",
        "_steps",
        "rate",
    )

    def __init__(self) -> None:
        self.rate = 0.0
        self._sent = 0.0
        self._sent_before = 0.0  # the last page
        self._done = 0.0
        self._drained_at = 0.0
        self._steps: float | None = None
        self._paged_at = 0.0
        self._fastest = NEVER  # seconds of a step
        self._long_mark = 0.0  # the end of a backlog that was long
        self._long_from = 0.0  # its beginning
        self._long_since = NEVER

    @property
    def backlog(self) -> float:
        """Prompt tokens that were sent and are not yet prefilled, as far as is known."""
        return self._sent - self._done

    def sent(self, request: Request, now: float) -> None:
        """Add a prompt, and write on its request where it stands."""
        if self.rate:
            self.drain(now)
        sent = self._sent = self._sent + request.prompt_tokens - request.cached_tokens
        request.prefill_mark = sent
        if sent - self._done >= LONG_TOKENS and self._long_since == NEVER:
            self._long_mark, self._long_from, self._long_since = sent, self._done, now

    def begun(self, request: Request, now: float) -> None:
        """Take note that an answer has begun: its prompt is done, and all before it."""
        mark = request.prefill_mark
        if mark > self._done:
            self._finish(mark, now)

    def ended(self, request: Request) -> None:
        """Take note that an answer has ended, so that its prompt is done, though not since when.

        That of an answer that is not streamed was done long before.
        """
        mark = request.prefill_mark
        if mark > self._done:
            self._done = mark
            if mark >= self._long_mark:
                self._long_since = NEVER

    def idle(self) -> None:
        """Take note that nothing of ours is in the server."""
        self._done = self._sent
        self._long_since = NEVER

    def observe(self, page: EndpointMetrics) -> None:
        """Learn from the number of steps since the page before how fast they are."""
        if page.steps is None:
            return
        known, self._steps = self._steps, page.steps
        seconds, self._paged_at = page.started_at - self._paged_at, page.started_at
        sent_before, self._sent_before = self._sent_before, self._sent
        self.drain(page.started_at)
        if known is None or page.steps <= known or seconds <= 0:
            return
        step_seconds = seconds / (page.steps - known)
        self._fastest = min(self._fastest * FORGETTING, step_seconds)
        if step_seconds < SLOW_STEPS * self._fastest:
            self._finish(sent_before, page.started_at)

    def drain(self, now: float) -> None:
        """Let the backlog fall at the known rate."""
        seconds = now - self._drained_at
        if seconds > 0:
            self._drained_at = now
            self._done = min(self._sent, self._done + self.rate * seconds)

    def room(self, seconds: float) -> float:
        """Return how many more tokens may wait so that none waits longer than these seconds."""
        backlog = self._sent - self._done
        if not self.rate or backlog <= 0:
            return NEVER
        return max(LEAST_TOKENS, self.rate * seconds) - backlog

    def _finish(self, mark: float, now: float) -> None:
        """Take note that what was sent up to a mark is done."""
        self._done = max(self._done, mark)
        if self._long_since < now and mark >= self._long_mark:
            rate = (self._long_mark - self._long_from) / (now - self._long_since)
            self.rate += (SMOOTHING if self.rate else 1.0) * (rate - self.rate)
            self._long_since = NEVER
