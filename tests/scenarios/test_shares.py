"""Weighted and token fairness, on one level and two, against allocations computed another way."""

from __future__ import annotations

import heapq
import os
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    TenantPlan,
)
from forebay_epp.core.controller import FlowController
from forebay_epp.core.fairness.token_fair import ANSWER_TOKEN, PROMPT_TOKEN
from forebay_epp.core.terms import Dispatched, Endpoint, Request, Usage

A = "10.0.0.1:8000"
MANY = 1_000_000
FAIR_STEPS = int(os.environ.get("FOREBAY_FAIR_STEPS", "5000"))  # answers of each seed
BAND = BandPlan("Standard", 0, ttl_seconds=3600.0, max_requests=MANY, flow_max_requests=MANY)
WEIGHTED, TOKENS = FairnessName.WEIGHTED_FAIR, FairnessName.TOKEN_FAIR


def plan_of(weights, fairness, slots=1, *, tenants=None, **band) -> Plan:
    """One band; `weights` are those of its models by name, `tenants` those of tenants."""
    return Plan(
        bands=(replace(BAND, fairness=fairness, **band),),
        models=tuple(ModelPlan(name, "Standard", (), weight) for name, weight in weights.items()),
        limits=LimitsPlan(max_requests=MANY),
        saturation=SaturationPlan(SaturationMode.CONCURRENCY, slots),
        tenants=tuple(TenantPlan(name, weight) for name, weight in (tenants or {}).items()),
    )


class Serving:
    """A controller and one server that takes 1 ms for a token of an answer, and tells usage."""

    def __init__(self, plan):
        self.controller = FlowController(plan, Random(1))
        self.controller.set_endpoints([Endpoint(A)], 0.0)
        self.now = 0.0
        self.usages = []
        self.requests = []
        self.running = []
        self.order = []

    def submit(self, model, tenant="", prompt=100, answer=10, *, prefix=(), cached=None):
        """Queue one more request; four bytes are a token of its prompt."""
        request = Request(len(self.requests), model, 4 * prompt, tenant=tenant, prefix=prefix)
        self.requests.append(request)
        self.usages.append(Usage(prompt, answer, cached))
        self.controller.submit(request, self.now)

    def poll(self):
        for decision in self.controller.poll(self.now):
            assert isinstance(decision, Dispatched)
            number = decision.request_id
            self.order.append(self.requests[number])
            ends_at = self.now + 0.001 * self.usages[number].completion_tokens
            heapq.heappush(self.running, (ends_at, number))

    def end_next(self):
        """Go on to the next end of an answer; return whose it is."""
        self.now, number = heapq.heappop(self.running)
        self.controller.complete(number, self.usages[number], self.now)
        self.poll()
        return self.requests[number], self.usages[number]

    def serve(self, dispatches):
        """Go on until so many have been dispatched, or nothing runs any more."""
        self.poll()
        while len(self.order) < dispatches and self.running:
            self.end_next()
        return self.order[:dispatches]


def weighted_max_min(demands, weights, capacity):
    """Fill all flows at speeds in proportion to their weights, and stop each at its demand."""
    shares = dict.fromkeys(demands, Fraction(0))
    open_flows, left = set(demands), Fraction(capacity)
    while open_flows and left:
        level = left / sum(weights[name] for name in open_flows)
        full = {n for n in open_flows if demands[n] - shares[n] <= level * weights[n]}
        for name in full or open_flows:
            more = demands[name] - shares[name] if full else level * weights[name]
            shares[name] += more
            left -= more
        if not full:
            break
        open_flows -= full
    return shares


@settings(max_examples=100, deadline=None)
@given(
    flows=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 5)), min_size=1, max_size=6),
    capacity=st.integers(0, 150),
    slots=st.integers(1, 8),
    shuffle=st.randoms(use_true_random=False),
)
def test_weighted_fair_dispatches_the_weighted_max_min_share(flows, capacity, slots, shuffle):
    """Within a dispatch of each flow, whatever the order of arrival."""
    demands = {f"m{n}": demand for n, (demand, _) in enumerate(flows)}
    weights = {f"m{n}": weight for n, (_, weight) in enumerate(flows)}
    arrivals = [name for name, demand in demands.items() for _ in range(demand)]
    shuffle.shuffle(arrivals)
    serving = Serving(plan_of(weights, WEIGHTED, slots))
    for name in arrivals:
        serving.submit(name)

    counts = Counter(request.model for request in serving.serve(capacity))

    for name, share in weighted_max_min(demands, weights, min(capacity, len(arrivals))).items():
        assert abs(counts[name] - share) <= 2


def test_four_to_one_is_four_to_one():
    """Of 320 and 320 equal requests, the first 320 are 256 and 64 (Dynamo's published run)."""
    serving = Serving(plan_of({"gold": 4, "free": 1}, WEIGHTED, slots=8))
    for _ in range(320):
        serving.submit("free")
        serving.submit("gold")

    counts = Counter(request.model for request in serving.serve(320))

    assert abs(counts["gold"] - 256) <= 1


@pytest.mark.parametrize("fairness", [TOKENS, FairnessName.WEIGHTED_FAIR_TOKENS])
@pytest.mark.parametrize("weights", [{"a": 1, "b": 1}, {"a": 3, "b": 1}])
def test_tokens_are_shared_by_weight_whatever_the_lengths(fairness, weights):
    """Answers of 400 tokens against answers of 20: within 2 % once both are known."""
    serving = Serving(plan_of(weights, fairness, slots=16))
    random = Random(5)
    for _ in range(4000):
        serving.submit("a", prompt=200, answer=random.randrange(300, 500))
        for _ in range(8):
            serving.submit("b", prompt=200, answer=random.randrange(10, 30))

    service: Counter[str] = Counter()
    serving.serve(2000)
    for request in serving.order[1000:]:
        usage = serving.usages[request.id]
        price = ANSWER_TOKEN if fairness is TOKENS else 1
        service[request.model] += usage.prompt_tokens + price * usage.completion_tokens

    expected = weights["a"] / weights["b"]
    assert service["a"] / service["b"] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("seed", range(4))
def test_the_difference_of_two_backlogged_flows_is_within_the_published_bound(seed):
    """Sheng et al., theorem 4.4: 2 max(prompt, batch), for service as it is given.

    The batch is what the slots hold at most; a request counts when its answer ends.
    """
    random = Random(seed)
    slots, most_prompt, most_answer = 8, 400, 200
    serving = Serving(plan_of({"a": 1, "b": 1, "c": 1}, TOKENS, slots))
    bound = 2 * max(PROMPT_TOKEN * most_prompt, slots * ANSWER_TOKEN * most_answer)
    service: Counter[str] = Counter()

    def arrive(model):
        serving.submit(
            model, "", random.randrange(1, most_prompt), random.randrange(1, most_answer)
        )

    for _ in range(60):  # a and b always wait; c comes and goes
        arrive("a")
        arrive("b")
    serving.poll()
    for step in range(FAIR_STEPS):
        request, usage = serving.end_next()
        service[request.model] += (
            PROMPT_TOKEN * usage.prompt_tokens + ANSWER_TOKEN * usage.completion_tokens
        )
        if request.model != "c":
            arrive(request.model)
        if step // 100 % 2 and random.random() < 0.4:
            arrive("c")
        assert abs(service["a"] - service["b"]) <= bound


def test_a_flow_that_was_away_gets_its_share_and_no_more():
    """Not what it did not ask for while it was idle, and it waits for no one's debt.

    Its answers are as long as is assumed of a flow that has had none yet.
    """
    for fairness in (WEIGHTED, TOKENS, FairnessName.WEIGHTED_FAIR_TOKENS):
        serving = Serving(plan_of({"a": 1, "b": 1}, fairness))
        for _ in range(300):
            serving.submit("a", answer=256)
        serving.serve(100)
        for _ in range(100):
            serving.submit("b", answer=256)

        later = serving.serve(140)[100:]

        assert abs(Counter(request.model for request in later)["b"] - 20) <= 2


def test_an_answer_without_usage_stays_charged_as_expected():
    """A client that goes away before the end does not get its tokens free."""
    serving = Serving(plan_of({"honest": 1, "leaves": 1}, TOKENS))
    for model in ("honest", "leaves"):
        for _ in range(100):
            serving.submit(model, answer=256)
    serving.poll()
    for _ in range(80):
        serving.now, number = heapq.heappop(serving.running)
        usage = serving.usages[number] if serving.requests[number].model == "honest" else None
        serving.controller.complete(number, usage, serving.now)
        serving.poll()

    counts = Counter(request.model for request in serving.order)
    assert abs(counts["honest"] - counts["leaves"]) <= 2


def test_too_high_an_estimate_is_paid_back():
    """A flow of short answers is taken for one of long ones at first, and served on for that."""
    serving = Serving(plan_of({"short": 1, "long": 1, "first": 1}, TOKENS))
    serving.submit("first", prompt=1, answer=256)
    serving.serve(1)
    serving.end_next()
    for model, answer in (("short", 1), ("long", 256)):
        for _ in range(600):
            serving.submit(model, prompt=1, answer=answer)

    service: Counter[str] = Counter()
    for request in serving.serve(401)[1:]:
        usage = serving.usages[request.id]
        service[request.model] += usage.prompt_tokens + ANSWER_TOKEN * usage.completion_tokens

    assert abs(service["short"] - service["long"]) < 2 * ANSWER_TOKEN * 257


@pytest.mark.parametrize("weights", [{}, {"t0": 3}])
def test_two_levels_are_fair_between_models_first_and_then_between_tenants(weights):
    """A model of one tenant gets as much as one of four; inside it tenants share by weight."""
    plan = plan_of(
        {"a": 1, "b": 1}, WEIGHTED, tenants=weights, inner=InnerPlan(FairnessName.WEIGHTED_FAIR)
    )
    serving = Serving(plan)
    for _ in range(300):
        serving.submit("b", "t9")
        for number in range(4):
            serving.submit("a", f"t{number}")

    counts = Counter((request.model, request.tenant) for request in serving.serve(240))

    assert abs(counts["b", "t9"] - 120) <= 1
    total = sum(weights.get(f"t{number}", 1) for number in range(4))
    for number in range(4):
        expected = 120 * weights.get(f"t{number}", 1) / total
        assert abs(counts["a", f"t{number}"] - expected) <= 1


def test_tenants_may_be_the_outer_level():
    """A tenant gets its share whatever models it uses, which it shares as the inner policy says."""
    plan = plan_of(
        {"a": 3, "b": 1},
        FairnessName.ROUND_ROBIN,
        between=Between.TENANTS,
        inner=InnerPlan(WEIGHTED),
    )
    serving = Serving(plan)
    for _ in range(200):
        serving.submit("a", "one")
        serving.submit("a", "two")
        serving.submit("b", "two")

    counts = Counter((request.tenant, request.model) for request in serving.serve(160))

    assert abs(counts["one", "a"] - 80) <= 1
    assert abs(counts["two", "a"] - 60) <= 1
    assert abs(counts["two", "b"] - 20) <= 1


def test_without_a_level_of_tenants_they_are_one_flow():
    """The header changes nothing where the policy does not ask for it."""
    serving = Serving(plan_of({"a": 1, "b": 1}, WEIGHTED))
    for number in range(100):
        serving.submit("a", f"t{number}")
        serving.submit("b", "t")

    assert Counter(request.model for request in serving.serve(100)) == {"a": 50, "b": 50}


@pytest.mark.parametrize("fairness", [WEIGHTED, TOKENS])
def test_a_greedy_tenant_costs_the_others_nothing(fairness):
    """Ten times as many requests as each other: their tokens stay within 5 % of a fair share."""
    plan = plan_of({"m": 1}, fairness, slots=8, between=Between.TENANTS)
    serving = Serving(plan)
    random = Random(2)
    tenants = ["greedy"] * 10 + [f"t{number}" for number in range(9)]
    for _ in range(10_000):
        serving.submit("m", random.choice(tenants), 200, random.randrange(10, 60))

    service: Counter[str] = Counter()
    for request in serving.serve(3000):
        usage = serving.usages[request.id]
        service[request.tenant] += usage.prompt_tokens + 2 * usage.completion_tokens

    share = sum(service.values()) / 10
    for tenant in set(tenants):
        assert service[tenant] == pytest.approx(share, rel=0.05)


def test_a_new_weight_counts_from_then_on():
    """What a flow had before is neither paid back nor owed."""
    serving = Serving(plan_of({"a": 1, "b": 1}, WEIGHTED))
    for _ in range(500):
        serving.submit("a")
        serving.submit("b")
    serving.serve(100)

    serving.controller.reconfigure(plan_of({"a": 4, "b": 1}, WEIGHTED), serving.now)
    later = serving.serve(200)[100:]

    assert abs(Counter(request.model for request in later)["a"] - 80) <= 1


def test_a_flow_that_no_slot_would_do_for_is_not_paid_back_all_at_once():
    """Blocked for a while by its subset hint, it has one turn at once and then its share."""
    other = "10.0.0.2:8000"
    controller = FlowController(plan_of({"a": 1, "b": 1}, WEIGHTED), Random(1))
    controller.set_endpoints([Endpoint(A), Endpoint(other)], 0.0)
    controller.submit(Request(1000, "a", 1, frozenset({other})), 0.0)
    controller.poll(0.0)
    for number in range(0, 400, 2):
        controller.submit(Request(number, "a", 1, frozenset({A})), 0.0)
        controller.submit(Request(number + 1, "b", 1, frozenset({other})), 0.0)
    served = []

    def serve(count):
        for _ in range(count):
            for decision in controller.poll(0.0):
                served.append("b" if decision.request_id % 2 else "a")
                controller.complete(decision.request_id, None, 0.0)

    serve(50)
    assert served == ["a"] * 50
    for number in range(0, 400, 2):  # for either server
        controller.submit(Request(2000 + number, "a", 1), 0.0)
        controller.submit(Request(2001 + number, "b", 1), 0.0)
    serve(20)

    assert abs(served[50:].count("b") - 10) <= 1


class Timeline:
    """Requests of tenants at their times, through a controller, with answers of fixed lengths."""

    def __init__(self, fairness, slots):
        plan = plan_of({"m": 1}, fairness, slots, between=Between.TENANTS)
        self.serving = Serving(plan)

    def waits(self, arrivals):
        """Play (at, tenant, answer) and return the seconds each tenant's requests waited."""
        serving, waits = self.serving, {}
        for at, tenant, answer in arrivals:
            while serving.running and serving.running[0][0] <= at:
                serving.end_next()
            serving.now = at
            serving.submit("m", tenant, 1, answer)
            serving.poll()
        while serving.running:
            serving.end_next()
        for request in serving.order:
            wait = request.dispatched_at - request.enqueued_at
            waits.setdefault(request.tenant, []).append(wait)
        return waits


def p99(values):
    return sorted(values)[int(len(values) * 0.99)]


@pytest.mark.parametrize("fairness", [WEIGHTED, TOKENS])
def test_a_tenant_waits_no_longer_beside_a_greedy_one_than_alone_with_its_share(fairness):
    """Its 99th percentile, among ten tenants on ten slots, against itself on one slot.

    Each sends 0.9 of what a slot can do, the greedy one ten times as much.
    """
    random = Random(4)
    arrivals = []
    for number in range(10):
        at, load = 0.0, 9.0 if number == 0 else 0.9
        while at < 200.0:
            at += random.expovariate(load / 0.1)  # answers take 0.1 s on average
            arrivals.append((at, f"t{number}", random.randrange(50, 150)))
    arrivals.sort()

    together = Timeline(fairness, 10).waits(arrivals)

    for number in range(1, 10):
        mine = [arrival for arrival in arrivals if arrival[1] == f"t{number}"]
        alone = Timeline(fairness, 1).waits(mine)[f"t{number}"]
        assert p99(together[f"t{number}"]) <= 1.2 * p99(alone)
    assert p99(together["t0"]) > 50


@settings(max_examples=60, deadline=None)
@given(
    percents=st.lists(st.integers(1, 45), min_size=1, max_size=2),
    slots=st.integers(1, 5),
    dispatches=st.integers(50, 200),
)
def test_a_band_with_a_reserved_share_gets_it_and_starves_no_more(percents, slots, dispatches):
    """At least its percentage of any number of dispatches, less one, below a band that floods."""
    low = [
        replace(BAND, name=f"low{n}", priority=-n - 1, reserved_percent=percent)
        for n, percent in enumerate(percents)
    ]
    plan = Plan(
        bands=(BAND, *low),
        models=tuple(ModelPlan(band.name, band.name) for band in (BAND, *low)),
        limits=LimitsPlan(max_requests=MANY),
        saturation=SaturationPlan(SaturationMode.CONCURRENCY, slots),
    )
    serving = Serving(plan)
    for _ in range(dispatches):
        for band in plan.bands:
            serving.submit(band.name)

    counts = Counter(request.model for request in serving.serve(dispatches))

    for band in low:
        assert counts[band.name] >= band.reserved_percent * dispatches // 100 - 1


def test_tokens_from_the_cache_cost_nothing():
    """A flow whose prompts are mostly cached is served as often as its work is small."""
    serving = Serving(plan_of({"cached": 1, "fresh": 1}, TOKENS, slots=4))
    for _ in range(3000):
        serving.submit("cached", prompt=1000, answer=50, cached=900)
        serving.submit("fresh", prompt=1000, answer=50)

    counts = Counter(request.model for request in serving.serve(2500)[500:])

    assert counts["cached"] / counts["fresh"] == pytest.approx(1100 / 200, rel=0.05)


@pytest.mark.parametrize(
    ("said", "cost"),
    [(None, 1024 + 100), (4096, 1024 + 100), (0, 5120 + 100)],
    ids=["no word of it", "cached as expected", "nothing cached"],
)
def test_what_the_prefix_index_believes_to_be_cached_is_not_charged(said, cost):
    """Prompts of 20 blocks that begin alike, but for 4 at their ends; an answer knows better."""
    serving = Serving(plan_of({"alike": 1, "fresh": 1}, TOKENS, slots=4))
    begin = tuple(range(1, 17))  # names of blocks
    for n in range(2000):
        end = tuple(-4 * n - i - 1 for i in range(4))
        serving.submit("alike", prompt=5120, answer=50, prefix=begin + end, cached=said)
        serving.submit("fresh", prompt=5120, answer=50)

    counts = Counter(request.model for request in serving.serve(1200)[200:])

    assert counts["alike"] / counts["fresh"] == pytest.approx((5120 + 100) / cost, rel=0.05)


@pytest.mark.parametrize("fairness", [TOKENS, FairnessName.WEIGHTED_FAIR_TOKENS])
def test_the_first_requests_of_all_are_shared_by_weight_too(fairness):
    """Although nothing is known yet of how long answers are."""
    plan = plan_of({"m": 1}, fairness, between=Between.TENANTS, tenants={"acme": 3})
    serving = Serving(plan)
    for _ in range(12):
        serving.submit("m", "globex", prompt=20, answer=10)
        serving.submit("m", "acme", prompt=20, answer=10)

    counts = Counter(request.tenant for request in serving.serve(12))

    assert abs(counts["acme"] - 9) <= 1


def test_a_new_weight_of_an_outer_flow_counts_and_idle_tenants_are_forgotten():
    """With tenants inside models."""
    inner = InnerPlan(WEIGHTED)
    serving = Serving(plan_of({"a": 1, "b": 1}, WEIGHTED, inner=inner))
    for number in range(400):
        serving.submit("a", f"t{number % 4}")
        serving.submit("b", f"t{number % 4}")
    serving.submit("c", "gone")
    serving.serve(100)

    serving.controller.reconfigure(
        plan_of({"a": 3, "b": 1}, WEIGHTED, tenants={"t0": 3}, inner=inner), serving.now
    )
    later = Counter((r.model, r.tenant) for r in serving.serve(220)[100:])

    assert abs(sum(n for (model, _), n in later.items() if model == "a") - 90) <= 2
    assert abs(later["a", "t0"] - 45) <= 2
    (band,) = serving.controller._bands.all
    assert not [path for path in band.levels.flows if "gone" in path]


@pytest.mark.parametrize("ordering", [OrderingName.EARLIEST_DEADLINE, OrderingName.SHORTEST_PROMPT])
def test_requests_that_leave_a_ranked_queue_leave_no_trace(ordering):
    """Most of a thousand go away, from everywhere in the queue; the rest keeps its order."""
    plan = plan_of({"m": 1}, FairnessName.FCFS, ordering=ordering)
    controller = FlowController(plan, Random(1))
    for number in range(1000):
        request = Request(number, "m", number, due_in_seconds=float(number + 1))
        controller.submit(request, 0.0)
    gone = Random(3).sample(range(1000), 950)
    for number in gone:
        controller.cancel(number, 0.0)
    controller.poll(0.0)
    controller.set_endpoints([Endpoint(A)], 0.0)
    served = []
    while decisions := controller.poll(0.0):
        served += [decision.request_id for decision in decisions]
        controller.complete(served[-1], None, 0.0)

    assert served == sorted(set(range(1000)) - set(gone))


def test_a_reserved_share_that_no_free_slot_would_do_for_holds_up_no_one():
    """Its band's requests may go only to a server that is full."""
    other = "10.0.0.2:8000"
    low = replace(BAND, name="low", priority=-1, reserved_percent=40)
    plan = Plan(
        bands=(BAND, low),
        models=(ModelPlan("low", "low"),),
        saturation=SaturationPlan(SaturationMode.CONCURRENCY, 1),
    )
    controller = FlowController(plan, Random(1))
    controller.set_endpoints([Endpoint(A), Endpoint(other)], 0.0)
    controller.submit(Request(0, "m", 1, frozenset({other})), 0.0)
    controller.poll(0.0)
    for number in range(1, 30):
        controller.submit(Request(number, "m", 1, frozenset({A})), 0.0)
        controller.submit(Request(100 + number, "low", 1, frozenset({other})), 0.0)
    served = []
    for _ in range(10):
        served += [decision.request_id for decision in controller.poll(0.0)]
        controller.complete(served[-1], None, 0.0)

    assert served == list(range(1, 11))


def test_tenants_inside_models_take_turns_beside_subset_hints():
    """Lanes that wait at a server are of tenants inside models as well."""
    other = "10.0.0.2:8000"
    plan = plan_of({"a": 1, "b": 1}, WEIGHTED, inner=InnerPlan(WEIGHTED))
    controller = FlowController(plan, Random(1))
    controller.set_endpoints([Endpoint(A), Endpoint(other)], 0.0)
    for number, address in enumerate((A, other)):
        controller.submit(Request(number, "x", 1, frozenset({address})), 0.0)
    controller.poll(0.0)
    kinds = [
        (model, tenant, hint)
        for model, tenant in (("a", "t1"), ("a", "t2"), ("b", "t1"))
        for hint in (None, frozenset({A}), frozenset({A, other}))
    ]
    for number in range(270):
        model, tenant, hint = kinds[number % 9]
        controller.submit(Request(10 + number, model, 1, hint, tenant=tenant), 0.0)
    for number in range(10, 280, 27):  # some leave, the first ones of lanes among them
        controller.cancel(number, 0.0)
    controller.poll(0.0)
    controller.complete(0, None, 0.0)
    served = []
    for _ in range(80):
        served += [decision.request_id for decision in controller.poll(0.0)]
        controller.complete(served[-1], None, 0.0)

    counts = Counter(kinds[(number - 10) % 9][:2] for number in served)
    assert abs(counts["b", "t1"] - 40) <= 1
    assert abs(counts["a", "t1"] - counts["a", "t2"]) <= 1
