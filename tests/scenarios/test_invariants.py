"""What holds whatever happens: random calls in virtual time against a model kept by the test.

The machine does what a caller owes the controller: it polls after each call and, as time goes on,
at every `next_wakeup`.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from forebay_control.plan import (
    BandPlan,
    Between,
    FairnessName,
    InnerPlan,
    LimitsPlan,
    ModelPlan,
    OrderingName,
    Plan,
    SaturationMode,
    SaturationPlan,
    TargetPlan,
    UnmatchedAction,
    UnmatchedPlan,
    WhenFull,
)
from forebay_epp.core.controller import FlowController
from forebay_epp.core.terms import Dispatched, Endpoint, EndpointMetrics, Outcome, Request, Verdict

ADDRESSES = ("10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:8000")
MODELS = {"critical": "Critical", "chat": "Standard", "code": "Standard", "batch": "Sheddable"}
NAMES = (*MODELS, "unknown", "")
EPSILON = 1e-6


@st.composite
def bands(draw, name, priority):
    return BandPlan(
        name,
        priority,
        fairness=draw(st.sampled_from(FairnessName)),
        ordering=draw(st.sampled_from(OrderingName)),
        between=draw(st.sampled_from(Between)),
        inner=draw(st.none() | st.builds(InnerPlan, st.sampled_from(FairnessName))),
        when_full=draw(st.sampled_from(WhenFull)),
        max_saturation_percent=draw(st.sampled_from([100, 100, 50])),
        reserved_percent=draw(st.sampled_from([0, 0, 30])),
        ttl_seconds=draw(st.sampled_from([0.5, 3.0, 10.0])),
        max_requests=draw(st.sampled_from([3, 50])),
        max_bytes=draw(st.sampled_from([100, 5000])),
        flow_max_requests=draw(st.sampled_from([2, 50])),
        flow_max_bytes=draw(st.sampled_from([80, 5000])),
    )


@st.composite
def plans(draw):
    """Bands come, go and change order; models go with their band."""
    order = draw(st.permutations([100, 0, -100]))
    names = ["Standard", *draw(st.sampled_from([["Critical", "Sheddable"], ["Critical"], []]))]
    return Plan(
        bands=tuple(draw(bands(name, order[number])) for number, name in enumerate(names)),
        models=tuple(
            ModelPlan(
                model, band, draw(st.sampled_from([(), (TargetPlan("v1"), TargetPlan("v2", 3))]))
            )
            for model, band in MODELS.items()
            if band in names
        ),
        limits=LimitsPlan(
            max_requests=draw(st.sampled_from([5, 100])),
            max_bytes=draw(st.sampled_from([200, 10_000])),
        ),
        saturation=SaturationPlan(
            draw(st.sampled_from(SaturationMode)), draw(st.sampled_from([1, 2, 5]))
        ),
        unmatched=UnmatchedPlan(draw(st.sampled_from(UnmatchedAction))),
        no_endpoints_ttl_seconds=draw(st.sampled_from([1.0, 8.0])),
    )


@dataclass
class Sent:
    """What the test knows of a request it has submitted."""

    model: str
    size_bytes: int
    subset: frozenset[str] | None
    at: float
    band: str
    longest: float
    deadline: float
    endpoint: str = ""


requests = st.lists(
    st.tuples(
        st.sampled_from(NAMES),
        st.integers(0, 60),
        st.none() | st.frozensets(st.sampled_from([*ADDRESSES, "10.9.9.9:8000"]), max_size=2),
        st.sampled_from([float("inf"), float("inf"), 0.25, 2.0, 100.0]),
        st.sampled_from(["", "acme", "globex"]),
    ),
    min_size=1,
    max_size=6,
)


class Flow(RuleBasedStateMachine):
    """The controller beside the model."""

    @initialize(plan=plans(), seed=st.integers(0, 9), present=st.sets(st.sampled_from(ADDRESSES)))
    def start(self, plan, seed, present):
        self.seed, self.first_plan = seed, plan
        self.controller = FlowController(plan, Random(seed))
        self.calls = []
        self.all_decisions = []
        self.now = 0.0
        self.next_id = 0
        self.plan = plan
        self.band_plans = {band.name: band for band in plan.bands}
        self.present = set()
        self.regime_since = float("-inf")
        self.undecided: dict[int, Sent] = {}
        self.in_flight: dict[int, Sent] = {}
        self.decided = set()
        self.drained = False
        self.displacing = set()  # priorities of what comes now and may take others' place
        self.replace_endpoints(present)

    # --- doing

    def call(self, name, *arguments, **named):
        self.calls.append((name, arguments, named))
        return perform(self.controller, name, arguments, named)

    def polled(self):
        decisions = self.call("poll", self.now)
        self.all_decisions.append(decisions)
        for decision in decisions:
            assert decision.request_id not in self.decided
            self.decided.add(decision.request_id)
        for decision in decisions:
            if not isinstance(decision, Dispatched):
                self.check_refusal(decision, self.undecided.pop(decision.request_id))
        for decision in decisions:
            if isinstance(decision, Dispatched):
                sent = self.undecided.pop(decision.request_id)
                self.check_dispatch(decision, sent)
                sent.endpoint = decision.endpoint
                self.in_flight[decision.request_id] = sent

    def check_refusal(self, decision, sent):
        assert sent.at + decision.waited_seconds <= sent.deadline + EPSILON
        assert 1 <= decision.retry_after_seconds <= 60
        assert decision.waited_seconds <= sent.longest + EPSILON
        if decision.outcome is Outcome.EVICTED_TTL:
            assert self.present
        if decision.outcome is Outcome.REJECTED_UNKNOWN_MODEL:
            assert sent.band == ""
        if decision.outcome is Outcome.EVICTED_DISPLACED:
            assert self.priority(sent) < max(self.displacing)

    def check_dispatch(self, decision, sent):
        """Strict priority: no request of a higher band that could use the endpoint is left.

        Unless that band may not use all slots, or the request's own has some reserved.
        """
        assert decision.endpoint in self.present
        assert sent.subset is None or decision.endpoint in sent.subset
        assert decision.waited_seconds <= sent.longest + EPSILON
        assert self.now < sent.deadline
        if self.band_plans[sent.band].reserved_percent:
            return
        for other in self.undecided.values():
            if other.subset is None or decision.endpoint in other.subset:
                higher = self.priority(other) > self.priority(sent)
                assert not higher or self.has_ceiling(other)

    def priority(self, sent):
        return self.priority_of(sent.band)

    def priority_of(self, band):
        return self.band_plans[band].priority

    def has_ceiling(self, sent):
        return self.band_plans[sent.band].max_saturation_percent < 100

    def displaces(self, band):
        return band and self.band_plans[band].when_full is WhenFull.DISPLACE_LOWER

    def deadline(self, sent):
        ttl = self.band_plans[sent.band].ttl_seconds
        without = self.plan.no_endpoints_ttl_seconds
        since = max(sent.at, self.regime_since)
        by_band = min(since + (ttl if self.present else without), sent.at + ttl + without)
        return min(by_band, sent.deadline)

    def longest(self, band):
        return self.band_plans[band].ttl_seconds + self.plan.no_endpoints_ttl_seconds

    def replace_endpoints(self, addresses):
        if bool(addresses) != bool(self.present):
            self.regime_since = self.now
        self.present = set(addresses)
        self.call("set_endpoints", [Endpoint(address) for address in sorted(addresses)], self.now)
        self.polled()

    # --- rules

    @rule(arriving=requests)
    def submit(self, arriving):
        bands_of = {model.name: model.band for model in self.plan.models}
        queues = self.plan.unmatched.action is UnmatchedAction.QUEUE
        for model, size_bytes, subset, patience, tenant in arriving:
            deadline = self.now + patience
            band = bands_of.get(model, self.plan.unmatched.band if queues else "")
            longest = self.longest(band) if band else 0.0
            self.undecided[self.next_id] = Sent(
                model, size_bytes, subset, self.now, band, longest, deadline
            )
            self.displacing |= {self.priority_of(band)} if self.displaces(band) else set()
            self.call("submit", self.next_id, model, size_bytes, subset, deadline, tenant, self.now)
            self.next_id += 1
        self.polled()
        self.displacing = set()
        if self.drained and len(arriving) == 1:
            assert self.next_id - 1 in self.decided

    @rule(number=st.integers(0, 200))
    def cancel(self, number):
        """Anyone: waiting, in flight, long gone or never seen."""
        known = [*self.undecided, *self.in_flight]
        request_id = known[number % len(known)] if known and number < 180 else number
        waited = request_id in self.undecided
        self.call("cancel", request_id, self.now)
        self.in_flight.pop(request_id, None)
        self.polled()
        if waited:
            assert request_id in self.decided
            assert request_id not in self.in_flight

    @precondition(lambda self: self.in_flight)
    @rule(
        number=st.integers(0, 200),
        verdict=st.sampled_from(Verdict),
        blind=st.booleans(),
        many=st.booleans(),
    )
    def complete(self, number, verdict, blind, many):
        for _ in range(len(self.in_flight) if many else 1):
            request_id = list(self.in_flight)[number % len(self.in_flight)]
            del self.in_flight[request_id]
            self.call("complete", request_id, None, self.now, verdict, blind=blind)
        self.polled()

    @rule(seconds=st.sampled_from([0.0, 0.05, 0.25, 0.5, 1.0, 3.0, 10.0, 30.0]))
    def advance(self, seconds):
        until = self.now + seconds
        while True:
            wakeup = self.controller.next_wakeup()
            if wakeup is None or wakeup > until:
                break
            assert wakeup > self.now
            self.now = wakeup
            self.polled()
        self.now = until
        self.polled()

    @rule(addresses=st.sets(st.sampled_from(ADDRESSES)))
    def set_endpoints(self, addresses):
        self.replace_endpoints(addresses)

    @rule()
    def scale_to_zero(self):
        self.replace_endpoints(())

    @rule(
        address=st.sampled_from([*ADDRESSES, "10.9.9.9:8000"]),
        running=st.integers(0, 8),
        waiting=st.integers(0, 3),
        kv_usage=st.sampled_from([None, 0.1, 0.99]),
        age=st.sampled_from([0.0, 0.1, 1.0]),
    )
    def observe(self, address, running, waiting, kv_usage, age):
        metrics = EndpointMetrics(address, running, waiting, kv_usage, self.now - age)
        self.call("observe", metrics, self.now)
        self.polled()

    @rule(address=st.sampled_from([*ADDRESSES, "10.9.9.9:8000"]), refused=st.booleans())
    def scrape_failed(self, address, refused):
        self.call("scrape_failed", address, self.now, refused=refused)
        self.polled()

    @rule(plan=plans())
    def reconfigure(self, plan):
        self.plan = plan
        self.band_plans |= {band.name: band for band in plan.bands}
        for sent in self.undecided.values():
            sent.longest = max(sent.longest, self.longest(sent.band))
        self.call("reconfigure", plan, self.now)
        self.polled()

    @precondition(lambda self: self.next_id > 25)
    @rule()
    def drain(self):
        self.drained = True
        self.call("drain")
        self.polled()

    # --- invariants

    @invariant()
    def the_snapshot_equals_the_model(self):
        snapshot = self.controller.state(self.now)
        waiting = list(self.undecided.values())
        assert snapshot.requests == self.controller.waiting == len(waiting)
        assert snapshot.size_bytes == sum(sent.size_bytes for sent in waiting)
        assert snapshot.in_flight == len(self.in_flight)
        held = {}
        for sent in waiting:
            requests_of, bytes_of = held.get(sent.band, (0, 0))
            held[sent.band] = requests_of + 1, bytes_of + sent.size_bytes
        for band in snapshot.bands:
            assert (band.requests, band.size_bytes) == held.pop(band.band, (0, 0))
            assert sum(flow.requests for flow in band.flows) == band.requests
            assert sum(flow.size_bytes for flow in band.flows) == band.size_bytes
            assert band.requests or not band.draining
        assert not held

    @invariant()
    def slots_equal_the_model(self):
        snapshot = self.controller.state(self.now)
        assert {endpoint.address for endpoint in snapshot.endpoints} == self.present
        for endpoint in snapshot.endpoints:
            mine = sum(sent.endpoint == endpoint.address for sent in self.in_flight.values())
            assert endpoint.in_flight == mine
            # One that is closed by its page alone may get a request to find out.
            assert endpoint.free <= max(0 if mine else 1, endpoint.limit - mine)
        has_room = any(endpoint.free for endpoint in snapshot.endpoints)
        assert has_room == (snapshot.saturation < 1.0)

    @invariant()
    def an_endpoint_that_is_out_has_at_most_a_trial(self):
        endpoints = self.controller.state(self.now).endpoints
        if not all(endpoint.out for endpoint in endpoints):
            assert all(endpoint.free <= 1 for endpoint in endpoints if endpoint.out)

    @invariant()
    def no_free_slot_is_left_that_somebody_waits_for(self):
        for endpoint in self.controller.state(self.now).endpoints:
            if endpoint.free:
                for sent in self.undecided.values():
                    if self.has_ceiling(sent):
                        continue
                    assert sent.subset is not None
                    assert endpoint.address not in sent.subset

    @invariant()
    def the_next_wakeup_is_not_later_than_the_first_expiry(self):
        wakeup = self.controller.next_wakeup()
        if not self.undecided:
            assert wakeup is None
            return
        first = min(self.deadline(sent) for sent in self.undecided.values())
        assert wakeup is not None
        assert self.now < wakeup <= first

    def teardown(self):
        """The end gives everything back, and the same calls once more decide the same."""
        if not hasattr(self, "controller"):
            return
        self.call("flush", self.now)
        self.polled()
        for request_id in list(self.in_flight):
            self.call("complete", request_id, None, self.now)
        self.in_flight.clear()
        self.polled()
        snapshot = self.controller.state(self.now)
        assert (snapshot.requests, snapshot.size_bytes, snapshot.in_flight) == (0, 0, 0)
        assert all(endpoint.in_flight == 0 for endpoint in snapshot.endpoints)
        assert self.decided == set(range(self.next_id))
        assert set(self.controller._endpoints._states) == self.present
        again = FlowController(self.first_plan, Random(self.seed))
        replayed = [perform(again, *call) for call in self.calls]
        assert [decisions for decisions in replayed if decisions is not None] == self.all_decisions


def perform(controller, name, arguments, named):
    """Make a recorded call; a new request each time, because the core writes on it."""
    if name == "submit":
        request_id, model, size_bytes, subset, deadline, tenant, now = arguments
        request = Request(request_id, model, size_bytes, subset, deadline=deadline, tenant=tenant)
        return controller.submit(request, now)
    return getattr(controller, name)(*arguments, **named)


class TestInvariants(Flow.TestCase):
    """Random calls."""

    settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
