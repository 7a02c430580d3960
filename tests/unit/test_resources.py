"""Fields of the resources beyond single wrong values: null, bounds, strange input."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from manifest_reading import pool_ref, resource_of

from forebay_control.plan import DEFAULT_BANDS
from forebay_operator import planning, resources
from forebay_operator.standalone import sources

QUICKSTART = Path(__file__).parents[2] / "crds/examples/quickstart"

KEYS = st.sampled_from(
    [
        *("apiVersion", "kind", "metadata", "name", "namespace", "labels", "creationTimestamp"),
        *("spec", "targetRefs", "bands", "criticality", "fairness", "policy", "queue", "ttl"),
        *("band", "priority", "between", "ordering", "adaptive", "trustedHeaders"),
        *("maxBytes", "models", "limits", "saturation", "type", "selector", "matchLabels"),
        *("targetPorts", "number", "poolRef", "modelName", "targetModels", "endpoints"),
        *("addresses", "conditions", "ready", "targetRef", "ports", "port", "zzz"),
    ]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.dates()
    | st.datetimes()
    | st.sampled_from(["Critical", "30s", "1Gi", "chat", "RoundRobin"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.integers(), inner, max_size=4)
    ),
    max_leaves=15,
)


def manifest(kind: type, **fields) -> dict:
    """An object of a kind with a name."""
    known = next(known for known in resources.KINDS if known.model is kind)
    return {
        "apiVersion": known.api_version,
        "kind": known.kind,
        "metadata": {"name": "x"},
        **fields,
    }


def policy(**spec) -> dict:
    spec = {"targetRefs": [pool_ref("chat")], **spec}
    return manifest(resources.FlowControlPolicy, spec=spec)


def test_the_quickstart_has_no_problem():
    """The first example is planned without an error, a warning or a conflict."""
    manifests = sources.read(QUICKSTART)
    (pool,) = planning.pools(manifests.resources)

    planned = planning.plan(pool, manifests.resources)

    assert (manifests.errors, manifests.ignored, planned.problems) == ((), (), ())
    assert planning.unattached(manifests.resources) == ()
    assert {model.band for model in planned.snapshot.plan.models} == {
        band.name for band in DEFAULT_BANDS
    }


@given(kind=st.sampled_from([kind.model for kind in resources.KINDS]), metadata=VALUES, spec=VALUES)
def test_whatever_is_in_a_manifest_it_is_read_or_refused(kind, metadata, spec):
    """A resource, or problems with a path and words; never another exception."""
    problems = [("unset", "unset")]
    try:
        resource = resource_of(manifest(kind, metadata=metadata, spec=spec, endpoints=spec))
    except resources.ResourceError as error:
        resource, problems = None, error.problems

    assert resource is None or isinstance(resource, kind)
    assert problems
    assert all(path and what for path, what in problems)


def test_null_counts_as_unset():
    """A key whose lines below are all commented out is null in YAML."""
    text = """
    targetRefs: [{group: inference.networking.k8s.io, kind: InferencePool, name: chat}]
    saturation:
    bands:
    - name: Critical
      queue:
    """

    parsed = resource_of(policy(**yaml.safe_load(text)))

    assert parsed == resource_of(policy(bands=[{"name": "Critical"}]))


def test_null_is_no_name():
    """What is required is missed."""
    with pytest.raises(resources.ResourceError) as error:
        resource_of(policy(targetRefs=[pool_ref(None)]))

    assert error.value.problems == [("spec.targetRefs[0].name", "is required")]


def test_lists_that_the_api_server_writes_as_null_are_empty():
    """An EndpointSlice of a Service without pods."""
    fields = {"addressType": "IPv4", "endpoints": None, "ports": None}

    parsed = resource_of(manifest(resources.EndpointSlice, **fields))

    assert (parsed.endpoints, parsed.ports) == ((), ())


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("x" * 100, '"' + "x" * 59 + "..."),
        (1 << 20_000, "a huge number"),
        ({"a": 1}, "an object"),
        ([1], "a list"),
        (yaml.safe_load("2026-01-01"), "2026-01-01"),
    ],
    ids=lambda value: repr(value)[:20] if not isinstance(value, int) else "int",
)
def test_a_wrong_value_is_shown_in_short(value, shown):
    """An error line stays a line, whatever the value is."""
    with pytest.raises(resources.ResourceError) as error:
        resource_of(policy(noEndpoints={"ttl": value}))

    assert f", not {shown}" in error.value.problems[0][1]


def test_the_first_problems_are_told_and_how_many_more_there_are():
    """A thousand times the same mistake is not a thousand lines."""
    models = [{"name": f"m{number}", "band": ""} for number in range(1000)]

    with pytest.raises(resources.ResourceError) as error:
        resource_of(policy(models=models))

    assert len(error.value.problems) == 11
    assert error.value.problems[-1] == ("...", "and 990 more problems")


@pytest.mark.parametrize("text", ["", "s", "30", "-1s", "1e3s", "1s1m", " 1s", "٣s", "1d"])
def test_what_is_no_duration_is_refused(text):
    """Units in order of size, ASCII digits, nothing around."""
    with pytest.raises(resources.ResourceError, match="must be a duration"):
        resource_of(policy(noEndpoints={"ttl": text}))


@pytest.mark.parametrize("value", ["", "Mi", "1.5Gi", "-1", "1mi", "0x10", True, 1.5])
def test_what_is_no_size_is_refused(value):
    """Whole numbers with Kubernetes' suffixes."""
    with pytest.raises(resources.ResourceError, match="must be a number of bytes"):
        resource_of(policy(limits={"maxBytes": value}))


@pytest.mark.parametrize("created", ["2026-01-01", "2026-01-01T00:00:00"])
def test_a_time_without_a_zone_is_refused(created):
    """Ages of resources must be comparable."""
    metadata = {"name": "x", "creationTimestamp": yaml.safe_load(created)}

    with pytest.raises(resources.ResourceError, match=r"metadata\.creationTimestamp"):
        resource_of(policy() | {"metadata": metadata})


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ({"bands": [{"name": "Critical"}] * 17}, "spec.bands"),
        ({"targetRefs": [pool_ref("a")] * 17}, "spec.targetRefs"),
        ({"targetRefs": [pool_ref("a" * 254)]}, "spec.targetRefs[0].name"),
        ({"models": [{"name": "a" * 257, "band": "Critical"}]}, "spec.models[0].name"),
        ({"limits": {"maxRequests": 10**7}}, "spec.limits.maxRequests"),
        ({"limits": {"maxBytes": "2Ti"}}, "spec.limits.maxBytes"),
        (
            {"saturation": {"concurrency": {"maxRequestsPerEndpoint": 10**7}}},
            "spec.saturation.concurrency.maxRequestsPerEndpoint",
        ),
        ({"bands": [{"name": "a" * 64}]}, "spec.bands[0].name"),
        ({"bands": [{"name": "a", "priority": 2**31}]}, "spec.bands[0].priority"),
        ({"trustedHeaders": ["Objective"] * 9}, "spec.trustedHeaders"),
    ],
)
def test_everything_is_bounded(spec, path):
    """Each list, name and number has an end."""
    with pytest.raises(resources.ResourceError) as error:
        resource_of(policy(**spec))

    assert path in [found for found, _ in error.value.problems]
