"""The adaptive limit against a model server in virtual time."""

from __future__ import annotations

import pytest
from virtual_time import Run, Server

ADDRESS = "10.0.0.0:8000"
SERVICE_SECONDS = 1.0
LEARNING_SECONDS = 60.0


def backlogged(slots, seconds, spread=0.1):
    run = Run(Server(slots), spread=spread)
    run.keep_backlog(100)
    run.until(seconds)
    return run


@pytest.mark.parametrize("slots", range(1, 65))
def test_the_limit_ends_at_the_capacity_of_the_server(slots):
    """Within one, for every size of batch."""
    run = backlogged(slots, LEARNING_SECONDS)

    assert abs(run.limit - slots) <= 1


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8, 16, 33, 64])
def test_hardly_anybody_waits_inside_the_server_after_learning(slots):
    """The queue stays where priority is known."""
    run = backlogged(slots, 2 * LEARNING_SECONDS)

    assert run.mean_waiting_inside(LEARNING_SECONDS) < 1


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8, 16, 33, 64])
def test_throughput_is_that_of_an_omniscient_limit(slots):
    """An oracle keeps all n slots busy all the time: n over the service time."""
    run = backlogged(slots, 2 * LEARNING_SECONDS)

    assert run.throughput(LEARNING_SECONDS) >= 0.97 * slots / SERVICE_SECONDS


@pytest.mark.parametrize(("before", "after"), [(16, 4), (64, 8), (8, 1)])
def test_the_limit_follows_a_capacity_that_shrinks(before, after):
    """Longer prompts fit fewer at once."""
    run = backlogged(before, LEARNING_SECONDS)
    run.servers[ADDRESS].slots = after
    run.until(LEARNING_SECONDS + 30)

    assert abs(run.limit - after) <= 1


@pytest.mark.parametrize(("before", "after"), [(4, 16), (8, 64), (1, 8)])
def test_the_limit_follows_a_capacity_that_grows(before, after):
    """One more slot at a time, faster while it succeeds."""
    run = backlogged(before, LEARNING_SECONDS)
    run.servers[ADDRESS].slots = after
    run.until(2 * LEARNING_SECONDS)

    assert abs(run.limit - after) <= 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rate", [2.0, 5.0, 10.0])
def test_single_waiting_requests_under_light_load_do_not_collapse_the_limit(rate, seed):
    """An engine that admits every 30 ms shows new arrivals as waiting although slots are free."""
    run = Run(Server(64, step=0.03), seed=seed, spread=0.5)
    run.arrivals(rate, 300)
    run.until(300)
    seen = sum(waiting > 0 for _, waiting in run.waiting_inside)

    assert seen > 5
    assert min(limit for _, limit in run.limits) >= 4


@pytest.mark.parametrize("service_seconds", [0.3, 1.0])
@pytest.mark.parametrize("slots", [4, 16, 64])
def test_an_engine_that_admits_by_steps_is_kept_full(slots, service_seconds):
    """Under backlog nearly every scrape shows a request that only waits for the next step.

    Where steps are not counted, up to an eighth of the batch may stand by.
    """
    step = 0.03
    run = Run(Server(slots, service_seconds=service_seconds, step=step), spread=0.3)
    run.keep_backlog(200)
    run.until(2 * LEARNING_SECONDS)

    assert -2 <= run.limit - slots <= max(2, slots // 8)
    assert run.throughput(LEARNING_SECONDS) >= 0.9 * slots / (service_seconds + step / 2)
