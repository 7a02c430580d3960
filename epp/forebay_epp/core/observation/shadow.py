"""A plan that is tried on live traffic: the same requests, in a controller that decides nothing.

**How long an answer takes there.** Its end cannot be seen, for the real request was sent at another
moment and perhaps to another server. So a request's service time is taken from the real one, from
dispatch to end, and begins when the shadow dispatches it: what is the server's in a request's time
moves with it, what is the queue's does not. The same holds for the time to the first token.

**What time it is there.** Where the real end comes first, because the shadow lets the request wait,
the end waits with it. Where the shadow has sent a request earlier than it was sent in fact, its end
there is not known before it has happened here. So the shadow's clock stops short of what is not
known: at the dispatch of a request that waits in fact, and as long after it as the real answer has
taken so far. All that comes meanwhile is kept, with its moment, until the clock has reached it.
This is conservative simulation (Chandy and Misra, IEEE Trans. Software Engineering 5(5), 1979). The
shadow lags by no more than requests wait in fact; a plan that only observes holds none, and so its
shadow does not lag. Ends, TTLs and all else happen in order, each at its own moment, however late
the caller comes. So with service times that do not depend on the load, the shadow decides exactly
what a controller in force would have decided (tests/scenarios/test_shadow.py).

**What it cannot know.** Servers that hold more requests answer more slowly. Where real requests are
not held back the service times are those of servers as full as that, and the waits come out longer
than they would be. A request that the plan in force refuses has no answer: the mean of those that
there were is taken for its service time. A client that goes away does so at its own time, whatever
it waits for then.

**What servers report** is about the real requests. The page that the shadow gets is the one that
they would show with its requests in place of the real ones: see `as_if`. Tokens that are estimated
from pages are those of the real answers.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

from forebay_control.plan import Mode
from forebay_epp.core.controller import FlowController
from forebay_epp.core.terms import NEVER, Dispatched, Outcome, Request, Shadowed, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from forebay_control.plan import Plan
    from forebay_control.shares import Shares
    from forebay_epp.core.terms import (
        ControllerState,
        Decision,
        Endpoint,
        EndpointMetrics,
        RandomSource,
        Usage,
    )

BEGINS, ENDS = 0, -1
SMOOTHING = 0.05


class _Life:
    """A request here and there.

    Attributes:
        real: the one in force.
        request: the shadow's.
        number: grows by order of arrival.
        sent_at: when the shadow dispatched it, in monotonic seconds; infinity until then.
        known: whether its end is, however it has come.
        steps: of the real answer while the shadow has not dispatched it: seconds after the real
            dispatch, and tokens by then; `BEGINS` and `ENDS` are its first and its last.
        usage: as `FlowController.complete` takes it, and so are the rest.
    """

    __slots__ = (
        *("blind", "known", "number", "real", "request", "sent_at", "steps"),
        *("usage", "verdict"),
    )

    def __init__(self, real: Request, request: Request, number: int) -> None:
        self.real = real
        self.request = request
        self.number = number
        self.sent_at = NEVER
        self.known = False
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
        self._controller = FlowController(_enforced(plan), random)
        self._lives: dict[int, _Life] = {}
        self._inbox: deque[tuple[float, Callable[[Any, float], None], Any]] = deque()
        self._events: list[tuple[float, int, int, _Life]] = []  # when, order, tokens
        self._ahead: deque[_Life] = deque()  # sent here, and perhaps not yet in fact
        self._early: list[tuple[float, int, _Life]] = []  # sent here so much earlier than in fact
        self._order = 0
        self._number = 0
        self._last_sent = 0
        self._now = 0.0
        self._service_seconds = 0.0
        self._decisions: list[Shadowed] = []

    # --- configuration and observation

    def reconfigure(self, plan: Plan, now: float) -> None:
        """Take a new plan, which is valid; what waits here stays."""
        self._keep(now, self._controller.reconfigure, _enforced(plan))

    def set_endpoints(self, endpoints: Iterable[Endpoint], now: float) -> None:
        """Take these endpoints for the pool's."""
        self._keep(now, self._controller.set_endpoints, tuple(endpoints))

    def set_shares(self, shares: Shares, now: float) -> None:
        """As `FlowController.set_shares`."""
        self._keep(now, self._controller.set_shares, shares)

    def relax_shares(self) -> None:
        """As `FlowController.relax_shares`."""
        self._controller.relax_shares()

    def observe(self, metrics: EndpointMetrics, real: int, now: float) -> None:
        """Take what a scrape said of a server that held so many of the real requests."""
        self._keep(now, self._observe, (metrics, real))

    def scrape_failed(self, address: str, now: float, *, refused: bool) -> None:
        """Note that a scrape has failed."""
        self._keep(now, self._scrape_failed, (address, refused))

    # --- requests

    def submit(self, real: Request, now: float) -> None:
        """Take a request of which the caller's fields are set."""
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
            real.streamed,
        )
        self._number += 1
        life = _Life(real, request, self._number)
        self._lives[real.id] = life
        self._keep(now, self._controller.submit, request)

    def cancel(self, request_id: int, now: float) -> None:
        """The client has gone: the request takes part no longer."""
        life = self._lives.get(request_id)
        if life is not None and not life.known:
            life.known = True
            self._keep(now, self._cancel, life)

    def refused(self, request_id: int, now: float) -> None:
        """The plan in force has refused the request: here it ends as the others on average."""
        life = self._lives.get(request_id)
        if life is not None and not life.known:
            life.known = True
            self._note(life, ENDS, self._service_seconds)
            self.advance(now)

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
            life.usage, life.verdict, life.blind, life.known = usage, verdict, blind, True
            if verdict is Verdict.GOOD and not blind:
                seconds = now - life.real.dispatched_at
                known = self._service_seconds or seconds
                self._service_seconds = known + SMOOTHING * (seconds - known)
            self._step(request_id, ENDS, now)

    def estimated(self, real: Request, usage: Usage) -> None:
        """The real answer, which has ended without usage, is taken to have used so much."""
        life = self._lives.get(real.id)
        if life is not None:
            life.usage = usage
        elif real.shadow is not None:
            self._controller.charge(real.shadow, usage, self._now)

    # --- time

    def advance(self, now: float) -> None:
        """Let everything happen that is due and sure, each at its own moment."""
        events, inbox, controller = self._events, self._inbox, self._controller
        while True:
            bound = self._bound(now) if self._ahead or self._early else NEVER
            at = events[0][0] if events else NEVER
            wakeup = controller.next_wakeup()
            if wakeup is not None and wakeup < at:
                at = wakeup
            if inbox and inbox[0][0] < at:
                at = inbox[0][0]
            if at > now or at >= bound:
                break
            self._now = max(self._now, at)
            if events and events[0][0] <= self._now:
                _, _, tokens, life = heappop(events)
                self._happen(life, tokens)
            elif inbox and inbox[0][0] <= self._now:  # before what time alone brings, as in force
                _, call, argument = inbox.popleft()
                call(argument, self._now)
            self._settle()
        if bound > now:
            self._now = now

    # --- what comes of it

    def take_decisions(self, now: float) -> list[Shadowed]:
        """Return what was decided since the last call."""
        self.advance(now)
        decisions, self._decisions = self._decisions, []
        return decisions

    def state(self, now: float, max_flows: int | None = None) -> ControllerState:
        """As `FlowController.state`, at the time that it is here."""
        self.advance(now)
        return self._controller.state(self._now, max_flows)

    # --- inside

    def _keep(self, now: float, call: Callable[[Any, float], None], argument: object) -> None:
        """Keep what happens now until it is now here."""
        self._inbox.append((now, call, argument))
        self.advance(now)

    def _settle(self) -> None:
        for decision in self._controller.poll(self._now):
            self._decide(decision, self._now)

    def _bound(self, now: float) -> float:
        """Return the moment from which on ends may come that are not known.

        A request that waits in fact may end at once when it is sent there, and one that is being
        answered at once from now on.
        """
        ahead, early = self._ahead, self._early
        while ahead and (ahead[0].known or ahead[0].real.endpoint):
            self._note_early(ahead.popleft())
        while early and early[0][2].known:
            heappop(early)
        bound = ahead[0].sent_at if ahead else NEVER
        return min(bound, early[0][0] + now) if early else bound

    def _note_early(self, life: _Life) -> None:
        """Take note of a request that is being answered, if its answer began earlier here."""
        seconds = life.sent_at - life.real.dispatched_at
        if seconds < 0.0 and not life.known:
            heappush(self._early, (seconds, life.number, life))

    def _cancel(self, life: _Life, now: float) -> None:
        if self._lives.get(life.request.id) is life:
            self._controller.cancel(life.request.id, now)
            if life.sent_at < NEVER:
                del self._lives[life.request.id]

    def _observe(self, page: tuple[EndpointMetrics, int], now: float) -> None:
        metrics, real = page
        ours = self._controller.in_flight_at(metrics.address)
        self._controller.observe(as_if(metrics, real, ours), now)

    def _scrape_failed(self, failure: tuple[str, bool], now: float) -> None:
        address, refused = failure
        self._controller.scrape_failed(address, now, refused=refused)
        self._controller.take_health_changes()

    def _decide(self, decision: Decision, now: float) -> None:
        life = self._lives[decision.request_id]
        overtaken = False
        if isinstance(decision, Dispatched):
            overtaken = life.number < self._last_sent
            self._last_sent = max(self._last_sent, life.number)
            life.sent_at = now
            if life.real.endpoint:
                self._note_early(life)
            elif not life.known:
                self._ahead.append(life)
            for seconds, tokens in life.steps:
                self._note(life, tokens, seconds)
        else:
            del self._lives[decision.request_id]
            if decision.outcome is Outcome.EVICTED_CANCELLED:
                return  # its client has gone, whatever the plan
        self._decisions.append(Shadowed(life.request, decision, overtaken))

    def _step(self, request_id: int, tokens: int, now: float) -> None:
        """Let a step of the real answer happen as long after the dispatch here as there."""
        life = self._lives.get(request_id)
        if life is not None:
            self._note(life, tokens, now - life.real.dispatched_at, now)
            if life.sent_at < NEVER:
                self.advance(now)

    def _note(self, life: _Life, tokens: int, seconds: float, now: float = NEVER) -> None:
        """Take note of a step so long after the dispatch; `now` if the dispatches coincide."""
        if life.sent_at == NEVER:
            life.steps.append((seconds, tokens))
            return
        coincide = now < NEVER and life.sent_at == life.real.dispatched_at
        self._order += 1
        heappush(
            self._events, (now if coincide else life.sent_at + seconds, self._order, tokens, life)
        )

    def _happen(self, life: _Life, tokens: int) -> None:
        """Let a step of an answer happen, unless the request was cancelled meanwhile."""
        request_id = life.request.id
        if self._lives.get(request_id) is not life:
            return
        if tokens == BEGINS:
            self._controller.first_token(request_id, self._now)
        elif tokens != ENDS:
            self._controller.progress(request_id, tokens, self._now)
        else:
            del self._lives[request_id]
            if life.usage is None:
                life.real.shadow = life.request
            # Only about the server that gave the answer does it say anything.
            same = life.request.endpoint == life.real.endpoint
            verdict = life.verdict if same or life.verdict is Verdict.GOOD else Verdict.UNKNOWN
            self._controller.complete(request_id, life.usage, self._now, verdict, blind=life.blind)


def _enforced(plan: Plan) -> Plan:
    return replace(plan, mode=Mode.ENFORCE, shadow=None)


def as_if(page: EndpointMetrics, real: int, ours: int) -> EndpointMetrics:
    """Return the page that a server would show with other requests of ours in it.

    What is foreign stays. The batch is as large as it is seen to be where requests wait beside it,
    and takes all where none does. The KV cache is used in proportion to what runs. Of the tokens
    that it has generated the page says nothing: they are those of other answers.

    Args:
        page: the one that it shows.
        real: how many requests of ours it holds.
        ours: how many of them it would hold.
    """
    held = page.running + page.waiting
    would = max(0, held - real) + ours
    if would == held:
        return replace(page, answer_tokens=None)
    running = min(would, page.running) if page.waiting else would
    usage = page.kv_usage
    if usage is not None and page.running:
        usage = min(1.0, usage * running / page.running)
    return replace(
        page, running=running, waiting=would - running, kv_usage=usage, answer_tokens=None
    )
