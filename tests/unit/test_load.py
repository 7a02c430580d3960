"""Schedules of arrivals and reports of results."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_sim import arrivals, report


def test_a_schedule_has_about_the_rate_and_is_in_order():
    """Poisson: 1,000 expected, standard deviation 32."""
    schedule = arrivals.poisson({"a": 100.0, "b": 10.0}, 10.0, seed=1)

    assert schedule == sorted(schedule)
    assert sum(arrival.name == "a" for arrival in schedule) == pytest.approx(1000, abs=130)
    assert all(0 <= arrival.at < 10.0 for arrival in schedule)


def test_equal_seeds_give_equal_schedules():
    """Also when another name joins: each has a stream of its own."""
    alone = arrivals.poisson({"a": 5.0}, 10.0, seed=3)
    both = arrivals.poisson({"a": 5.0, "b": 5.0}, 10.0, seed=3)

    assert [arrival for arrival in both if arrival.name == "a"] == alone
    assert alone != arrivals.poisson({"a": 5.0}, 10.0, seed=4)


@given(values=st.lists(st.floats(0, 1e6), min_size=1), percent=st.floats(1, 100))
def test_a_percentile_is_a_value_that_enough_do_not_exceed(values, percent):
    """Nearest rank."""
    found = report.percentile(values, percent)

    assert found in values
    assert sum(value <= found for value in values) >= len(values) * percent / 100 - 1e-9


def test_a_class_is_described_by_its_answered_requests():
    """Refused ones count as statuses, not as times."""
    results = [
        report.Result("critical", "200", 0.0, 0.1, 0.5),
        report.Result("critical", "429", 0.0, None, 0.01),
        report.Result("other", "200", 0.0, 9.0, 9.0),
    ]

    assert report.describe(results, "critical") == {
        "offered": 2,
        "ok": 1,
        "statuses": {"200": 1, "429": 1},
        "ttft_ms": {"p50": 100.0, "p99": 100.0},
        "e2e_ms": {"p50": 500.0, "p99": 500.0},
        "last_answer_seconds": 0.5,
    }


def test_nobody_answered_has_no_times():
    """None, not zero."""
    assert report.describe([], "a")["ttft_ms"] == {"p50": None, "p99": None}
