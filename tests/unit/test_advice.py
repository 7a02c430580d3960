"""What `forebay check` says of manifests that are valid and surely not meant."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import yaml
from manifest_reading import resource_of

from forebay_cli import check, plan
from forebay_operator.status.advice import advice

BASE = """
apiVersion: inference.networking.k8s.io/v1
kind: InferencePool
metadata: {name: chat}
spec:
  selector: {matchLabels: {app: vllm}}
  targetPorts: [{number: 8000}]
  endpointPickerRef: {name: epp, port: {number: 9002}}
---
apiVersion: inference.networking.x-k8s.io/v1alpha2
kind: InferenceModel
metadata: {name: llama}
spec: {modelName: llama-chat, poolRef: {name: chat}, targetModels: [{name: llama-3.1-8b}]}
---
apiVersion: forebay.dev/v1alpha1
kind: FlowControlPolicy
metadata: {name: chat}
spec: {targetRefs: [{group: inference.networking.k8s.io, kind: InferencePool, name: chat}], POLICY}
"""
OBJECTIVE = """---
apiVersion: inference.networking.x-k8s.io/v1alpha2
kind: InferenceObjective
metadata: {name: NAME}
spec: {poolRef: {name: chat}, priority: PRIORITY}
"""
CODE = BASE.partition("---")[0].replace("name: chat", "name: code")

TWICE = """---
apiVersion: inference.networking.x-k8s.io/v1alpha2
kind: InferenceModel
metadata: {name: twice}
spec: {modelName: twice, poolRef: {name: chat}, targetModels: [{name: a}, {name: b}, {name: a}]}
"""
V1ALPHA2 = """
apiVersion: inference.networking.x-k8s.io/v1alpha2
kind: InferencePool
metadata: {name: chat}
spec: {selector: {app: vllm}, targetPortNumber: 8000, extensionRef: {name: REF, kind: KIND}}
"""


def read(text):
    return [resource_of(document) for document in yaml.safe_load_all(text)]


def objectives(*priorities):
    return "".join(
        OBJECTIVE.replace("NAME", f"o{number}").replace("PRIORITY", str(priority))
        for number, priority in enumerate(priorities)
    )


@pytest.mark.parametrize(
    ("policy", "more", "reason", "words"),
    [
        (
            *("bands: [{name: Critical, queue: {maxRequests: 50000}}]", ""),
            *("LimitOverLimit", "spec.bands[0].queue.maxRequests is 50,000"),
        ),
        (
            *("bands: [{name: Critical, queue: {maxBytes: 2Gi}}]", ""),
            *("LimitOverLimit", "spec.limits.maxBytes lets only 1,073,741,824 wait"),
        ),
        (
            "bands: [{name: Critical, queue: {perFlow: {maxRequests: 6000}}}]",
            *("", "LimitOverLimit", "perFlow.maxRequests is 6,000"),
        ),
        ("limits: {maxBodyBytes: 2Gi}", "", "LimitOverLimit", "spec.limits.maxBodyBytes"),
        (
            *("models: [{name: lama-chat, band: Critical}]", ""),
            *("NoSuchModel", "is llama-chat meant?"),
        ),
        (
            *("models: [{name: llama-3.1-8b, band: Critical}]", ""),
            *("TargetNamed", "is what the servers call llama-chat"),
        ),
        (
            "saturation: {type: Concurrency}, modelServerMetrics: {running: a, waiting: b}",
            *(
                "",
                "FieldWithoutEffect",
                "modelServerMetrics counts with saturation.type Adaptive",
            ),
        ),
        (
            "bands: [{name: Critical, fairness: [{between: Tenants, policy: TokenFair}]}]",
            *("", "FieldWithoutEffect", "spec.bands[0].fairness[0] is between Tenants"),
        ),
        (
            "models: [{name: llama-chat, weight: 3}]",
            *("", "FieldWithoutEffect", "spec.models[].weight counts where a band is shared"),
        ),
        (
            "tenants: {weights: [{name: a, weight: 3}]}, trustedHeaders: [Tenant]",
            *("", "FieldWithoutEffect", "spec.tenants.weights counts where a band is shared"),
        ),
        (
            *("limits: {}", TWICE),
            *("TargetTwice", "spec.targetModels names a more than once"),
        ),
        ("limits: {}", f"---{CODE}", "NoPolicy", "the defaults"),
        ("limits: {}", f"---{CODE}", "EndpointPickerShared", "names Service epp too"),
        ("limits: {}", objectives(1), "ObjectivesNotTrusted", "trustedHeaders: [Objective]"),
        (
            *("trustedHeaders: [Objective]", objectives(5, 1)),
            *(
                "SameBand",
                "priorities 5 and 1 (o1) both join band Standard",
            ),
        ),
    ],
)
def test_what_is_surely_not_meant_is_told(policy, more, reason, words):
    """Each names the field or the objects, and why."""
    found = advice(read(BASE.replace("POLICY", policy) + more))

    assert [p for p in found if p.reason == reason and words in p.message], found


def test_a_pool_without_models_that_rejects_unmatched_requests_refuses_all():
    """Every request gets 404."""
    pool, _, policy = BASE.replace("POLICY", "unmatched: {action: Reject}").split("---")
    (told,) = advice(read(f"{pool}---{policy}"))

    assert (told.reason, told.name) == ("EverythingRejected", "default/chat")
    assert "every request is refused with 404" in told.message


def test_a_pool_without_a_service_of_endpoint_pickers_is_told():
    """A reference of another kind names no Service."""
    _, *others = BASE.replace("POLICY", "limits: {}").split("---")
    pool = V1ALPHA2.replace("REF", "epp").replace("KIND", "Deployment")
    (told,) = advice(read("---".join([pool, *others])))

    assert (told.kind, told.reason) == ("InferencePool", "NoEndpointPickerRef")


@pytest.mark.parametrize(
    ("policy", "more"),
    [
        ("limits: {}", ""),
        ("bands: [{name: Critical, queue: {maxRequests: 10000}}]", ""),
        ("models: [{name: llama-chat, band: Critical}]", ""),
        ("trustedHeaders: [Objective]", objectives(100, 0, -1)),
    ],
)
def test_what_may_well_be_meant_is_not(policy, more):
    """Or warnings would soon be read no more."""
    assert advice(read(BASE.replace("POLICY", policy) + more)) == ()


def test_warnings_fail_where_that_is_asked_for(tmp_path, capsys):
    """`--strict`, for pipelines."""
    (tmp_path / "all.yaml").write_text(
        BASE.replace("POLICY", "models: [{name: lama-chat, band: Critical}]")
    )
    assert check.run(SimpleNamespace(paths=[tmp_path], strict=False)) == 0
    assert check.run(SimpleNamespace(paths=[tmp_path], strict=True)) == 1
    assert "NoSuchModel" in capsys.readouterr().out


@pytest.mark.parametrize(
    "reference", ["{kind: Service, name: chat}", "{group: something.else, name: chat}"]
)
def test_a_reference_to_something_else_means_no_pool(reference, tmp_path, capsys):
    """It does not attach, and `forebay check` says why."""
    text = BASE.replace("POLICY", "limits: {}").replace(
        "poolRef: {name: chat}", f"poolRef: {reference}"
    )
    (tmp_path / "all.yaml").write_text(text)

    assert check.run(SimpleNamespace(paths=[tmp_path], strict=True)) == 1
    assert "InvalidPoolRef" in capsys.readouterr().out
    assert plan.run(SimpleNamespace(paths=[tmp_path], output="tree")) == 0
    assert "model llama-chat" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bands", "expected"),
    [
        ("", {"chat": "Standard", "base": "Standard", "batch": "Sheddable"}),
        (
            "bands: [{name: fast, priority: 5}], ",
            {"chat": "fast", "base": "Standard", "batch": "Sheddable"},
        ),
    ],
)
def test_a_plan_says_which_band_each_objective_joins(bands, expected, tmp_path, capsys):
    """One line each with its priority, here those of upstream's samples."""
    priorities = {"chat": 5, "base": 1, "batch": -1}
    (tmp_path / "all.yaml").write_text(
        BASE.replace("POLICY", bands + "trustedHeaders: [Objective]")
        + "".join(
            OBJECTIVE.replace("NAME", name).replace("PRIORITY", str(priority))
            for name, priority in priorities.items()
        )
    )
    assert plan.run(SimpleNamespace(paths=[tmp_path], output="tree")) == 0

    found, band = {}, ""
    for line in capsys.readouterr().out.splitlines():
        words = line.strip(" │├└─").split(" ", 2)
        if words[1:] and words[1] == "(priority":
            band = words[0]
        elif words[0] == "objective":
            found[words[1]] = band
            assert words[2] == f"(priority {priorities[words[1]]})"
    assert found == expected


def test_a_plan_shows_levels_weights_and_bounds(tmp_path, capsys):
    """Whatever a policy says about order is a line that a person can check."""
    policy = """
      bands: [{
        name: Critical, ordering: {policy: EarliestDeadline},
        fairness: [{between: Models, policy: WeightedFair, weightedFair: {cost: Tokens}},
                   {between: Tenants, policy: TokenFair}],
        queue: {whenFull: DisplaceLower, perFlow: {maxRequests: 7}},
        maxSaturationPercent: 80, reservedPercent: 5}],
      models: [{name: llama-chat, weight: 3, timeToFirstToken: 2s}],
      tenants: {weights: [{name: acme, weight: 2}]}, trustedHeaders: [Tenant, Deadline]"""
    (tmp_path / "all.yaml").write_text(BASE.replace("POLICY", policy))
    assert plan.run(SimpleNamespace(paths=[tmp_path], output="tree")) == 0

    printed = capsys.readouterr().out
    for line in (
        "WeightedFair by tokens between models, TokenFair between tenants, EarliestDeadline within",
        "fills the pool up to 80 % of its slots",
        "has at least 5 % of the dispatches while it waits",
        "of one tenant at most 7 requests",
        "displaces what waits in lower bands when the pool's queue is full",
        "model llama-chat -> llama-3.1-8b 100%, weight 3, due after 2 s",
        "tenants by header x-llm-d-inference-fairness-id, weights acme 2, others 1",
        "callers may say when a request is due and how long it may wait",
    ):
        assert line in printed
