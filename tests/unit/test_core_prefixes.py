"""The prefix index, and what endpoint selection makes of it."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay_control.plan import (
    BandPlan,
    FairnessName,
    ModelPlan,
    Plan,
    SaturationMode,
    SaturationPlan,
    ScorerName,
    ScorerPlan,
    SelectionPlan,
)
from forebay_epp.core import prefixes
from forebay_epp.core.controller import FlowController
from forebay_epp.core.endpoints import EndpointSet
from forebay_epp.core.prefixes import PrefixIndex
from forebay_epp.core.selection.budgets import PrefillRoom
from forebay_epp.core.selection.scorers import PrefixCache
from forebay_epp.core.terms import (
    PREFIX_BLOCK_BYTES,
    Dispatched,
    Endpoint,
    EndpointMetrics,
    Request,
)
from forebay_epp.core.tracked import TrackedEndpoint

ADDRESSES = [f"10.0.0.{number}:8000" for number in range(20)]
A, B = ADDRESSES[:2]
SLOTS = SaturationPlan(SaturationMode.CONCURRENCY, 8)
LOAD = SelectionPlan((ScorerPlan(ScorerName.LOAD),))
BLOCK_TOKENS = 256


def endpoint(address=A):
    return TrackedEndpoint(Endpoint(address), SLOTS, 0.0)


def request(*prefix, number=1, model="m"):
    made = Request(number, model, len(prefix) * PREFIX_BLOCK_BYTES, prefix=prefix)
    made.prompt_tokens = len(prefix) * BLOCK_TOKENS
    made.block_tokens = BLOCK_TOKENS
    return made


def page(address=A, *, hits=None, capacity=None, at=1.0):
    return EndpointMetrics(address, 0, 0, 0.0, at, kv_capacity_tokens=capacity, prefix_hits=hits)


def held(index, where, *prefix):
    return index.cached_tokens(where, request(*prefix)) / BLOCK_TOKENS


def test_an_endpoint_has_the_beginning_of_what_it_was_sent():
    """And of another prompt the part that is the same."""
    index, a, b = PrefixIndex(), endpoint(A), endpoint(B)
    index.sent(a, request(1, 2, 3))

    assert [held(index, a, *prefix) for prefix in [(1, 2, 3, 4), (1, 2, 9), (9, 2)]] == [3, 2, 0]
    assert held(index, b, 1, 2) == 0
    assert list(index.holders(request(1, 2, 5))) == [a]


def test_the_second_of_a_conversation_is_expected_to_be_cached():
    """It is written on the request that is sent."""
    index, a = PrefixIndex(), endpoint()
    first, second = request(1, 2), request(1, 2, 3)
    index.sent(a, first)
    index.sent(a, second)

    assert (first.cached_tokens, second.cached_tokens) == (0, 2 * BLOCK_TOKENS)


def test_a_cache_keeps_what_fits_and_of_a_prompt_its_beginning():
    """Four blocks of KV cache: the least recently used prompt goes, its last block first."""
    index, a = PrefixIndex(), endpoint()
    a.kv_capacity_tokens = 4 * prefixes.PREFIX_BLOCK_TOKENS
    index.sent(a, request(1, 2, 3))
    index.sent(a, request(7, 8))

    assert held(index, a, 1, 2, 3) == 2
    assert index.size == 4

    index.observe(a, page(capacity=2 * prefixes.PREFIX_BLOCK_TOKENS))
    index.sent(a, request(7, 8))
    assert held(index, a, 1, 2, 3) == 0
    assert index.size == 2


def test_all_endpoints_together_have_a_bound(monkeypatch):
    """However large their caches are."""
    monkeypatch.setattr(prefixes, "MAX_BLOCKS", 100)
    index = PrefixIndex()
    for round_ in range(2):
        for number, address in enumerate(ADDRESSES):
            where = endpoint(address)
            index.sent(where, request(*range(1000 * number, 1000 * number + 30 + round_)))

    assert index.size <= 100


def test_a_server_that_restarts_has_nothing():
    """Its counter of hits begins at 0 again."""
    index, a = PrefixIndex(), endpoint()
    index.sent(a, request(1, 2))
    index.observe(a, page(hits=500.0))
    assert held(index, a, 1, 2) == 2

    index.observe(a, page(hits=0.0))

    assert held(index, a, 1, 2) == 0
    assert index.size == 0


def test_promises_that_a_server_does_not_keep_are_trusted_less_and_less():
    """And again once it keeps them."""
    index, a = PrefixIndex(), endpoint()
    long = request(*range(100))
    index.sent(a, long)
    index.observe(a, page(hits=0.0))
    trusted, hits = [], 0.0
    for kept in [0.0] * 5 + [1.0] * 8:
        index.sent(a, long)
        hits += kept * 100 * BLOCK_TOKENS
        index.observe(a, page(hits=hits))
        trusted.append(held(index, a, *range(100)) / 100)

    assert trusted[:5] == sorted(trusted[:5], reverse=True)
    assert trusted[4] < 0.2
    assert trusted[-1] > 0.9


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.lists(st.integers(0, 3), min_size=1, max_size=6),
            st.sampled_from(["send", "send", "send", "forget"]),
        ),
        max_size=60,
    )
)
def test_an_endpoint_always_has_a_beginning(steps):
    """By an oracle that keeps each endpoint's blocks in order of use and counts from the first."""
    index, capacity = PrefixIndex(), 5
    endpoints = [endpoint(address) for address in ADDRESSES[:4]]
    oracle = [[] for _ in endpoints]
    for each in endpoints:
        each.kv_capacity_tokens = capacity * prefixes.PREFIX_BLOCK_TOKENS
    for number, path, action in steps:
        names = [hash(tuple(path[: depth + 1])) for depth in range(len(path))]
        where, known = endpoints[number], oracle[number]
        if action == "forget":
            index.forget(where)
            known.clear()
        else:
            index.sent(where, request(*names))
            for name in reversed(names):
                if name in known:
                    known.remove(name)
                known.append(name)
            del known[: max(0, len(known) - capacity)]
        for other, blocks in zip(endpoints, oracle, strict=True):
            depth = 0
            while depth < len(names) and names[depth] in blocks:
                depth += 1
            assert held(index, other, *names) == depth
        assert index.size == sum(map(len, oracle))


# --- selection


def controller_of(selection=None, addresses=ADDRESSES, *models, slots=8):
    plan = Plan(
        bands=(BandPlan("Standard", 0, FairnessName.WEIGHTED_FAIR),),
        models=tuple(ModelPlan(name, "Standard") for name in models),
        saturation=SaturationPlan(SaturationMode.CONCURRENCY, slots),
        selection=selection or SelectionPlan(),
    )
    controller = FlowController(plan, Random(1))
    controller.set_endpoints(map(Endpoint, addresses), 0.0)
    return controller


def sent(controller, made, now=0.0):
    controller.submit(made, now)
    (decision,) = controller.poll(now)
    assert isinstance(decision, Dispatched)
    return decision.endpoint


def test_a_conversation_returns_to_its_server_in_a_pool_of_twenty():
    """Although only some of the endpoints are considered for each request."""
    controller = controller_of()
    where = [sent(controller, request(*range(9 * n, 9 * n + 9), number=n)) for n in range(20)]
    for number in range(20):
        controller.complete(number, None, 1.0)

    again = [
        sent(controller, request(*range(9 * n, 9 * n + 9), 1000 + n, number=100 + n))
        for n in range(20)
    ]
    assert again == where


def test_a_full_server_is_not_waited_for():
    """Work conservation: its conversation goes elsewhere, at once."""
    controller = controller_of(addresses=[A, B], slots=1)
    first = sent(controller, request(1, 2, 3))

    assert sent(controller, request(1, 2, 3, 4, number=2)) != first


@pytest.mark.parametrize(("backlog", "expected"), [(2, A), (7, B)])
def test_a_request_prefers_its_server_while_waiting_there_takes_less_than_it_saves(
    backlog, expected
):
    """Four blocks are cached; as many or more blocks wait there before it, or fewer."""
    only = SelectionPlan((ScorerPlan(ScorerName.PREFIX_CACHE, 10), ScorerPlan(ScorerName.LOAD)))
    controller = controller_of(only, [A])
    sent(controller, request(1, 2, 3, 4))
    controller.first_token(1, 0.0)
    controller.complete(1, None, 0.0)
    sent(controller, request(*range(50, 50 + backlog), number=2))
    controller.set_endpoints([Endpoint(A), Endpoint(B)], 0.0)

    assert sent(controller, request(1, 2, 3, 4, 5, number=3)) == expected


def test_other_pods_at_its_address_have_nothing():
    """What an endpoint had is forgotten when it leaves."""
    controller = controller_of(addresses=[A, B])
    first = sent(controller, request(1, 2, 3))
    controller.complete(1, None, 0.0)
    other = ({A, B} - {first}).pop()
    controller.set_endpoints([Endpoint(first, uid="new"), Endpoint(other)], 0.0)
    assert controller.state(0.0).prefix_blocks == 3  # the uid was not known: the same pod
    controller.set_endpoints([Endpoint(first, uid="newer"), Endpoint(other)], 0.0)

    assert controller.state(0.0).prefix_blocks == 0


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5)), min_size=1, max_size=80),
    st.integers(1, 3),
    st.randoms(use_true_random=False),
)
def test_affinity_changes_where_and_never_when(load, slots, random):
    """Whatever is cached, requests are dispatched in the same order as by load alone.

    So all that is said of shares without affinity holds with it, and the bound on what it reorders
    is 0.
    """
    orders = []
    choices = [random.random() for _ in load]
    for selection in (SelectionPlan(), LOAD):
        controller = controller_of(selection, [A, B], "a", "b", "c", slots=slots)
        for number, (model, topic) in enumerate(load):
            prefix = tuple(100 * topic + depth for depth in range(4))
            controller.submit(request(*prefix, number=number, model=model), 0.0)
        order, running = [], []
        for choice in [*choices, *choices]:
            for decision in controller.poll(0.0):
                order.append(decision.request_id)
                running.append(decision.request_id)
            if running:
                controller.complete(running.pop(int(choice * len(running))), None, 0.0)
        orders.append(order)

    assert orders[0] == orders[1]
    assert sorted(orders[0]) == list(range(len(load)))


def test_a_plan_without_prefix_cache_does_not_use_it():
    """Names that a request brings all the same change nothing."""
    controller = controller_of(LOAD, [A, B])
    first = sent(controller, request(1, 2, 3))

    assert sent(controller, request(1, 2, 3, number=2)) != first
    assert not controller.plan.choice.rates(ScorerName.PREFIX_CACHE)


RATE = 1024.0  # prompt tokens a second


@pytest.fixture
def pool():
    """Endpoints A, which has blocks 1 to 8, and B, which has none; both of one speed."""
    plan = SaturationPlan(SaturationMode.ADAPTIVE, time_to_first_token_seconds=1.0)
    found = EndpointSet(plan)
    found.replace([Endpoint(A), Endpoint(B)], 0.0)
    for tracked in found.present:
        tracked.prefill.rate = RATE
    found.prefixes.sent(found.present[0], request(*range(1, 9)))
    return found


@pytest.mark.parametrize(
    ("backlog_blocks", "score"), [(0, 1.0), (4, 0.5), (8, 0.0), (12, 0.0)], ids=str
)
def test_a_cached_prompt_is_worth_the_time_it_saves_less_the_wait_for_it(
    pool, backlog_blocks, score
):
    """Where the speed is known: of 2 s to prefill all of it, and nothing below 0."""
    a, b = pool.present
    a.prefill.sent(request(*range(100, 100 + backlog_blocks)), 0.0)

    scores = PrefixCache(pool).score(request(*range(1, 9)), [a, b], 0.0)

    assert scores == pytest.approx([score, 0.0])


def test_a_speed_that_is_not_known_is_taken_to_be_like_the_others(pool):
    """One server that has not prefilled a long prompt yet does not turn seconds into tokens."""
    a, b = pool.present
    a.prefill.rate = 0.0
    a.prefill.sent(request(*range(100, 104)), 0.0)

    assert PrefixCache(pool).score(request(*range(1, 9)), [a, b], 0.0) == pytest.approx([0.5, 0.0])


@pytest.mark.parametrize(("backlog_blocks", "kept"), [(7, True), (9, False)], ids=str)
def test_a_cached_prompt_goes_without_room_where_that_saves_more_than_it_waits(
    pool, backlog_blocks, kept
):
    """A prompt of 16 blocks, half of it cached, and a backlog of more than the goal allows."""
    a, b = pool.present
    for tracked in (a, b):
        tracked.prefill.sent(request(*range(100, 100 + backlog_blocks)), 0.0)
    long = request(*range(1, 9), *range(200, 208))

    assert PrefillRoom(pool).keep(long, [a, b], 0.0) == ([a] if kept else [])
    assert (a.crowded, b.crowded) == (not kept, True)


def test_hits_beyond_what_was_promised_earn_no_more_than_full_trust():
    """They are other clients' hits: no server has more of a prompt than all of it."""
    index, a = PrefixIndex(), endpoint()
    prompt = range(1, 1 + 2 * prefixes.JUDGED_TOKENS // BLOCK_TOKENS)
    index.sent(a, request(*prompt))
    index.observe(a, page(hits=0))
    index.sent(a, request(*prompt))

    index.observe(a, page(hits=10 * prefixes.JUDGED_TOKENS, at=2.0))

    assert held(index, a, 1, 2) == 2
