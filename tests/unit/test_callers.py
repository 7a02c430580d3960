"""What callers say in headers counts as far as the plan trusts it."""

from __future__ import annotations

import math
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_control.plan import Plan
from forebay_epp.codec.callers import BadHeaderError, Caller, CallerHeaders

TRUSTING = Plan(
    trust_objective_header=True,
    tenant_header="x-llm-d-inference-fairness-id",
    trust_deadline_headers=True,
)


@pytest.mark.parametrize(
    ("header", "value", "expected"),
    [
        ("x-llm-d-inference-objective", "paying", Caller(objective="paying")),
        ("x-gateway-inference-objective", "paying", Caller(objective="paying")),
        ("x-llm-d-inference-fairness-id", "acme", Caller(tenant="acme")),
        ("x-gateway-inference-fairness-id", "acme", Caller(tenant="acme")),
        ("x-llm-d-slo-ttft-ms", "250", Caller(due_in_seconds=0.25)),
        ("x-slo-ttft-ms", "2000.5", Caller(due_in_seconds=2.0005)),
        ("x-forebay-ttl-ms", "1500", Caller(ttl_seconds=1.5)),
    ],
)
def test_a_header_is_read_under_each_of_its_names_where_it_is_trusted(header, value, expected):
    """And nowhere else."""
    assert CallerHeaders(TRUSTING).read({header: value}) == expected
    assert CallerHeaders(Plan()).read({header: value}) == Caller()
    assert header not in CallerHeaders(Plan()).names


def test_the_name_of_today_counts_before_the_older_one():
    """A proxy may send both while it is migrated."""
    headers = {"x-gateway-inference-fairness-id": "old", "x-llm-d-inference-fairness-id": "new"}

    assert CallerHeaders(TRUSTING).read(headers).tenant == "new"


def test_the_tenants_header_may_be_any():
    """It has no alias then."""
    headers = CallerHeaders(Plan(tenant_header="x-team"))

    assert headers.read({"x-team": "a", "x-llm-d-inference-fairness-id": "b"}).tenant == "a"
    assert headers.names == {"x-team"}


@pytest.mark.parametrize("value", ["soon", "", "-1", "0", "nan", "inf", "3600001", "1, 2"])
@pytest.mark.parametrize("header", ["x-llm-d-slo-ttft-ms", "x-forebay-ttl-ms"])
def test_a_time_that_is_none_is_refused_with_the_header_s_name(header, value):
    """Guessing would be worse."""
    with pytest.raises(BadHeaderError, match=f"{header}.*milliseconds"):
        CallerHeaders(TRUSTING).read({header: value})


@given(st.dictionaries(st.sampled_from(sorted(CallerHeaders(TRUSTING).names)), st.text()))
def test_whatever_comes_is_bounded_or_refused(headers):
    """Callers choose these strings."""
    caller = Caller()
    with suppress(BadHeaderError):
        caller = CallerHeaders(TRUSTING).read(headers)

    assert len(caller.objective) <= 253
    assert len(caller.tenant) <= 128
    assert caller.ttl_seconds == math.inf or 0 < caller.ttl_seconds <= 3600
