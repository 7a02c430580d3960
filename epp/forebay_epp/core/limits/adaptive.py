"""A limit that is learned from what scrapes show and from answers that begin.

An engine of continuous batching queues internally in two cases that look alike: its batch is full,
or it cannot prefill prompts as fast as they come, because a step takes only so many tokens. Only
the first is a limit of slots. So the limit is the largest batch that was seen and a window beyond
it, and what is learned is the window:

* While no full batch is known the window is as small as growth allows, a sixteenth of the batch.
  Whatever runs raises the batch, whether a page shows it or its answer begins, and with it the
  window. That is exponential growth as in TCP's slow start (RFC 5681); the acknowledgement is the
  first token. No more than the window ever waits inside, so a batch that turns out to be full has
  cost little of the queue's order.
* Once the batch is full the window is what keeps steps full: as many requests stand by as end in a
  step and a half. An engine that loses less than `STANDBY_WORTH` of its slots without gets none.
  Now and then one more than the batch is tried, since a batch may grow.
* While steps are slow because prompts fill them, the window is what the engine takes in within
  `PREFILL_SECONDS` (Little, 1961): then steps stay full of prompts, and none waits for long. What
  fills a step is known from the largest that were seen; a step of a large batch is slow beside one
  of a small batch, and holds a few prompts, without being filled by them.

Requests that wait inside prove a full batch when there are more of them than were sent since the
page before, when the batch has kept its size for `STEADY_PAGES`, or when what was sent has not
begun for much longer than usual. They prove nothing while a page stands still, as vLLM's does
during a step, or while prompts fill the steps. A batch smaller than known is believed when requests
wait beside it for `SHRUNK_PAGES`. Where an engine does not count its steps and no answer is seen to
begin, pages alone have to do: learning is slower, and nothing stands by. Where pages show nothing
either, the limit climbs (climbing.py).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from forebay_epp.core.limits.climbing import Climb

if TYPE_CHECKING:
    from forebay_control.plan import SaturationPlan
    from forebay_epp.core.terms import EndpointMetrics

FIRST_WINDOW = 4
LEAST_WINDOW = 1
WINDOW_PART = 16  # of the batch
MAX_LIMIT = 100_000
STEADY_PAGES = 3
LONGEST_STEP_SECONDS = 0.1  # of an engine that does not count them
SHRUNK_PAGES = 5
SHRUNK_SECONDS = 0.7
STANDBY_WORTH = 0.01
PREFILL_SLOWDOWN = 2.0
FILLED_PART = 0.5  # of the tokens of the largest steps
PREFILL_SECONDS = 0.25
MIN_PROBE_SECONDS = 4.0
MAX_PROBE_SECONDS = 30.0
PROBE_SLOT_SECONDS = 500.0  # a probe costs little where it is one slot of many
SMOOTHING = 0.2


class AdaptiveLimit:
    """The limit of one endpoint, learned.

    Attributes:
        value: slots.
        batch: how many requests the engine is known to run at once.
        full: whether it is known not to run more.
        closing_kv_usage: a KV cache this full closes a busy endpoint.
        settled_until: until when, in monotonic seconds, the limit is taken for the capacity.
    """

    __slots__ = (
        "_arrivals",
        "_arrivals_before",
        "_batch_step_seconds",
        "_climb",
        "_crowded",
        "_ended",
        "_ended_per_step",
        "_ended_rate",
        "_least_step_seconds",
        "_most_step_tokens",
        "_observed_at",
        "_probe_at",
        "_shown",
        "_step_seconds",
        "_steps",
        "_stuck",
        "_tokens",
        "batch",
        "closing_kv_usage",
        "full",
        "settled_until",
        "value",
        "window",
    )

    learned = True

    def __init__(self, plan: SaturationPlan) -> None:
        self.batch = 0
        self.window = FIRST_WINDOW
        self.full = False
        self.value = FIRST_WINDOW
        self.settled_until = -math.inf
        self._stuck = False
        self._shown = False  # whether a page has shown anything in the server
        self._climb = Climb()
        self._steps: float | None = None
        self._tokens = 0.0
        self._least_step_seconds = math.inf
        self._step_seconds = 0.0
        self._most_step_tokens = 0.0
        self._batch_step_seconds = 0.0  # usual, while the batch is as large as is known
        self._ended_per_step = 0.0
        self._ended_rate = 0.0
        self._ended = 0  # since the last page that moved
        self._observed_at = -math.inf
        self._arrivals = self._arrivals_before = 0  # since the last page that moved, and before
        self._probe_at = -math.inf
        # Pages without a gap that found requests waiting for no other reason than a full batch:
        # running, when, and how many answers had ended since the page before.
        self._crowded: list[tuple[int, float, int]] = []
        self.reconfigure(plan)

    def reconfigure(self, plan: SaturationPlan) -> None:
        """Take a new plan and keep what has been learned."""
        self.closing_kv_usage = plan.kv_cache_usage_threshold

    def started(self, running: int) -> None:
        """Take note that so many requests run, because their answers have begun."""
        self._stuck = False
        if running > self.batch and not self.full:
            self._run(running)

    def stuck(self) -> None:
        """Take note that what was sent does not begin to run: none stands by until a page tells."""
        if not self.full and not self._stuck:
            self._stuck = True
            self._resize(0)

    def ended(self, now: float, *, occupied: bool) -> None:
        """Take note that an answer has ended, before which all slots were taken or not."""
        if self._shown or self.batch:
            return
        limit = self._climb.ended(self.value, now, occupied=occupied)
        if limit != self.value:
            self._resize(limit)

    def observe(
        self, page: EndpointMetrics, occupancy: int, arrivals: int, ended: int, now: float
    ) -> None:
        """Learn from one scrape.

        Args:
            page: what it said.
            occupancy: slots this EPP counts as taken.
            arrivals: requests sent to the server since the scrape before was started.
            ended: answers that have ended since then.
            now: monotonic seconds.
        """
        self._arrivals += arrivals
        self._ended += ended
        self._shown = self._shown or page.running + page.waiting > 0
        moved = self._moved(page)
        if moved is None:
            return
        steps, step_tokens = moved
        seconds, self._observed_at = min(2.0, now - self._observed_at), now
        ended, self._ended = self._ended, 0
        # What a page says was so at the end of a step, after the page before it was read.
        arrivals, self._arrivals, self._arrivals_before = (
            self._arrivals + self._arrivals_before,
            0,
            self._arrivals,
        )
        if seconds > 0:
            self._ended_rate += SMOOTHING * (ended / seconds - self._ended_rate)
        slow = filled = False
        if steps and seconds > 0:
            self._step_seconds = seconds / steps
            self._least_step_seconds = min(1.001 * self._least_step_seconds, self._step_seconds)
            self._ended_per_step += SMOOTHING * (ended / steps - self._ended_per_step)
            slow = self._step_seconds > PREFILL_SLOWDOWN * self._least_step_seconds
            self._most_step_tokens = max(0.999 * self._most_step_tokens, step_tokens)
            filled = step_tokens > FILLED_PART * self._most_step_tokens
        if page.running > self.batch:
            self._run(page.running)
        stuck, self._stuck = self._stuck, False
        if page.waiting == 0:
            self._crowded.clear()
            if occupancy >= self.value and page.running * 2 >= self.value:
                self._take_more(now)
        elif slow and filled and step_tokens > 2 * page.running and not self.full:
            self._crowded.clear()
            self._resize(max(1, math.ceil(PREFILL_SECONDS * self._ended_rate)))
        else:
            self._crowded.append((page.running, now, ended))
            del self._crowded[:-SHRUNK_PAGES]
            self._crowd(page, now, slow=slow, proven=stuck or page.waiting > arrivals)
        if stuck and not self.full:
            self._resize(self._least_window())

    def _moved(self, page: EndpointMetrics) -> tuple[float, float] | None:
        """Return the steps since the last page and tokens in each, or None if it stands still.

        An engine that does not count its steps is taken to move, in steps without tokens.
        """
        if page.steps is None:
            return 0.0, 0.0
        known, tokens = self._steps, self._tokens
        self._steps, self._tokens = page.steps, page.step_tokens
        if known is None or page.steps < known:  # the first page, or the engine was restarted
            return 0.0, 0.0
        steps = page.steps - known
        if not steps:
            return None
        return steps, max(0.0, page.step_tokens - tokens) / steps

    def _run(self, running: int) -> None:
        self.batch = running
        self.full = False
        self._resize(self._least_window())

    def _least_window(self) -> int:
        return max(LEAST_WINDOW, self.batch // WINDOW_PART, FIRST_WINDOW - self.batch)

    def _take_more(self, now: float) -> None:
        """Nothing stands by although all slots are taken: there may be more of them."""
        if self.full and now >= self._probe_at:
            self._probe_at = now + self._probe_seconds()
            self._resize(max(1, self._standby()))

    def _crowd(self, page: EndpointMetrics, now: float, *, slow: bool, proven: bool) -> None:
        """Requests wait for room in the batch, or just for the next step."""
        # A page may be of before some have ended, or of after it.
        counted = page.steps is not None
        ended = self._ended_per_step if counted else LONGEST_STEP_SECONDS * self._ended_rate
        turnover = 1.0 + 2.0 * ended
        if self.batch - page.running <= turnover:
            usual = self._batch_step_seconds or self._step_seconds
            self._batch_step_seconds = usual + SMOOTHING * (self._step_seconds - usual)
            if self.full:
                self._resize(self._standby())
                return
            pages, spread = (STEADY_PAGES, turnover) if counted else (SHRUNK_PAGES, 0.0)
            last = [running for running, _, _ in self._crowded[-pages:]]
            steady = len(last) == pages and max(last) - min(last) <= spread
            # Where prompts fill slow steps the batch keeps its size too, until one of it ends.
            ending = not slow or any(ended for _, _, ended in self._crowded)
            if (proven or steady) and ending:
                self._fill(max(self.batch, page.running), now)
        elif page.waiting <= turnover or self._step_seconds > 1.5 * self._batch_step_seconds > 0:
            self._crowded.clear()  # it waits for the next step, which prompts make a long one
        elif len(self._crowded) == SHRUNK_PAGES and now - self._crowded[0][1] >= SHRUNK_SECONDS:
            self._fill(max(running for running, _, _ in self._crowded), now)

    def _fill(self, batch: int, now: float) -> None:
        """The engine runs as many as it can."""
        self.batch = max(1, batch)
        if not self.full:
            self._probe_at = now + self._probe_seconds()
        self.full = True
        self.settled_until = math.inf
        self._resize(self._standby())

    def _probe_seconds(self) -> float:
        return min(MAX_PROBE_SECONDS, max(MIN_PROBE_SECONDS, PROBE_SLOT_SECONDS / self.batch))

    def _standby(self) -> int:
        """As many as end in a step, where it is worth it."""
        ended = self._ended_per_step
        return math.ceil(1.5 * ended) if ended > STANDBY_WORTH * self.batch else 0

    def _resize(self, window: int) -> None:
        self.window = window
        self.value = max(1, min(MAX_LIMIT, self.batch + window))
        if not self.full:
            self.settled_until = -math.inf
