"""Selection and doubt against several model servers in virtual time."""

from __future__ import annotations

import pytest
from virtual_time import Run, Server

from forebay_epp.core.terms import EndpointMetrics, Request, Verdict

KV_FULL = 0.99


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("load", [0.3, 0.9])
def test_equal_servers_are_loaded_equally_from_a_cold_start(load, seed):
    """Four of 64 slots: within 1.3 of each other, whatever slow start has come to."""
    run = Run(*(Server(64) for _ in range(4)), seed=seed)
    run.arrivals(load * 4 * 64, 60)
    run.until(15)
    run.measure()
    run.until(60)

    assert run.unevenness < 1.3


@pytest.mark.parametrize("load", [0.3, 0.9])
def test_more_servers_than_are_considered_at_once_are_loaded_equally(load):
    """48 of 16 slots, of which a choice looks at eight."""
    run = Run(*(Server(16) for _ in range(48)))
    run.arrivals(load * 48 * 16, 20)
    run.until(8)
    run.measure()
    run.until(20)

    assert run.unevenness < 1.3


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("load", [0.3, 0.9])
def test_a_server_whose_limit_was_cut_gets_its_share_again(load, seed):
    """A page that shows a batch of 4 with many waiting, half a minute before the measuring."""
    run = Run(*(Server(64) for _ in range(4)), seed=seed)
    run.arrivals(load * 4 * 64, 110)
    run.until(15)
    address = next(iter(run.servers))
    run.controller.observe(EndpointMetrics(address, 4, 500, None, run.now), run.now)
    run.until(60)
    run.measure()
    run.until(110)

    assert run.unevenness < 1.3


def test_requests_one_after_another_leave_no_idle_server_out():
    """24 of them over three idle servers, which publish nothing new meanwhile."""
    run = Run(*(Server(8) for _ in range(3)))
    counts = dict.fromkeys(run.servers, 0)
    for number in range(24):
        run.controller.submit(Request(number, "chat", 1), number)
        (decision,) = run.controller.poll(number)
        counts[decision.endpoint] += 1
        run.controller.complete(number, None, number + 0.5, Verdict.GOOD)

    assert min(counts.values()) >= 3, counts


def test_a_small_server_is_not_flooded_beside_a_large_one():
    """8 and 64 slots at 60 %: next to none waits inside, once limits are known."""
    run = Run(Server(8), Server(64))
    run.arrivals(0.6 * 72, 90)
    run.until(30)
    run.measure()
    run.until(90)

    assert run.mean_waiting_inside(30) < 1


@pytest.mark.parametrize("frozen", [(106, 15, None), (0, 0, KV_FULL), (3, 0, KV_FULL)])
@pytest.mark.parametrize("servers", [1, 3])
def test_a_gauge_that_stands_still_closes_an_idle_server_for_ten_seconds_at_most(frozen, servers):
    """Also when it is so of every server; the first request moves the page."""
    run = Run(*(Server(16) for _ in range(servers)))
    for server in run.servers.values():
        server.frozen = frozen
    run.until(5)
    run.backlog = 50
    began = run.now
    run.poll()
    run.until(40)

    assert run.first_dispatch_at - began <= 10.5
    assert all(server.running >= 12 for server in run.servers.values())


def test_a_shared_server_is_not_flooded_when_its_metrics_are_gone():
    """24 slots, 12 of them others'; under backlog it never holds more than 28 in two minutes."""
    run = Run(Server(24, foreign=12))
    run.backlog = 100
    run.until(40)
    run.most_held = 0
    run.servers["10.0.0.0:8000"].scraped = False
    run.until(160)

    assert 20 <= run.most_held <= 28


def test_a_page_is_believed_until_the_next_ones_are_overdue():
    """In a pool of 1,000 endpoints each is scraped every 5 s only."""
    run = Run(Server(8))
    run.until(0.1)
    (address,) = run.servers
    run.controller.observe(EndpointMetrics(address, 8, 0, 0.1, 1.0, interval_seconds=5.0), 1.0)
    run.controller.submit(Request(1, "chat", 1), 1.0)
    run.controller.poll(1.0)

    run.controller.poll(9.9)
    assert run.controller.state(9.9).endpoints[0].fresh
    run.controller.poll(12.1)
    assert not run.controller.state(12.1).endpoints[0].fresh
