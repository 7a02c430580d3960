"""Mode Observe: what it tells against what a controller in force decides, in virtual time."""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass, replace
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from forebay_control.plan import (
    BandPlan,
    Between,
    FairnessName,
    InnerPlan,
    LimitsPlan,
    Mode,
    ModelPlan,
    OrderingName,
    Plan,
    SaturationMode,
    SaturationPlan,
    UnmatchedAction,
    UnmatchedPlan,
    WhenFull,
)
from forebay_control.shares import Shares
from forebay_epp.core.controller import FlowController
from forebay_epp.core.observation.shadow import as_if
from forebay_epp.core.observation.shadowed import ShadowedController
from forebay_epp.core.terms import (
    Dispatched,
    Endpoint,
    EndpointMetrics,
    Outcome,
    Request,
    Usage,
    Verdict,
)

A, B = "10.0.0.1:8000", "10.0.0.2:8000"
TICK = 1 / 64
ARRIVE, BEGIN, PROGRESS, END, LEAVE, SHARE, SCRAPE = range(7)


class First:
    """Always draws the first, so that two runs draw alike."""

    def randrange(self, stop, /):
        return 0 if stop else 1


@dataclass(frozen=True)
class Caller:
    """One request of a run, with what its server makes of it; times in ticks.

    A caller leaves `leaves` ticks after it came, 0 for not, if it has no answer by then.
    """

    at: int
    model: str
    tenant: str
    size: int
    seconds: int
    tokens: int
    leaves: int
    subset: frozenset[str] | None


class Run:
    """Callers, and servers that take a fixed time for each, before one controller."""

    def __init__(self, controller, callers, endpoints=(A, B), shares=(), scrapes=()):
        self.controller = controller
        self.shares = shares
        self.where = {}
        self.callers = callers
        lots = Random(1)
        # No two answers end at the same moment, whenever they begin.
        self.spread = [lots.randrange(1, 1 << 24) / (1 << 30) for _ in callers]
        self.now = 0.0
        self.events = []
        self.order = 0
        self.waiting = set()
        self.running = set()
        self.told = []
        self.shadowed = []
        controller.set_endpoints([Endpoint(address) for address in endpoints], 0.0)
        for number, caller in enumerate(callers):
            self.at(caller.at * TICK, ARRIVE, number)
        for number, (at, _) in enumerate(shares):
            self.at(at * TICK, SHARE, number)
        for at in scrapes:
            self.at(at * TICK, SCRAPE, at)

    def at(self, when, what, number):
        self.order += 1
        heapq.heappush(self.events, (when, self.order, what, number))

    def play(self, *, watch=None):
        """Go through all events and wake-ups; ask a controller to `watch` after each."""
        while self.events:
            wakeup = self.controller.next_wakeup()
            if wakeup is not None and wakeup < self.events[0][0]:
                self.now = max(self.now, wakeup)
            else:
                self.now, _, what, number = heapq.heappop(self.events)
                self.happen(what, number)
            self.poll()
            if watch is not None:
                self.shadowed += watch.take_shadowed(self.now)
        self.now += 1000.0
        self.poll()
        return self.told

    def poll(self):
        while decisions := self.controller.poll(self.now):
            for decision in decisions:
                self.waiting.discard(decision.request_id)
                if getattr(decision, "outcome", None) is not Outcome.EVICTED_CANCELLED:
                    self.told.append(decision)
                if isinstance(decision, Dispatched):
                    self.where[decision.request_id] = decision.endpoint
                    self.send(decision.request_id)

    def send(self, number):
        self.running.add(number)
        seconds = self.callers[number].seconds * TICK + self.spread[number]
        self.at(self.now + seconds / 4, BEGIN, number)
        self.at(self.now + seconds / 2, PROGRESS, number)
        self.at(self.now + seconds, END, number)

    def scrape(self):
        """Have both servers show what they run."""
        for address in (A, B):
            held = sum(self.where[number] == address for number in self.running)
            kv = min(1.0, held / 6)
            page = EndpointMetrics(address, min(held, 4), max(0, held - 4), kv, self.now, 0.2)
            self.controller.observe(page, self.now)

    def happen(self, what, number):
        if what == SHARE:
            slots = dict(zip((A, B), self.shares[number][1], strict=True))
            shares = Shares(number + 1, sum(slots.values()), slots, full=True, epps=2)
            self.controller.set_shares(shares, self.now)
            return
        if what == SCRAPE:
            self.scrape()
            return
        caller = self.callers[number]
        usage = Usage(caller.size // 4 + 1, caller.tokens)
        if what == ARRIVE:
            self.waiting.add(number)
            if caller.leaves and caller.leaves < caller.seconds:
                self.at(self.now + (caller.leaves + 0.5) * TICK, LEAVE, number)
            request = Request(number, caller.model, caller.size, caller.subset)
            request.tenant = caller.tenant
            self.controller.submit(request, self.now)
        elif what == LEAVE:
            if number in self.waiting or number in self.running:
                self.running.discard(number)
                self.controller.cancel(number, self.now)
        elif number in self.running:
            if what == BEGIN:
                self.controller.first_token(number, self.now)
            elif what == PROGRESS:
                self.controller.progress(number, caller.tokens // 2 + 1, self.now)
            else:
                self.running.remove(number)
                self.controller.complete(number, usage, self.now, Verdict.GOOD)


CALLERS = st.lists(
    st.builds(
        Caller,
        at=st.integers(0, 600),
        model=st.sampled_from(["gold", "chat", "batch", "other"]),
        tenant=st.sampled_from(["acme", "globex", ""]),
        size=st.integers(1, 4000),
        seconds=st.integers(1, 300),
        tokens=st.integers(1, 800),
        leaves=st.sampled_from([0, 0, 0, 7, 50]),
        subset=st.sampled_from([None, None, frozenset({A}), frozenset({B, "10.9.9.9:1"})]),
    ),
    min_size=1,
    max_size=60,
).map(lambda callers: sorted(callers, key=lambda caller: caller.at))


@st.composite
def plans(draw):
    """Plans that make requests wait, overtake and be refused in every way."""
    fairness = st.sampled_from(FairnessName)
    inner = draw(st.none() | st.builds(InnerPlan, fairness))
    bands = tuple(
        BandPlan(
            name,
            priority,
            draw(fairness),
            draw(st.sampled_from(OrderingName)),
            ttl_seconds=draw(st.sampled_from([0.5, 3.0, 60.0])),
            max_requests=draw(st.sampled_from([3, 1000])),
            between=draw(st.sampled_from(Between)),
            inner=inner,
            when_full=draw(st.sampled_from(WhenFull)),
            max_saturation_percent=draw(st.sampled_from([50, 100])),
            reserved_percent=draw(st.sampled_from([0, 20])),
        )
        for name, priority in (("Critical", 100), ("Standard", 0), ("Sheddable", -100))
    )
    return Plan(
        bands=bands,
        models=(
            ModelPlan("gold", "Critical"),
            ModelPlan("chat", "Standard", weight=2),
            ModelPlan("batch", "Sheddable"),
        ),
        limits=LimitsPlan(max_requests=draw(st.sampled_from([4, 1000]))),
        saturation=SaturationPlan(SaturationMode.CONCURRENCY, draw(st.integers(1, 4))),
        unmatched=UnmatchedPlan(draw(st.sampled_from(UnmatchedAction))),
        no_endpoints_ttl_seconds=1.0,
    )


def _caller(at, model, seconds):
    return Caller(at, model, "", 1, seconds, 1, 0, None)


@example(  # the last comes at the moment at which the one before it expires
    plan=Plan(
        bands=tuple(
            replace(band, ttl_seconds=0.5, max_requests=3, max_saturation_percent=50)
            for band in Plan().bands
        ),
        models=(ModelPlan("gold", "Critical"),),
        saturation=SaturationPlan(SaturationMode.CONCURRENCY, 1),
    ),
    callers=[
        *(_caller(0, "gold", seconds) for seconds in (43, *[1] * 9)),
        *(_caller(12, "chat", 299), _caller(310, "gold", 1), _caller(342, "gold", 1)),
    ],
    often=False,
)
@settings(max_examples=150, deadline=None)
@given(plan=plans(), callers=CALLERS, often=st.booleans())
def test_the_shadow_decides_what_a_controller_in_force_decides(plan, callers, often):
    """On the same arrivals with the same service times, to the last bit, in the same order.

    Whether one asks after each step or at the end only.
    """
    enforced = Run(FlowController(plan, First()), callers).play()
    watched = ShadowedController(replace(plan, mode=Mode.OBSERVE), First())
    run = Run(watched, callers)
    run.play(watch=watched if often else None)

    shadowed = run.shadowed + watched.take_shadowed(run.now)

    known = [shadow.decision for shadow in shadowed]
    assert known == [decision for decision in enforced if not _unroutable(decision)]


def patient(plan):
    """Return the same plan, refusing nothing."""
    bands = tuple(
        replace(band, ttl_seconds=3600.0, max_requests=1000, flow_max_requests=1000)
        for band in plan.bands
    )
    return replace(plan, bands=bands, limits=LimitsPlan(), unmatched=UnmatchedPlan())


@settings(max_examples=150, deadline=None)
@given(plan=plans().map(patient), other=plans(), callers=CALLERS, often=st.booleans())
def test_a_policy_beside_the_one_in_force_decides_what_it_would_in_force(
    plan, other, callers, often
):
    """Where that one holds requests longer, the shadow waits until their ends are known."""
    enforced = Run(FlowController(other, First()), callers).play()
    alone = Run(FlowController(plan, First()), callers).play()
    watched = ShadowedController(replace(plan, shadow=other), First())
    run = Run(watched, callers)

    told = run.play(watch=watched if often else None)

    shadowed = run.shadowed + watched.take_shadowed(run.now)
    assert [shadow.decision for shadow in shadowed] == enforced
    assert told == alone
    state = watched.state(run.now)
    assert (state.mode, state.shadow.requests, state.shadow.in_flight) == (Mode.ENFORCE, 0, 0)


SHARES = st.lists(
    st.tuples(st.integers(0, 600), st.tuples(st.integers(0, 4), st.integers(0, 4))), max_size=8
).map(lambda shares: [*sorted(shares), (601, (4, 4))])


@settings(max_examples=60, deadline=None)
@given(plan=plans().map(patient), other=plans(), callers=CALLERS, shares=SHARES)
def test_a_policy_beside_the_one_in_force_has_its_shares(plan, other, callers, shares):
    """Where several EPPs serve the pool it decides what it would with the slots of this one."""
    enforced = Run(FlowController(other, First()), callers, shares=shares).play()
    watched = ShadowedController(replace(plan, shadow=other), First())
    run = Run(watched, callers, shares=shares)

    run.play()

    assert [shadow.decision for shadow in watched.take_shadowed(run.now)] == enforced


def test_a_policy_that_comes_later_has_the_shares_of_the_time():
    """Of which each message names those only that differ."""
    plan = Plan(saturation=SaturationPlan(SaturationMode.CONCURRENCY, 4))
    controller = ShadowedController(plan, First())
    controller.set_endpoints([Endpoint(A), Endpoint(B)], 0.0)
    controller.set_shares(Shares(1, 5, {A: 2, B: 3}, full=True, epps=2), 0.0)
    controller.set_shares(Shares(2, 4, {B: 2}, epps=2), 0.0)

    controller.reconfigure(replace(plan, shadow=plan), 1.0)

    state = controller.state(1.0)
    assert [endpoint.free for endpoint in state.shadow.endpoints] == [2, 2]
    assert [endpoint.free for endpoint in state.endpoints] == [2, 2]


@settings(max_examples=60, deadline=None)
@given(
    plan=plans(),
    other=plans(),
    callers=CALLERS,
    scrapes=st.sets(st.integers(0, 900), max_size=60).map(sorted),
    observes=st.booleans(),
)
def test_under_adaptive_limits_the_shadow_changes_nothing_and_decides_each_request_at_most_once(
    plan, other, callers, scrapes, observes
):
    """What it learns from pages is of servers as full as they are, so equality is not claimed."""
    plan = replace(plan, saturation=SaturationPlan())
    other = replace(other, saturation=SaturationPlan())
    if observes:
        shadowed = replace(plan, mode=Mode.OBSERVE)
        alone = Run(FlowController(shadowed, First()), callers, scrapes=scrapes)
    else:
        shadowed = replace(plan, shadow=other)
        alone = Run(FlowController(plan, First()), callers, scrapes=scrapes)
    often = ShadowedController(shadowed, First())
    rarely = ShadowedController(shadowed, First())
    runs = [Run(controller, callers, scrapes=scrapes) for controller in (often, rarely)]

    told = alone.play()

    assert [runs[0].play(watch=often), runs[1].play()] == [told, told]
    known = runs[0].shadowed + often.take_shadowed(runs[0].now)
    decisions = [shadow.decision for shadow in known]
    assert decisions == [shadow.decision for shadow in rarely.take_shadowed(runs[1].now)]
    ids = [decision.request_id for decision in decisions]
    assert len(ids) == len(set(ids))
    state = rarely.state(runs[1].now).shadow
    assert (state.requests, state.in_flight) == (0, 0)


def test_tokens_that_are_estimated_from_pages_are_charged_in_the_shadow():
    """Nothing is seen of answers, and those of one model are five times as long."""
    band = BandPlan("Standard", 0, fairness=FairnessName.TOKEN_FAIR, ttl_seconds=3600.0)
    plan = Plan(
        bands=(band,),
        models=(ModelPlan("long", "Standard"), ModelPlan("short", "Standard")),
        saturation=SaturationPlan(SaturationMode.CONCURRENCY, 1),
    )
    wide = SaturationPlan(SaturationMode.CONCURRENCY, 4)
    controller = ShadowedController(replace(plan, saturation=wide, shadow=plan), First())
    controller.set_endpoints([Endpoint(A)], 0.0)
    total, ends, counts = 0.0, [], Counter()
    for number in range(400):
        controller.submit(Request(number, ("long", "short")[number % 2], 4), 0.0)
    for tick in range(1, 400):
        now = tick / 4
        for decision in controller.poll(now):
            tokens = (500, 100)[decision.request_id % 2]
            heapq.heappush(ends, (now + tokens / 400, decision.request_id))
        while ends and ends[0][0] <= now:
            _, number = heapq.heappop(ends)
            total += (500, 100)[number % 2]
            controller.complete(number, None, now, Verdict.GOOD)
        page = EndpointMetrics(A, len(ends), 0, None, now, 0.25, answer_tokens=total)
        controller.observe(page, now)
        for shadowed in controller.take_shadowed(now):
            counts[shadowed.request.model] += 1

    assert counts["short"] > 2 * counts["long"]


def test_what_the_policy_in_force_refuses_is_answered_in_the_shadow_as_others_are():
    """Its queue takes one; the shadow's takes all, and each of its answers takes a second."""
    short = BandPlan("Standard", 0, max_requests=1)
    one = SaturationPlan(SaturationMode.CONCURRENCY, 1)
    shadow = Plan(saturation=one)
    controller = ShadowedController(Plan(bands=(short,), saturation=one, shadow=shadow), First())
    callers = [Caller(at, "chat", "", 1, 64, 1, 0, None) for at in (0, 70, 71, 72, 73)]
    run = Run(controller, callers, endpoints=(A,))

    told = run.play()

    assert [getattr(decision, "outcome", None) for decision in told].count(
        Outcome.REJECTED_QUEUE_FULL
    ) == 2
    decisions = [shadowed.decision for shadowed in controller.take_shadowed(run.now)]
    assert [decision.request_id for decision in decisions] == [0, 1, 2, 3, 4]
    assert [round(decision.waited_seconds) for decision in decisions] == [0, 0, 1, 2, 3]


def _unroutable(decision):
    """Whether the real request is refused too, so that the shadow leaves it out."""
    return getattr(decision, "outcome", None) is Outcome.REJECTED_NO_ENDPOINTS


@settings(max_examples=60, deadline=None)
@given(plan=plans(), callers=CALLERS)
def test_nothing_is_held_or_refused(plan, callers):
    """Each request goes at once, in order of arrival, whatever the plan would do to it."""
    run = Run(ShadowedController(replace(plan, mode=Mode.OBSERVE), First()), callers)

    told = run.play()

    assert [decision.request_id for decision in told] == list(range(len(callers)))
    assert all(isinstance(decision, Dispatched) for decision in told)
    assert all(decision.waited_seconds == 0 for decision in told)
    state = run.controller.state(run.now)
    assert (state.requests, state.in_flight) == (0, 0)
    assert (state.shadow.requests, state.shadow.in_flight) == (0, 0)


@settings(max_examples=60, deadline=None)
@given(plan=plans(), callers=CALLERS, switches=st.lists(st.integers(0, 700), max_size=6))
def test_each_request_is_decided_once_however_often_the_mode_changes(plan, callers, switches):
    """What waits goes at once when the mode becomes Observe, and what runs counts afterwards."""
    controller = ShadowedController(plan, First())
    run = Run(controller, callers)
    mode = Mode.ENFORCE

    def switch():
        nonlocal mode
        mode = Mode.OBSERVE if mode is Mode.ENFORCE else Mode.ENFORCE
        controller.reconfigure(replace(plan, mode=mode), run.now)

    pending = sorted(switches)
    while run.events:
        if pending and pending[0] * TICK <= run.events[0][0]:
            run.now = pending.pop(0) * TICK
            switch()
        else:
            run.now, _, what, number = heapq.heappop(run.events)
            run.happen(what, number)
        run.poll()
        if mode is Mode.OBSERVE:
            assert controller.waiting == 0
        assert controller.state(run.now).in_flight == len(run.running)
    run.now += 1000.0
    run.poll()

    ids = [decision.request_id for decision in run.told]
    assert len(ids) == len(set(ids))
    assert not run.waiting
    assert controller.state(run.now).in_flight == 0


def page(running, waiting, kv=None):
    return EndpointMetrics(A, running, waiting, kv, 0.0)


@pytest.mark.parametrize(
    ("shown", "real", "ours", "expected"),
    [
        (page(8, 0), 8, 8, page(8, 0)),
        (page(8, 4), 12, 5, page(5, 0)),
        (page(8, 4), 9, 5, page(8, 0)),  # 3 are foreign
        (page(8, 40, 0.8), 48, 10, page(8, 2, 0.8)),
        (page(8, 0, 0.8), 8, 2, page(2, 0, 0.2)),
        (page(3, 0), 5, 5, page(5, 0)),  # older than the last dispatches
        (page(0, 0, 0.0), 2, 1, page(1, 0, 0.0)),
    ],
)
def test_a_page_is_read_as_if_the_shadow_s_requests_were_in_the_server(shown, real, ours, expected):
    """What is foreign stays, and the batch is as large as it is seen to be."""
    assert as_if(shown, real, ours) == expected


def test_a_request_that_would_be_overtaken_is_told():
    """Two of a low band come first; one of a high band would have gone before the second."""
    plan = Plan(
        models=(ModelPlan("gold", "Critical"),),
        saturation=SaturationPlan(SaturationMode.CONCURRENCY, 1),
        mode=Mode.OBSERVE,
    )
    callers = [
        Caller(0, "chat", "", 1, 64, 1, 0, None),
        Caller(1, "chat", "", 1, 64, 1, 0, None),
        Caller(2, "gold", "", 1, 64, 1, 0, None),
    ]
    controller = ShadowedController(plan, First())
    run = Run(controller, callers, endpoints=(A,))
    run.play()

    shadowed = controller.take_shadowed(run.now)

    assert [shadow.request.id for shadow in shadowed] == [0, 2, 1]
    assert [shadow.overtaken for shadow in shadowed] == [False, False, True]
    assert [round(shadow.decision.waited_seconds, 1) for shadow in shadowed] == [0.0, 1.0, 2.0]
