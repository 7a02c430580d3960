"""Our own readers and a real API server judge every manifest the same."""

from __future__ import annotations

import copy
import functools
import operator

import examples
import pytest
from api_server import error_fields
from control_plane import policy
from hypothesis import given, settings
from hypothesis import strategies as st
from manifest_reading import pool_ref, resource_of

from forebay_operator import resources


@pytest.mark.parametrize("example", [*examples.VALID, *examples.SHOWN], ids=str)
def test_a_valid_example_is_taken(somewhere, example):
    """What our own readers take, and with the API server's defaults it means the same to them."""
    status, answer = somewhere.judge(example.manifest)

    assert status == 201, answer["message"]
    read, written = resource_of(answer), resource_of(example.manifest)
    assert read.model_dump(exclude={"metadata"}) == written.model_dump(exclude={"metadata"})


@pytest.mark.parametrize("example", examples.INVALID, ids=str)
def test_an_invalid_example_is_refused_at_its_field(somewhere, example):
    """What our own readers refuse, with the words they use."""
    status, answer = somewhere.judge(example.manifest)

    assert status in (400, 422), answer
    named = error_fields(answer)
    # The entries of an object where a list should be are unknown fields.
    assert named, answer["message"]
    assert all(field.startswith(example.field) for field in named), answer["message"]
    assert example.says in answer["message"]


# --- any policy: one that is valid, and some of these fields with some of these values

DIGITS = st.text("0123456789.", max_size=4)
DURATIONS = (
    st.sampled_from(["30s", "1h", "1h0s", "0s", "60m0.001s", "0.001ms", "0.0001s", "", 30, "1ns"])
    | st.lists(st.tuples(DIGITS, st.sampled_from(["h", "m", "s", "ms", "us", ""])), max_size=4).map(
        lambda pairs: "".join(number + unit for number, unit in pairs)
    )
    | st.text(max_size=3)
)
SIZES = (
    st.sampled_from([1, 0, -1, 1 << 40, (1 << 40) + 1, 1 << 63, 1 << 70, 5.0, 1.5, True, {}])
    | st.integers()
    | st.tuples(DIGITS, st.sampled_from(["", "k", "K", "Ki", "Ti", "P", "m", "e3"])).map("".join)
)
COUNTS = (
    st.sampled_from([1, 0, 10**6, 10**6 + 1, 5.0, 1.5, 1e300, "5", True, [], 1 << 70])
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
)
PERCENTS = st.sampled_from([0, 1, 1.0, 0.5, 100, 101, -0.0, True, "1"]) | st.integers(-1, 102)
BANDS = st.sampled_from(["Critical", "Standard", "Sheddable", "batch", "none", "-", "", 1, {}])
# Without 5.0: CEL takes no float for an integer, and the error is its band's.
PRIORITIES = (
    st.sampled_from([None, 100, 0, -100, -50, 1.5, 2**31 - 1, 2**31, -(2**31), "5", True])
    | st.integers()
)
NAMES = st.sampled_from(["a", "b", "x" * 256, "é" * 256, "x" * 257, "\n", "", 7]) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=3
)
ODD = st.sampled_from([None, {}, [], "", 0, {"future": 1}, [None]])
SPEC = {
    "targetRefs": [pool_ref("chat")],
    "bands": [
        {
            "name": "Critical",
            "fairness": [{"between": "Models", "policy": "FCFS"}],
            "ordering": {"policy": "FCFS"},
            "queue": {"perFlow": {}},
        },
        {"name": "batch", "priority": -50},
    ],
    "models": [
        {"name": "a", "band": "Critical"},
        {"name": "b", "band": "batch"},
    ],
    "limits": {},
    "saturation": {"type": "Adaptive", "adaptive": {}},
    "unmatched": {},
    "noEndpoints": {},
    "trustedHeaders": [],
}
VALUES = {
    "targetRefs.0.name": NAMES,
    "targetRefs.0.kind": st.sampled_from(["InferencePool", "Service", ""]),
    "targetRefs.0.group": st.sampled_from(["inference.networking.x-k8s.io", "", 1]),
    "bands.0.name": BANDS,
    "bands.1.name": BANDS,
    "bands.0.priority": PRIORITIES,
    "bands.1.priority": PRIORITIES,
    "bands.0.ordering.policy": st.sampled_from(["FCFS", "LIFO"]),
    "bands.0.ordering": ODD,
    "bands.0.fairness.0.policy": st.sampled_from(["FCFS", "RoundRobin", "Best"]),
    "bands.0.fairness.0.between": st.sampled_from(["Models", "Users"]),
    "bands.0.fairness": ODD,
    "bands.0.queue.maxRequests": COUNTS,
    "bands.0.queue.maxBytes": SIZES,
    "bands.0.queue.ttl": DURATIONS,
    "bands.0.queue.perFlow.maxRequests": COUNTS,
    "bands.0.queue.perFlow.maxBytes": SIZES,
    "models.0.name": NAMES,
    "models.1.name": NAMES,
    "models.0.band": BANDS,
    "models.1.band": BANDS,
    "limits.maxRequests": COUNTS,
    "limits.maxBodyBytes": SIZES,
    "saturation.type": st.sampled_from(["Adaptive", "Concurrency", "Magic", 1]),
    "saturation.adaptive.maxKVCacheUsagePercent": PERCENTS,
    "saturation.adaptive": ODD,
    "saturation.concurrency": st.fixed_dictionaries({"maxRequestsPerEndpoint": COUNTS}) | ODD,
    "unmatched.action": st.sampled_from(["Queue", "Reject", 1]),
    "unmatched.band": BANDS,
    "noEndpoints.ttl": DURATIONS,
    "trustedHeaders": st.lists(st.sampled_from(["Objective", "Tenant", 1]), max_size=3) | ODD,
    "targetRefs": ODD,
    "targetRefs.0": ODD,
    "bands": ODD,
    "bands.1": ODD,
    "bands.0.queue": ODD,
    "bands.0.queue.perFlow": ODD,
    "models": ODD,
    "limits": ODD,
}


@st.composite
def specs(draw) -> dict:
    """A valid spec in which one or two values are replaced."""
    spec = copy.deepcopy(SPEC)
    names = draw(st.lists(st.sampled_from(sorted(VALUES)), min_size=1, max_size=2, unique=True))
    for name in sorted(names, reverse=True):  # what is inside, before what it is inside of
        *above, last = [int(part) if part.isdigit() else part for part in name.split(".")]
        inner = functools.reduce(operator.getitem, above, spec)
        inner[last] = draw(VALUES[name])
    return spec


@settings(max_examples=300, deadline=None)
@given(spec=specs())
def test_both_readers_agree_on_any_policy(somewhere, spec):
    """Both take it and it means the same to them, or both refuse it and name the same field.

    There may be more than one, and each reader decides how far it reads before giving up.
    """
    manifest = policy("any", "") | {"spec": spec}
    problems: list[tuple[str, str]] = []
    try:
        ours = resource_of(manifest)
    except resources.ResourceError as error:
        problems = error.problems
    status, answer = somewhere.judge(manifest)

    if status == 201:
        assert not problems
        assert resource_of(answer).spec == ours.spec
    else:
        assert problems, answer["message"]
        paths = [path for path, _ in problems]
        assert any(field.startswith(tuple(paths)) for field in error_fields(answer)), paths
