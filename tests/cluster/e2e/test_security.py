"""What EPPs may not do."""

from __future__ import annotations

import secrets

import pods
import pytest
from ext_proc_peer import until
from installation import NAMESPACE, PATIENCE_SECONDS, RESTRICTED

TOKEN = "/var/run/forebay/token"  # noqa: S105  # its path
CA = "/etc/forebay/ca"


def test_a_epps_token_is_nothing_to_the_api(forebay):
    """The only token in an EPP's pod is for another audience: the API server refuses it."""
    (pod,) = forebay.pods("endpoint-picker")
    folder = "/var/run/secrets/kubernetes.io"
    code = f"import os; print(os.path.exists({folder!r}), open({TOKEN!r}).read())"
    command = ("exec", pod["metadata"]["name"], "--", "python3", "-c", code)
    mounted, token = forebay.kubectl(*command).split()

    status, _ = forebay.cluster.ask("GET", f"/api/v1/namespaces/{NAMESPACE}/pods", token=token)

    assert mounted == "False"
    assert status == 401


@pytest.fixture
def elsewhere(forebay):
    """A namespace of another team, which knows the operator's CA: the CA is no secret."""
    name = f"elsewhere-{secrets.token_hex(4)}"
    forebay.cluster.kubectl("create", "namespace", name)
    forebay.cluster.kubectl("label", "namespace", name, RESTRICTED)
    account = ("get", "serviceaccount", "default", "-n", name)
    until(lambda: forebay.cluster.kubectl(*account, check=False).returncode == 0, 30)
    ca = forebay.get("configmap", "forebay-control-ca")["data"]
    manifest = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "ca"}, "data": ca}
    pods.apply(forebay.cluster, name, manifest)
    yield name
    forebay.cluster.kubectl("delete", "namespace", name)


def _intruder(says_namespace: str) -> dict:
    """Return an EPP that wants the pool of a namespace that it is not in."""
    manifest = pods.pod(
        "intruder",
        "epp",
        args=[
            *("--pool-name=chat", f"--pool-namespace={NAMESPACE}"),
            f"--pod-namespace={says_namespace}",
            f"--control-address=forebay-operator.{NAMESPACE}.svc:8443",
            f"--control-ca-path={CA}/ca.crt",
            f"--control-token-path={TOKEN}",
        ],
        volumeMounts=[
            {"name": "ca", "mountPath": CA},
            {"name": "token", "mountPath": "/var/run/forebay"},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    )
    token = {"serviceAccountToken": {"path": "token", "audience": "forebay-control"}}
    manifest["spec"]["volumes"] = [
        {"name": "ca", "configMap": {"name": "ca"}},
        {"name": "token", "projected": {"sources": [token]}},
        {"name": "tmp", "emptyDir": {}},
    ]
    # As its neighbours in the pool: the labels are not what it is known by.
    manifest["metadata"]["labels"] = {
        "app.kubernetes.io/name": "forebay",
        "app.kubernetes.io/instance": "forebay",
        "app.kubernetes.io/component": "endpoint-picker",
        "forebay.dev/pool": "chat",
    }
    return manifest


def test_a_pod_of_another_namespace_gets_no_pool(forebay, elsewhere):
    """It is refused whatever it says of itself; the operator counts that and serves its own."""
    (operator,) = forebay.pods("operator")

    def refusals() -> float:
        page = forebay.metrics(operator["metadata"]["name"], 8080)
        name = "forebay_control_refusals_total"
        return sum(value for key, value in page.items() if key.startswith(name))

    before = refusals()

    for says in (elsewhere, NAMESPACE):
        pods.apply(forebay.cluster, elsewhere, _intruder(says))
        seen = refusals()
        until(lambda seen=seen: refusals() > max(seen, before), PATIENCE_SECONDS)
        page = forebay.metrics("intruder", 9090, elsewhere)
        assert page["forebay_program_revision"] == 0
        forebay.cluster.kubectl("delete", "pod", "intruder", "-n", elsewhere)

    assert forebay.policy()["status"]["endpointPickers"]["ready"] == "1/1"
