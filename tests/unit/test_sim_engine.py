"""The model of continuous batching, in virtual time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay_sim.engine import (
    Engine,
    EngineRequest,
    EngineSettings,
    Finished,
    FirstToken,
    Preempted,
    QueueFullError,
    TokensProduced,
    TooLongError,
)

REQUESTS = st.lists(
    st.tuples(
        st.floats(0, 2),  # arrival
        st.integers(1, 60),  # prompt tokens
        st.integers(1, 40),  # answer tokens
        st.sampled_from(["", "", "a", "b"]),  # adapter
    ),
    min_size=1,
    max_size=25,
)


def run(engine: Engine, requests, check=lambda: None):
    """Feed requests at their times; return all events until the engine is idle."""
    events = []
    pending = sorted(enumerate(requests), key=lambda item: item[1][0])
    while True:
        wakeup = engine.next_wakeup()
        if pending and (wakeup is None or pending[0][1][0] <= wakeup):
            number, (at, prompt, answer, adapter) = pending.pop(0)
            engine.submit(EngineRequest(number, prompt, answer, adapter=adapter), at)
            events += engine.advance(at)
        elif wakeup is not None:
            events += engine.advance(wakeup)
        else:
            return events
        check()


def first_tokens(events):
    return {event.request_id: event.at for event in events if isinstance(event, FirstToken)}


def test_one_request_takes_prefill_and_a_step_per_further_token():
    """50 ms to the first token, 10 ms for each of the others."""
    settings_ = EngineSettings(prefill_seconds_per_token=0.0)

    events = run(Engine(settings_), [(0.0, 10, 50, "")])

    assert first_tokens(events) == {0: pytest.approx(0.05)}
    assert events[-1].at == pytest.approx(0.05 + 49 * 0.01)
    assert events[-1].usage.completion_tokens == 50


def test_no_more_run_than_there_are_slots():
    """The ninth request starts when one of the eight has ended."""
    engine = Engine(EngineSettings(max_num_seqs=8, prefill_seconds_per_token=0.0))

    events = run(engine, [(0.0, 10, 50, "")] * 9)

    assert first_tokens(events)[8] > 0.5


def test_a_full_batch_decodes_slower():
    """Each step lasts the given factor longer."""
    slow = EngineSettings(max_num_seqs=2, full_batch_slowdown=2.0)

    alone = run(Engine(slow), [(0.0, 1, 20, "")])[-1].at
    together = run(Engine(slow), [(0.0, 1, 20, "")] * 2)[-1].at

    assert together - 0.05 == pytest.approx(2 * (alone - 0.05), rel=0.1)


def test_a_cached_prefix_costs_no_prefill():
    """The second request with the same blocks has its first token sooner."""
    settings_ = EngineSettings(prefill_overhead_seconds=0.0, prefill_seconds_per_token=0.001)
    engine = Engine(settings_)
    hashes = tuple(range(6))
    engine.submit(EngineRequest(1, 100, 1, hashes), 0.0)
    engine.advance(1.0)

    engine.submit(EngineRequest(2, 100, 1, hashes), 1.0)

    first, finished = engine.advance(2.0)
    assert first.at == pytest.approx(1.0 + 4 * 0.001)
    assert finished.usage.cached_tokens == 96


def test_the_youngest_is_preempted_when_blocks_run_out_and_finishes_later():
    """Two answers that do not fit together: one loses its blocks and is computed again."""
    settings_ = EngineSettings(kv_blocks=4, block_size_tokens=4, max_num_seqs=2)

    events = run(Engine(settings_), [(0.0, 4, 9, ""), (0.0, 4, 9, "")])

    assert [event.request_id for event in events if isinstance(event, Preempted)] == [1]
    assert [event.request_id for event in events if isinstance(event, Finished)] == [0, 1]


def test_a_full_queue_and_an_impossible_request_are_refused():
    """As a server answers 429 and 400; neither leaves anything behind."""
    engine = Engine(EngineSettings(max_num_seqs=1, max_waiting=1, kv_blocks=4))
    engine.submit(EngineRequest(1, 1, 5), 0.0)
    engine.submit(EngineRequest(2, 1, 5), 0.0)

    with pytest.raises(QueueFullError):
        engine.submit(EngineRequest(3, 1, 5), 0.0)
    with pytest.raises(TooLongError):
        engine.submit(EngineRequest(4, 1, 1000), 0.0)

    assert (engine.running, engine.waiting) == (1, 1)


def test_an_aborted_request_makes_room():
    """A client that goes away frees slot and blocks at once."""
    engine = Engine(EngineSettings(max_num_seqs=1))
    engine.submit(EngineRequest(1, 1, 50), 0.0)
    engine.submit(EngineRequest(2, 1, 50), 0.0)

    assert engine.abort(1, 0.1)

    assert (engine.running, engine.waiting, engine.abort(1, 0.1)) == (1, 0, False)


@given(requests=REQUESTS, slots=st.integers(1, 6), blocks=st.integers(8, 40))
@settings(max_examples=120, deadline=None)
def test_every_request_ends_with_its_tokens_within_the_limits(requests, slots, blocks):
    """Slots and blocks are never exceeded, all finish whole, nothing is held at the end."""
    engine = Engine(
        EngineSettings(max_num_seqs=slots, kv_blocks=blocks, block_size_tokens=16, max_loras=1)
    )

    def check():
        assert engine.running <= slots
        assert engine.kv_used_blocks <= blocks

    events = run(engine, requests, check)

    produced = dict.fromkeys(range(len(requests)), 0)
    for event in events:
        match event:
            case FirstToken(_, request_id):
                produced[request_id] += 1
            case TokensProduced(_, request_ids):
                for request_id in request_ids:
                    produced[request_id] += 1
    finished = [event.request_id for event in events if isinstance(event, Finished)]
    assert sorted(finished) == list(range(len(requests)))
    assert produced == {number: request[2] for number, request in enumerate(requests)}
    assert [event.at for event in events] == sorted(event.at for event in events)
    assert (engine.running, engine.waiting, engine.kv_used_blocks) == (0, 0, 0)


@given(requests=REQUESTS)
@settings(max_examples=30, deadline=None)
def test_same_calls_same_events(requests):
    """Nothing is left to chance."""
    assert run(Engine(EngineSettings()), requests) == run(Engine(EngineSettings()), requests)
