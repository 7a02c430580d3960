"""The chart on a real API server: what it accepts, and what installing brings."""

from __future__ import annotations

import json
from pathlib import Path

import chart
import pytest
import yaml
from chart_release import NO_CRDS

FOLDER = Path(__file__).parents[1] / "values"
VALUES = sorted(FOLDER.glob("*.yaml"))
SETS = pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem)

# Kinds of others, whose CRDs are not here: what is rendered for them is not checked.
NOT_JUDGED = {
    "cert-manager.io/v1",
    "monitoring.coreos.com/v1",
    "networking.gke.io/v1",
    "networking.istio.io/v1",
}


def rendered(values: Path, namespace: str) -> list[dict]:
    """The objects of a set of values, all of them in this namespace."""
    options = [f"--values={values}", NO_CRDS]
    for number, _ in enumerate(yaml.safe_load(values.read_text())["pools"]):
        options.append(f"--set=pools[{number}].namespace={namespace}")
    if values.stem == "namespaced":
        options.append(f"--set=operator.watchNamespaces={{{namespace}}}")
    found = chart.objects(*options, namespace=namespace)
    return [each for each in found if each["apiVersion"] not in NOT_JUDGED]


def as_list(items: list[dict]) -> str:
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items})


# --- what is accepted


@SETS
def test_the_api_server_accepts_every_object(kinds, namespace, values):
    """With no unknown field, no warning, and nothing that a validation refuses."""
    items = rendered(values, namespace)

    said = kinds.kubectl(
        *("apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-"),
        input=as_list(items),
    )

    assert said.stdout.count("(server dry run)") == len(items)
    assert "Warning" not in said.stderr


@SETS
def test_pods_are_admitted_where_restricted_is_enforced(kinds, namespace, values):
    """By Kubernetes' own PodSecurity admission; a pod without our settings is not."""
    kinds.kubectl(
        *("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
    )
    items = rendered(values, namespace)
    kinds.apply(as_list([each for each in items if each["kind"] == "ServiceAccount"]))
    pods = [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            **each["spec"]["template"],
            "metadata": {**each["spec"]["template"]["metadata"], "name": each["metadata"]["name"]},
        }
        for each in items
        if each["kind"] == "Deployment"
    ]
    path = f"/api/v1/namespaces/{namespace}/pods?dryRun=All&fieldValidation=Strict"

    answers = {pod["metadata"]["name"]: kinds.ask("POST", path, pod) for pod in pods}

    assert len(answers) >= 2
    for status, answer in answers.values():
        assert status == 201, answer
    bare = {**pods[0], "spec": {"containers": [{"name": "c", "image": "i"}]}}
    assert kinds.ask("POST", path, bare)[0] == 403


# --- installing


def test_crds_stay_when_the_release_goes(kinds):
    """Deleting them would delete all policies and pools."""
    names = {crd["metadata"]["name"] for crd in kinds.get("crd")["items"]}

    assert names >= {
        "flowcontrolpolicies.forebay.dev",
        "inferencemodels.inference.networking.x-k8s.io",
        "inferenceobjectives.inference.networking.x-k8s.io",
        "inferencepools.inference.networking.k8s.io",
        "inferencepools.inference.networking.x-k8s.io",
    }


def test_one_install_brings_the_kinds_and_a_pool(release):
    """InferencePool may be made by the very release that brings its CRD."""
    release.install(f"--values={FOLDER / 'standalone.yaml'}", NO_CRDS)

    spec = release.get("inferencepools.inference.networking.k8s.io", "chat")["spec"]

    assert spec["endpointPickerRef"]["name"] == "chat-epp"
    assert spec["selector"] == {"matchLabels": {"app": "vllm"}}
