"""The model of continuous batching, in virtual time."""

from __future__ import annotations

from dataclasses import replace
from operator import itemgetter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay_sim.hardware import PRESETS, Hardware
from forebay_sim.stepping import StepEngine
from forebay_sim.terms import (
    EngineRequest,
    Finished,
    FirstToken,
    NotReadyError,
    Preempted,
    TokensProduced,
    TooLongError,
)

# A step lasts 10 ms and 1 ms for each token, so that times tell what was in it.
COUNTING = Hardware(
    max_num_seqs=8,
    max_num_batched_tokens=100,
    overhead_seconds=0.01,
    weights_seconds=0.0,
    token_seconds=0.001,
)
# A step lasts 10 ms, whatever is in it.
EVEN = replace(COUNTING, token_seconds=0.0)

REQUESTS = st.lists(
    st.tuples(
        st.floats(0, 2),  # arrival
        st.integers(1, 60),  # prompt tokens
        st.integers(1, 40),  # answer tokens
        st.sampled_from(["", "", "a", "b"]),  # adapter
        st.sampled_from([0.0, 0.0, 0.05]),  # deferred seconds
        st.none() | st.floats(0, 0.5),  # aborted so long after it arrived
    ),
    min_size=1,
    max_size=25,
)


def run(engine: StepEngine, requests, check=lambda: None):
    """Feed (arrival, prompt, answer, adapter, deferral, abort) and return all events until idle."""
    events, calls = [], []
    for number, (at, prompt, answer, *rest) in enumerate(requests):
        adapter, deferred, abort = (*rest, *("", 0.0, None)[len(rest) :])
        request = EngineRequest(number, prompt, answer, (), adapter, deferred)
        calls.append((at, number, lambda now, r=request: engine.submit(r, now)))
        if abort is not None:
            calls.append((at + abort, number, lambda now, n=number: engine.abort(n, now)))
    calls.sort(key=lambda call: call[:2])
    while True:
        wakeup = engine.next_wakeup()
        if calls and (wakeup is None or calls[0][0] <= wakeup):
            at, _, call = calls.pop(0)
            call(at)
            events += engine.advance(at)
        elif wakeup is not None:
            events += engine.advance(wakeup)
        else:
            return events
        check()


def first_tokens(events):
    return {event.request_id: event.at for event in events if isinstance(event, FirstToken)}


def finishes(events):
    return {event.request_id: event.at for event in events if isinstance(event, Finished)}


# --- steps


def test_a_step_takes_its_tokens_and_what_they_read():
    """Overhead, then a prompt of 20 tokens, then one token that reads 20 of context."""
    hardware = replace(COUNTING, context_token_seconds=0.0001)

    events = run(StepEngine(hardware), [(0.0, 20, 2)])

    assert first_tokens(events) == {0: pytest.approx(0.01 + 0.020)}
    assert events[-1].at == pytest.approx(0.03 + 0.01 + 0.001 + 20 * 0.0001)


def test_reading_the_weights_hides_the_arithmetic_of_few_tokens():
    """A step of 5 tokens lasts as long as one of a single token."""
    hardware = replace(COUNTING, overhead_seconds=0.0, weights_seconds=0.02)

    events = run(StepEngine(hardware), [(0.0, 5, 2), (0.05, 50, 1)])

    assert first_tokens(events)[0] == pytest.approx(0.02)
    assert finishes(events) == {0: pytest.approx(0.04), 1: pytest.approx(0.10)}


def test_a_long_prompt_is_prefilled_in_chunks_and_slows_what_decodes():
    """The first answer gets its tokens in steps of 100 tokens while 198 prompt tokens pass."""
    events = run(StepEngine(COUNTING, show_tokens=True), [(0.0, 10, 4), (0.005, 198, 1)])

    tokens = [event.at for event in events if isinstance(event, TokensProduced)]
    assert tokens == [pytest.approx(at) for at in (0.13, 0.24, 0.251)]
    assert first_tokens(events) == {0: pytest.approx(0.02), 1: pytest.approx(0.24)}


def test_requests_wait_for_budget_although_the_batch_has_room():
    """Six prompts of 60 tokens, 100 a step: they start one after the other."""
    engine = StepEngine(EVEN)
    for number in range(6):
        engine.submit(EngineRequest(number, 60, 50), 0.0)

    engine.advance(0.021)

    assert engine.published.running == 3
    assert engine.published.waiting == 3


def test_no_more_run_than_the_batch_holds():
    """The ninth request starts when one of the eight has ended."""
    events = run(StepEngine(EVEN), [(0.0, 10, 50)] * 9)

    assert first_tokens(events)[8] == pytest.approx(finishes(events)[0] + 0.01)


def test_the_first_token_of_the_plain_preset_comes_after_50_ms_and_others_every_10():
    """The batch goes on meanwhile: others lose nothing."""
    events = run(
        StepEngine(PRESETS["plain"], show_tokens=True),
        [(0.0, 10, 20), (0.095, 10, 20)],
    )

    assert first_tokens(events) == {0: pytest.approx(0.05), 1: pytest.approx(0.15)}
    assert finishes(events) == {0: pytest.approx(0.24), 1: pytest.approx(0.34)}


# --- memory


def test_a_cached_prefix_costs_no_prefill():
    """The second request with the same blocks computes 4 tokens instead of 100."""
    engine = StepEngine(COUNTING)
    hashes = tuple(range(6))
    engine.submit(EngineRequest(1, 100, 1, hashes), 0.0)
    engine.advance(1.0)

    engine.submit(EngineRequest(2, 100, 1, hashes), 1.0)

    first, finished = engine.advance(2.0)
    assert first.at == pytest.approx(1.0 + 0.01 + 4 * 0.001)
    assert finished.usage.cached_tokens == 96
    said = engine.published
    assert (said.prompt_tokens, said.cached_tokens, said.step_tokens) == (200, 96, 106)


def test_the_youngest_is_preempted_when_blocks_run_out_and_finishes_later():
    """Two answers that do not fit together: one loses its blocks and is computed again."""
    hardware = replace(EVEN, kv_blocks=4, block_size_tokens=4, max_num_seqs=2)

    events = run(StepEngine(hardware), [(0.0, 4, 9), (0.0, 4, 9)])

    assert [event.request_id for event in events if isinstance(event, Preempted)] == [1]
    assert [event.request_id for event in events if isinstance(event, Finished)] == [0, 1]


def test_a_request_preempted_before_its_first_token_still_gets_one():
    """The long prompt loses its blocks while it is prefilled in chunks."""
    hardware = replace(
        EVEN, kv_blocks=14, block_size_tokens=4, max_num_seqs=2, max_num_batched_tokens=5
    )

    events = run(StepEngine(hardware), [(0.0, 4, 20), (0.01, 44, 2)])

    preempted = [event.at for event in events if isinstance(event, Preempted)]
    assert preempted
    assert first_tokens(events)[1] > preempted[0]


def test_a_request_waits_for_an_adapter_and_others_pass_it():
    """Deferred, as vLLM counts it, until the only slot for adapters is free."""
    engine = StepEngine(replace(EVEN, max_loras=1, lora_load_seconds=0.05))
    for number, adapter in enumerate(("a", "b", "")):
        engine.submit(EngineRequest(number, 1, 10, adapter=adapter), 0.0)

    events = engine.advance(0.03)

    assert first_tokens(events) == {2: pytest.approx(0.02)}
    assert (engine.published.waiting, engine.published.deferred) == (0, 1)
    assert first_tokens(engine.advance(1.0))[1] > first_tokens(events)[2] + 0.05


# --- what is published


def test_the_page_stands_still_during_a_step_and_leaves_out_what_came_in_it():
    """Arrivals of a step are neither running nor waiting before the end of the next."""
    engine = StepEngine(EVEN)
    engine.submit(EngineRequest(0, 1, 50), 0.0)
    before = engine.published
    engine.submit(EngineRequest(1, 1, 50), 0.005)
    engine.advance(0.009)
    during = engine.published
    engine.advance(0.015)
    after = engine.published

    assert (before.running, during.running) == (0, 0)
    assert (after.running, after.waiting) == (1, 0)
    engine.advance(0.025)
    assert engine.published.running == 2


def test_when_all_are_aborted_together_the_page_shows_them_until_the_next_step():
    """An idle engine publishes nothing."""
    engine = StepEngine(EVEN)
    for number in range(3):
        engine.submit(EngineRequest(number, 1, 50), 0.0)
    engine.advance(0.025)
    for number in range(3):
        assert engine.abort(number, 0.025)
    engine.advance(5.0)
    stale = engine.published

    engine.submit(EngineRequest(9, 1, 1), 5.0)
    engine.advance(6.0)

    assert (stale.running, engine.running, engine.kv_used_blocks) == (3, 0, 0)
    assert engine.published.running == 0


def test_a_deferred_request_shows_on_the_page_of_an_idle_engine():
    """Such as one whose grammar is compiled: it waits, but for no capacity."""
    engine = StepEngine(EVEN)

    engine.submit(EngineRequest(0, 1, 1, deferred_seconds=3.0), 0.0)

    assert engine.published.deferred == 1
    assert engine.next_wakeup() == 3.0
    assert first_tokens(engine.advance(4.0)) == {0: pytest.approx(3.01)}
    assert engine.published.deferred == 0


def test_a_step_that_only_prefills_part_of_a_prompt_does_not_count():
    """As vLLM counts: the whole prompt with its first token."""
    engine = StepEngine(EVEN)
    engine.submit(EngineRequest(0, 250, 2), 0.0)

    engine.advance(0.025)
    before = engine.published
    engine.advance(0.035)

    assert (before.running, before.steps, before.step_tokens) == (1, 0, 0)
    assert (engine.published.steps, engine.published.step_tokens) == (1, 251)


def test_the_queue_time_of_finished_requests_adds_up():
    """Of two requests in a batch of one, the second waits as long as the first takes."""
    engine = StepEngine(replace(EVEN, max_num_seqs=1))
    engine.submit(EngineRequest(0, 1, 10), 0.0)
    engine.submit(EngineRequest(1, 1, 10), 0.0)

    engine.advance(1.0)

    # It is queued when the first step ends.
    assert (engine.published.finished, engine.published.queue_seconds) == (2, pytest.approx(0.09))


# --- refusals and ends


def test_an_impossible_request_is_refused():
    """It leaves nothing behind."""
    engine = StepEngine(replace(EVEN, kv_blocks=4))

    with pytest.raises(TooLongError):
        engine.submit(EngineRequest(4, 1, 1000), 0.0)

    assert (engine.running, engine.waiting, engine.next_wakeup()) == (0, 0, None)


def test_a_starting_engine_takes_no_requests():
    """Nor does it publish anything."""
    engine = StepEngine(replace(EVEN, startup_seconds=30.0), started_at=100.0)

    with pytest.raises(NotReadyError):
        engine.submit(EngineRequest(1, 1, 1), 129.0)
    engine.submit(EngineRequest(1, 1, 1), 130.0)

    assert engine.ready_at == 130.0


def test_an_aborted_request_makes_room_from_the_next_step():
    """A client that goes away frees slot and blocks."""
    engine = StepEngine(replace(EVEN, max_num_seqs=1))
    engine.submit(EngineRequest(1, 1, 50), 0.0)
    engine.submit(EngineRequest(2, 1, 50), 0.0)

    assert engine.abort(1, 0.1)

    assert not engine.abort(1, 0.1)
    assert first_tokens(engine.advance(1.0)) == {1: pytest.approx(0.01), 2: pytest.approx(0.12)}


def test_an_id_can_be_used_again_while_its_aborted_request_ends():
    """Its tokens and its end are those of the new request."""
    engine = StepEngine(EVEN, show_tokens=True)
    engine.submit(EngineRequest(1, 1, 50), 0.0)
    engine.advance(0.025)
    engine.abort(1, 0.025)

    engine.submit(EngineRequest(1, 1, 2), 0.025)

    kinds = [type(event) for event in engine.advance(1.0)]
    assert kinds == [FirstToken, TokensProduced, Finished]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", 7),
        ("token_seconds", float("nan")),
        ("overhead_seconds", 0.0),
    ],
)
def test_settings_out_of_range_are_named(field, value):
    """Zero slots, a budget below the batch, no number, steps that take no time."""
    with pytest.raises(ValueError, match=field):
        replace(EVEN, **{field: value})


# --- invariants


@given(
    requests=REQUESTS,
    slots=st.integers(1, 6),
    blocks=st.integers(8, 40),
    budget=st.integers(6, 40),
    block_size=st.sampled_from([13, 16]),
    held=st.sampled_from([0.0, 0.03]),
)
@settings(max_examples=60, deadline=None)
def test_every_request_ends_with_its_tokens_within_the_limits(
    requests, slots, blocks, budget, block_size, held
):
    """Batch, blocks and budget are never exceeded, all finish whole, nothing is held at the end."""
    hardware = Hardware(
        max_num_seqs=slots,
        max_num_batched_tokens=budget,
        first_token_seconds=held,
        kv_blocks=blocks,
        block_size_tokens=block_size,
    )
    engine = StepEngine(hardware, show_tokens=True)

    def check():
        assert max(engine.running, engine.published.running) <= slots
        assert engine.kv_used_blocks <= blocks
        assert engine.scheduled_tokens <= budget
        assert min(engine.published) >= 0

    events = run(engine, requests, check)

    produced = dict.fromkeys(range(len(requests)), 0)
    for event in events:
        match event:
            case FirstToken(_, request_id):
                assert produced[request_id] == 0
                produced[request_id] = 1
            case TokensProduced(_, request_ids):
                for request_id in request_ids:
                    produced[request_id] += 1
            case Finished(_, request_id, usage):
                assert produced[request_id] == usage.completion_tokens
    ended = finishes(events)
    for number, request in enumerate(requests):
        if request[5] is None:
            assert number in ended
            assert produced[number] == request[2]
    assert [event.at for event in events] == sorted(event.at for event in events)
    assert (engine.running, engine.waiting, engine.deferred, engine.kv_used_blocks) == (0, 0, 0, 0)
    assert engine.published.finished == len(ended)
    if all(request[5] is None for request in requests):
        assert engine.published.generation_tokens == sum(request[2] for request in requests)
        assert engine.published.prompt_tokens == sum(request[1] for request in requests)


@given(requests=REQUESTS, late=st.floats(0.001, 3))
@settings(max_examples=25, deadline=None)
def test_a_late_caller_gets_the_same_events(requests, late):
    """Nothing is left to chance, nor to when the engine is asked."""
    hardware = replace(PRESETS["plain"], max_num_seqs=3)
    engine = StepEngine(hardware)
    events = []
    for number, (at, prompt, answer, *_) in enumerate(sorted(requests, key=itemgetter(0))):
        engine.submit(EngineRequest(number, prompt, answer), at)
        if number % 3 == 0:
            events += engine.advance(at)
    while (wakeup := engine.next_wakeup()) is not None:
        events += engine.advance(wakeup + late)

    plain = [(at, prompt, answer) for at, prompt, answer, *_ in sorted(requests, key=itemgetter(0))]
    assert events == run(StepEngine(hardware), plain)
