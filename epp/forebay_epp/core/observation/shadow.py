"""A plan that is tried on live traffic: the same requests, in a controller that decides nothing.

**How long an answer takes there.** Its end cannot be seen, for the real request was sent at another
moment and perhaps to another server. So a request's service time is taken from the real one, from
dispatch to end, and begins when the shadow dispatches it: what is the server's in a request's time
moves with it, what is the queue's does not. The same holds for the time to the first token. Where
the real end comes first, because the shadow lets the request wait, the end waits with it; where the
shadow has sent it, the end is due that much later. These ends, and the TTLs, happen at their own
moments, in order, however late the caller comes: `advance` goes through them before anything else
is told. So with service times that do not depend on the load, the shadow decides exactly what a
controller in force would have decided (tests/scenarios/test_shadow.py).

**What it cannot know.** Servers that hold more requests answer more slowly. Where real requests are
not held back the service times are those of servers as full as that, and the waits come out longer
than they would be. A client that goes away does so at its own time, whatever it waits for then.

**What servers report** is about the real requests. The page that the shadow gets is the one that
they would show with its requests in place of the real ones: see `as_if`.
"""

from __future__ import annotations

from dataclasses import replace
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from forebay_control.plan import Mode
from forebay_epp.core.controller import FlowController
from forebay_epp.core.terms import NEVER, Dispatched, Outcome, Request, Shadowed, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable

    from forebay_control.plan import Plan
    from forebay_epp.core.terms import (
        ControllerState,
        Decision,
        Endpoint,
        EndpointMetrics,
        RandomSource,
        Usage,
    )

BEGINS, ENDS = 0, -1


class _Life:
    """A request here and there.

    Attributes:
        real: the one in force.
        request: the shadow's.
        number: grows by order of arrival.
        sent_at: when the shadow dispatched it, in monotonic seconds; infinity until then.
        steps: of the real answer while the shadow has not dispatched it: seconds after the real
            dispatch, and tokens by then; `BEGINS` and `ENDS` are its first and its last.
        usage: as `FlowController.complete` takes it, and so are the rest.
    """

    __slots__ = (
        *("blind", "number", "real", "request", "sent_at", "steps"),
        *("usage", "verdict"),
    )

    def __init__(self, real: Request, request: Request, number: int) -> None:
        self.real = real
        self.request = request
        self.number = number
        self.sent_at = NEVER
        self.steps: list[tuple[float, int]] = []
        self.usage: Usage | None = None
        self.verdict = Verdict.UNKNOWN
        self.blind = False


class Shadow:
    """A plan, computed beside the one in force.

    Args:
        plan: a plan; validated. It is computed as if it were enforced.
        random: as the controller's.

    Raises:
        PlanError: the plan is not valid.
    """

    def __init__(self, plan: Plan, random: RandomSource) -> None:
        self._controller = FlowController(replace(plan, mode=Mode.ENFORCE), random)
        self._lives: dict[int, _Life] = {}
        self._events: list[tuple[float, int, int, _Life]] = []  # when, order, tokens
        self._order = 0
        self._number = 0
        self._last_sent = 0
        self._now = 0.0
        self._moved = False  # a step of an answer has happened since the last poll
        self._decisions: list[Shadowed] = []

    # --- configuration and observation

    def reconfigure(self, plan: Plan, now: float) -> None:
        """Take a new plan; what waits here stays.

        Raises:
            PlanError: the plan is not valid; the one before stays.
        """
        self.advance(now)
        self._controller.reconfigure(replace(plan, mode=Mode.ENFORCE), now)
        self._settle(now)

    def set_endpoints(self, endpoints: Iterable[Endpoint], now: float) -> None:
        """Take these endpoints for the pool's."""
        self.advance(now)
        self._controller.set_endpoints(endpoints, now)
        self._settle(now)

    def observe(self, metrics: EndpointMetrics, real: int, now: float) -> None:
        """Take what a scrape said of a server that held so many of the real requests."""
        self.advance(now)
        ours = self._controller.in_flight_at(metrics.address)
        self._controller.observe(as_if(metrics, real, ours), now)
        self._settle(now)

    def scrape_failed(self, address: str, now: float, *, refused: bool) -> None:
        """Note that a scrape has failed."""
        self.advance(now)
        self._controller.scrape_failed(address, now, refused=refused)
        self._controller.take_health_changes()
        self._settle(now)

    # --- requests

    def submit(self, real: Request, now: float) -> None:
        """Take a request of which the caller's fields are set."""
        self.advance(now)
        request = Request(
            real.id,
            real.model,
            real.size_bytes,
            real.subset,
            real.objective,
            real.deadline,
            real.tenant,
            real.due_in_seconds,
            real.prefix,
        )
        self._number += 1
        self._lives[real.id] = _Life(real, request, self._number)
        self._controller.submit(request, now)
        self._settle(now)

    def cancel(self, request_id: int, now: float) -> None:
        """The client has gone, or the real request was refused: it takes part no longer."""
        self.advance(now)
        if request_id in self._lives:
            self._controller.cancel(request_id, now)
            self._settle(now)
            self._lives.pop(request_id, None)

    def first_token(self, request_id: int, now: float) -> None:
        """The real answer has begun."""
        self._step(request_id, BEGINS, now)

    def progress(self, request_id: int, answer_tokens: int, now: float) -> None:
        """The real answer has come to so many tokens so far."""
        self._step(request_id, answer_tokens, now)

    def complete(
        self, request_id: int, usage: Usage | None, now: float, verdict: Verdict, *, blind: bool
    ) -> None:
        """The real answer has ended. Without a verdict its client has gone away."""
        if verdict is Verdict.UNKNOWN and not blind:
            self.cancel(request_id, now)
            return
        if (life := self._lives.get(request_id)) is not None:
            life.usage, life.verdict, life.blind = usage, verdict, blind
            self._step(request_id, ENDS, now)

    # --- time

    def advance(self, now: float) -> None:
        """Let everything happen that is due, each at its own moment."""
        events = self._events
        controller = self._controller
        while True:
            at = events[0][0] if events else NEVER
            wakeup = controller.next_wakeup()
            if wakeup is not None and wakeup < at:
                at = wakeup
            if at > now:
                break
            self._now = max(self._now, at)
            if events and events[0][0] <= self._now:
                _, _, tokens, life = heappop(events)
                self._happen(life, tokens)
            self._settle(self._now)
        self._now = now

    # --- what comes of it

    def take_decisions(self, now: float) -> list[Shadowed]:
        """Return what was decided since the last call."""
        self.advance(now)
        decisions, self._decisions = self._decisions, []
        return decisions

    def state(self, now: float, max_flows: int | None = None) -> ControllerState:
        """As `FlowController.state`."""
        self.advance(now)
        return self._controller.state(now, max_flows)

    # --- inside

    def _settle(self, now: float) -> None:
        self._moved = True
        while self._moved:
            self._moved = False
            for decision in self._controller.poll(now):
                self._decide(decision, now)

    def _decide(self, decision: Decision, now: float) -> None:
        life = self._lives[decision.request_id]
        overtaken = False
        if isinstance(decision, Dispatched):
            overtaken = life.number < self._last_sent
            self._last_sent = max(self._last_sent, life.number)
            life.sent_at = now
            for seconds, tokens in life.steps:
                self._schedule(now + seconds, life, tokens)
        else:
            del self._lives[decision.request_id]
            if decision.outcome is Outcome.EVICTED_CANCELLED:
                return  # its client has gone, whatever the plan
        self._decisions.append(Shadowed(life.request, decision, overtaken))

    def _step(self, request_id: int, tokens: int, now: float) -> None:
        """Let a step of the real answer happen as long after the dispatch here as there."""
        self.advance(now)
        life = self._lives.get(request_id)
        if life is None:
            return
        sent_at = life.real.dispatched_at
        if life.sent_at == NEVER:
            life.steps.append((now - sent_at, tokens))
        else:
            at = now if life.sent_at == sent_at else life.sent_at + (now - sent_at)
            self._schedule(at, life, tokens)
            if self._moved:
                self._settle(now)

    def _schedule(self, at: float, life: _Life, tokens: int) -> None:
        if at <= self._now:
            self._happen(life, tokens)
        else:
            self._order += 1
            heappush(self._events, (at, self._order, tokens, life))

    def _happen(self, life: _Life, tokens: int) -> None:
        """Let a step of an answer happen, unless the request was cancelled meanwhile."""
        request_id = life.request.id
        if self._lives.get(request_id) is not life:
            return
        self._moved = True
        if tokens == BEGINS:
            self._controller.first_token(request_id, self._now)
        elif tokens != ENDS:
            self._controller.progress(request_id, tokens, self._now)
        else:
            del self._lives[request_id]
            # Only about the server that gave the answer does it say anything.
            same = life.request.endpoint == life.real.endpoint
            verdict = life.verdict if same or life.verdict is Verdict.GOOD else Verdict.UNKNOWN
            self._controller.complete(request_id, life.usage, self._now, verdict, blind=life.blind)


def as_if(page: EndpointMetrics, real: int, ours: int) -> EndpointMetrics:
    """Return the page that a server would show with other requests of ours in it.

    What is foreign stays. The batch is as large as it is seen to be where requests wait beside it,
    and takes all where none does. The KV cache is used in proportion to what runs.

    Args:
        page: the one that it shows.
        real: how many requests of ours it holds.
        ours: how many of them it would hold.
    """
    held = page.running + page.waiting
    would = max(0, held - real) + ours
    if would == held:
        return page
    running = min(would, page.running) if page.waiting else would
    usage = page.kv_usage
    if usage is not None and page.running:
        usage = min(1.0, usage * running / page.running)
    return replace(page, running=running, waiting=would - running, kv_usage=usage)
