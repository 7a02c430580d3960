"""The EPP's side of the contract: strange snapshots."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_control.plan import PlanError
from forebay_control.v1 import control_pb2 as pb
from forebay_epp.codec import plan as plan_codec

NAMES = st.sampled_from(
    [
        *("plan", "endpoints", "pool", "bands", "models", "limits", "saturation", "unmatched"),
        *("name", "priority", "fairness", "ttlSeconds", "maxRequests", "mode", "address"),
        *("targets", "weight", "noEndpointsTtlSeconds", "kvCacheUsageThreshold", "action"),
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=5),
    max_leaves=20,
)


@given(value=VALUES)
def test_no_json_raises_anything_else(value):
    """None of these is a whole plan, and each is refused as such."""
    with pytest.raises(PlanError) as error:
        plan_codec.parse_snapshot_json(json.dumps(value))

    assert all(path and what for path, what in error.value.problems)


def test_nothing_is_assumed_for_what_is_not_said():
    """An empty message is not a default plan: the control plane says everything."""
    with pytest.raises(PlanError) as error:
        plan_codec.parse_snapshot(pb.Snapshot())

    assert {path for path, _ in error.value.problems} >= {
        *("plan.bands", "plan.limits.maxRequests", "plan.limits.maxBytes"),
        *("plan.limits.maxBodyBytes", "plan.saturation.kvCacheUsageThreshold"),
        *("plan.saturation.mode", "plan.unmatched.action", "plan.unmatched.band"),
        "plan.noEndpointsTtlSeconds",
    }


@pytest.mark.parametrize("text", ["[" * 100_000, '{"plan":' * 50_000, '{"x":' + "1" * 5000 + "}"])
def test_text_that_is_too_much_for_a_parser_is_refused(text):
    """Deep nesting and huge numbers."""
    with pytest.raises(PlanError, match="is not a Snapshot message"):
        plan_codec.parse_snapshot_json(text)


@pytest.mark.parametrize("address", ["10.0.0.1:80", "[fd00::1]:80", "[::1]:65535"])
def test_an_address_is_taken_as_it_is(address):
    """In the form in which Envoy takes it."""
    problems: list[tuple[str, str]] = []

    found = plan_codec._endpoints(
        pb.Endpoints(endpoints=[pb.Endpoint(address=address, name="pod")]), problems
    )

    assert (problems, found[0].address, found[0].name) == ([], address, "pod")


@pytest.mark.parametrize(
    "address",
    ["10.0.0.1:080", "[10.0.0.1]:80", "[fd00::0:1]:80", "10.0.0.1:٨", "10.0.0.1: 80", "[::1]]:1"],
)
def test_an_address_has_one_form(address):
    """Two spellings of one endpoint would share no slots."""
    message = pb.Snapshot(endpoints=pb.Endpoints(endpoints=[pb.Endpoint(address=address)]))

    with pytest.raises(PlanError) as error:
        plan_codec.parse_snapshot(message)

    assert ("endpoints.endpoints[0].address", f"{address!r} is not ip:port") in error.value.problems
