"""Manifests as people write them: what is taken, and what the errors say."""

from __future__ import annotations

import asyncio

import pytest
import yaml
from manifest_reading import resource_of

from forebay_operator import resources
from forebay_operator.standalone import sources

POLICY = """
apiVersion: forebay.dev/v1alpha1
kind: FlowControlPolicy
metadata: {name: chat}
spec:
  targetRefs: [{group: inference.networking.k8s.io, kind: InferencePool, name: chat}]
"""
MODEL = """
apiVersion: inference.networking.x-k8s.io/v1alpha2
kind: InferenceModel
metadata: {name: chat}
spec: {modelName: llama, poolRef: {name: chat}}
"""
POOL = """
apiVersion: inference.networking.k8s.io/v1
kind: InferencePool
metadata: {name: chat}
spec: {selector: {matchLabels: {app: vllm}}, targetPorts: [{number: 8000}]}
"""


def parse(text: str, spec: str = ""):
    """Read a manifest, with more of a spec merged in."""
    manifest = yaml.safe_load(text)
    manifest["spec"].update(yaml.safe_load(spec) or {})
    return resource_of(manifest)


def problems(text: str, spec: str) -> list[tuple[str, str]]:
    with pytest.raises(resources.ResourceError) as error:
        parse(text, spec)
    return error.value.problems


def test_a_policy_needs_nothing_but_its_pool():
    """Everything else has a default."""
    policy = parse(POLICY)

    assert policy.spec.limits.max_body_bytes == 8 << 20
    assert policy.spec.bands == ()


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("1m30s", 90), ("500ms", 0.5), ("1h", 3600), ("1.5s", 1.5)]
)
def test_durations_are_written_as_kubernetes_writes_them(text, seconds):
    """Go's form."""
    assert parse(POLICY, f"noEndpoints: {{ttl: {text}}}").spec.no_endpoints.ttl == seconds


@pytest.mark.parametrize(
    ("text", "size"), [("512Mi", 512 << 20), ("1k", 1000), ("4096", 4096), ('"4096"', 4096)]
)
def test_sizes_are_quantities(text, size):
    """With binary and decimal suffixes, or plain."""
    assert parse(POLICY, f"limits: {{maxBytes: {text}}}").spec.limits.max_bytes == size


@pytest.mark.parametrize(
    ("spec", "path", "says"),
    [
        ("bands: [{name: High}]", "spec.bands[0].priority", "is required for a band with another"),
        (
            "bands: [{name: Critical, fairness: [{between: Models, policy: Best}]}]",
            "spec.bands[0].fairness[0].policy",
            "is not one of FCFS, RoundRobin",
        ),
        (
            "limts: {}",
            "spec.limts",
            "known fields are bands, limits, mode, modelServerMetrics, models",
        ),
        (
            "bands: [{name: Critical, queue: {maxRequest: 1}}]",
            "spec.bands[0].queue.maxRequest",
            "known fields are maxBytes, maxRequests, perFlow, ttl",
        ),
        ("limits: {maxRequests: 0}", "spec.limits.maxRequests", "greater than or equal to 1"),
        ("limits: {maxRequests: many}", "spec.limits.maxRequests", "whole number"),
        ("limits: {maxBytes: 1Qi}", "spec.limits.maxBytes", "1048576 or 512Mi"),
        ("noEndpoints: {ttl: 30}", "spec.noEndpoints.ttl", '"30s"'),
        ("noEndpoints: {ttl: 0s}", "spec.noEndpoints.ttl", "more than 0"),
        ("noEndpoints: {ttl: 2h}", "spec.noEndpoints.ttl", "at most 1h"),
        ("saturation: {type: Magic}", "spec.saturation.type", "Adaptive, Concurrency"),
        (
            "saturation: {type: Adaptive, adaptive: {maxKVCacheUsagePercent: 0.95}}",
            "spec.saturation.adaptive.maxKVCacheUsagePercent",
            "must be a whole number, not 0.95",
        ),
        (
            "saturation: {type: Adaptive, concurrency: {}}",
            "spec.saturation",
            "must not set adaptive with type Concurrency, nor concurrency with type Adaptive",
        ),
        (
            "{bands: [{name: batch, priority: 5}], models: [{name: a, band: bach}]}",
            "spec.models",
            "no band is named bach: write Critical, Standard, Sheddable or",
        ),
        ("targetRefs: []", "spec.targetRefs", "must not be empty"),
        ("targetRefs: [{kind: Service, name: a}]", "spec.targetRefs[0].kind", "InferencePool"),
        ("targetRefs: [{kind: InferencePool, name: a}]", "spec.targetRefs[0].group", "is required"),
        ("bands: [{fairness: {}}]", "spec.bands[0].name", "is required"),
        (
            "bands: [{name: Critical}, {name: Critical}]",
            "spec.bands[1]",
            "Critical is duplicated",
        ),
        (
            "models: [{name: a, band: Critical}, {name: a, band: Standard}]",
            "spec.models[1]",
            "a is duplicated",
        ),
    ],
)
def test_a_wrong_field_is_named_with_what_would_be_right(spec, path, says):
    """Path as in the YAML, the value, the allowed ones."""
    found = dict(problems(POLICY, spec))

    assert says in found[path]


OLD = """
bands:
- criticality: Critical
  fairness: {policy: RoundRobin}
  ordering: FCFS
- {criticality: Standard}
models:
- {name: a, criticality: Critical}
saturation: {mode: Concurrency, maxConcurrency: 16, kvCacheUsageThreshold: 0.9}
unmatched: {criticality: Sheddable}
trust: {objectiveHeader: true}
"""
NEW = [
    ("spec.bands[0].criticality", "is spec.bands[0].name now"),
    ("spec.bands[0].fairness", "is spec.bands[0].fairness[0].policy now"),
    ("spec.bands[0].ordering", "is spec.bands[0].ordering.policy now"),
    ("spec.bands[1].criticality", "is spec.bands[1].name now"),
    ("spec.models[0].criticality", "is spec.models[0].band now"),
    ("spec.saturation.mode", "is spec.saturation.type now"),
    ("spec.saturation.maxConcurrency", "is spec.saturation.concurrency.maxRequestsPerEndpoint now"),
    (
        "spec.saturation.kvCacheUsageThreshold",
        "is spec.saturation.adaptive.maxKVCacheUsagePercent now",
    ),
    ("spec.trust", "is spec.trustedHeaders now"),
    ("spec.unmatched.criticality", "is spec.unmatched.band now"),
]


def test_a_field_of_an_earlier_shape_is_refused_with_its_name_of_today():
    """Every field of a policy that was renamed; what has the old name is not called missing."""
    assert sorted(problems(POLICY, OLD)) == sorted(NEW)


def test_every_wrong_field_is_named_at_once():
    """A file should not have to be fixed one error at a time."""
    found = problems(POLICY, "limits: {maxRequests: 0, maxBytes: x}")

    assert [path for path, _ in found] == ["spec.limits.maxRequests", "spec.limits.maxBytes"]


def test_unknown_fields_of_foreign_kinds_are_ignored():
    """Their owners add some."""
    assert parse(MODEL, "futureField: 1").spec.model_name == "llama"


def test_weights_are_for_all_targets_or_none():
    """As upstream's CRD says."""
    spec = "targetModels: [{name: a, weight: 1}, {name: b}]"

    assert problems(MODEL, spec) == [
        ("spec.targetModels", "Weights should be set for all models, or none of the models.")
    ]


def test_the_older_pool_is_read_too():
    """x-k8s.io/v1alpha2: a plain selector and one port."""
    old = POOL.replace("k8s.io/v1\n", "x-k8s.io/v1alpha2\n").replace("networking.x", "networking.x")
    manifest = yaml.safe_load(old)
    manifest["apiVersion"] = "inference.networking.x-k8s.io/v1alpha2"
    manifest["spec"] = {
        "selector": {"app": "vllm"},
        "targetPortNumber": 8000,
        "extensionRef": {"name": "epp"},
    }

    assert resource_of(manifest).ports == (8000,)


# --- folders


def test_a_folder_of_several_documents_is_read(tmp_path):
    """In order of file names; empty documents do not count."""
    (tmp_path / "a.yaml").write_text(f"---\n{POOL}\n---\n{MODEL}\n---\n")
    (tmp_path / "b.yml").write_text(POLICY)
    (tmp_path / "note.txt").write_text("not read")

    manifests = sources.read(tmp_path)

    kinds = [type(resource).__name__ for resource in manifests.resources]
    assert kinds == ["InferencePool", "InferenceModel", "FlowControlPolicy"]
    assert (manifests.errors, manifests.ignored) == ((), ())


def test_errors_name_file_document_and_object(tmp_path):
    """As many lines as problems."""
    bad = POLICY.replace("spec:", "spec:\n  unmatched: {action: Drop}")
    (tmp_path / "a.yaml").write_text(f"{MODEL}\n---\n{bad}")

    (error,) = sources.read(tmp_path).errors

    assert error == (
        f"{tmp_path}/a.yaml (document 2, FlowControlPolicy chat): "
        'spec.unmatched.action: "Drop" is not one of Queue, Reject'
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "a.yaml: while parsing"),
        ("- 1", "is not an object"),
        ("!!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("\x00", "a.yaml: unacceptable character"),
    ],
)
def test_what_is_no_manifest_is_an_error_line(tmp_path, text, says):
    """Never a traceback; tags that run code are not known."""
    (tmp_path / "a.yaml").write_text(text)

    assert says in " ".join(sources.read(tmp_path).errors)


def test_other_kinds_are_told_of_and_have_no_effect(tmp_path):
    """The folder may be one that is applied to a cluster, too."""
    (tmp_path / "a.yaml").write_text(f"{POOL}\n---\napiVersion: v1\nkind: Service\n")

    manifests = sources.read(tmp_path)

    assert (len(manifests.resources), len(manifests.ignored), manifests.errors) == (1, 1, ())


@pytest.mark.parametrize("case", ["missing", "empty", "large"])
def test_a_folder_that_cannot_be_used_says_why(tmp_path, case, monkeypatch):
    """Missing, without YAML, or with a file beyond reason."""
    folder = tmp_path / "x"
    if case != "missing":
        folder.mkdir()
    if case == "large":
        monkeypatch.setattr(sources, "MAX_FILE_BYTES", 10)
        (folder / "a.yaml").write_text(POOL)
    expected = {"missing": "No such file", "empty": "no .yaml", "large": "larger than"}

    assert expected[case] in sources.read(folder).errors[0]


async def test_a_change_is_yielded(tmp_path):
    """First what is there, then what it becomes."""
    (tmp_path / "a.yaml").write_text(POOL)
    changes = sources.changes(tmp_path)

    async with asyncio.timeout(10):
        first = await anext(changes)
        (tmp_path / "b.yaml").write_text(MODEL)
        second = await anext(changes)

    await changes.aclose()
    assert (len(first.resources), len(second.resources)) == (1, 2)
