"""The chart on a real API server: every object is accepted, rights are as few as they can be.

There is no kubelet: Deployments make pods, and nobody runs them. What the operator's pod would run
is started here, with its flags and its service account's token.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

import chart
import grpc
import pytest
import yaml
from control_plane import Operator, PickerPod, PickerProcess, apply, check_log, model, policy
from ext_proc_peer import until

from forebay_control.v1 import control_pb2 as pb
from forebay_control.v1 import control_pb2_grpc as rpc

FOLDER = Path(__file__).parent / "values"
VALUES = sorted(FOLDER.glob("*.yaml"))
SETS = pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem)
NO_CRDS = "--set=crds.install=false"
WAIT_SECONDS = 60
ISSUED = (("secret", "forebay-control-tls"), ("configmap", "forebay-control-ca"))

# Kinds of others, whose CRDs are not here: what is rendered for them, nobody judges.
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


# --- installing, upgrading, uninstalling


def test_crds_stay_when_the_release_goes(kinds):
    """Deleting them would delete everybody's policies and pools."""
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


def test_what_the_operator_keeps_survives_upgrades(release):
    """Helm's, and those of whoever renders the chart and applies it: neither owns the data."""
    values = f"--values={FOLDER / 'standalone.yaml'}"
    release.install(values, NO_CRDS)
    pem = base64.b64encode(b"pem").decode()
    release.patch("secret", "forebay-control-tls", json.dumps({"data": {"tls.key": pem}}))
    release.patch("configmap", "forebay-control-ca", json.dumps({"data": {"ca.crt": "pem"}}))
    release.patch("lease", "forebay-operator", json.dumps({"spec": {"holderIdentity": "a"}}))

    release.upgrade(values, NO_CRDS, "--set=epp.replicas=3")
    text = chart.render(values, NO_CRDS, namespace=release.namespace).stdout
    release.cluster.apply(text, "--field-manager=gitops", "--force-conflicts")

    assert release.get("deployment", "chat-epp")["spec"]["replicas"] == 1
    assert release.get("secret", "forebay-control-tls")["data"] == {"tls.key": pem}
    assert release.get("configmap", "forebay-control-ca")["data"] == {"ca.crt": "pem"}
    assert release.get("lease", "forebay-operator")["spec"]["holderIdentity"] == "a"


# --- rights


def rights(cluster, account_namespace: str, account: str, namespace: str) -> set[tuple[str, ...]]:
    """What an account may in a namespace, as (verb, group, resource, name)."""
    token = cluster.kubectl("create", "token", account, "-n", account_namespace).stdout.strip()
    status, answer = cluster.ask(
        "POST",
        "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews",
        {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectRulesReview",
            "spec": {"namespace": namespace},
        },
        token=token,
    )
    assert status == 201, answer
    assert not answer["status"]["incomplete"]
    return {
        (verb, group, resource, name)
        for rule in answer["status"]["resourceRules"]
        for verb in rule["verbs"]
        for group in rule.get("apiGroups", [""])
        for resource in rule["resources"]
        for name in rule.get("resourceNames", [""])
    }


def expected(verbs: str, group: str, resources: str, name: str = "") -> set[tuple[str, ...]]:
    return {
        (verb, group, resource, name) for verb in verbs.split() for resource in resources.split()
    }


X_K8S = "inference.networking.x-k8s.io"
WATCHED = (
    expected("list watch", "forebay.dev", "flowcontrolpolicies")
    | expected("list watch", "inference.networking.k8s.io", "inferencepools")
    | expected("list watch", X_K8S, "inferencepools inferencemodels inferenceobjectives")
    | expected("list watch", "llm-d.ai", "inferenceobjectives")
    | expected("list watch", "", "pods services")
    | expected("list watch", "discovery.k8s.io", "endpointslices")
    | expected("patch", "forebay.dev", "flowcontrolpolicies/status")
    | expected("patch", X_K8S, "inferencemodels/status")
    | expected("create", "", "events")
)
REVIEWS = expected("create", "authentication.k8s.io", "tokenreviews")
AT_HOME = (
    expected("create get update", "coordination.k8s.io", "leases", "forebay-operator")
    | expected("get update", "", "secrets", "forebay-control-tls")
    | expected("get update", "", "configmaps", "forebay-control-ca")
)


def test_the_operator_may_what_it_needs_and_nothing_else(release):
    """Everywhere what it watches; in its own namespace also its Lease, its Secret and the CA's."""
    release.install(f"--values={FOLDER / 'pool.yaml'}", NO_CRDS)
    cluster, namespace = release.cluster, release.namespace
    anybody = rights(cluster, namespace, "default", namespace)

    here = rights(cluster, namespace, "forebay-operator", namespace)
    elsewhere = rights(cluster, namespace, "forebay-operator", "kube-system")

    assert here - anybody == WATCHED | REVIEWS | AT_HOME
    assert elsewhere - anybody == WATCHED | REVIEWS


def test_an_operator_of_one_namespace_has_no_rights_in_others(release):
    """But to have tokens reviewed, which belong to no namespace."""
    release.install(
        f"--values={FOLDER / 'namespaced.yaml'}",
        f"--set=operator.watchNamespaces={{{release.namespace}}}",
        NO_CRDS,
    )
    cluster, namespace = release.cluster, release.namespace
    anybody = rights(cluster, namespace, "default", namespace)

    here = rights(cluster, namespace, "forebay-operator", namespace)
    elsewhere = rights(cluster, namespace, "forebay-operator", "kube-system")

    lease = expected("create get update", "coordination.k8s.io", "leases", "forebay-operator")
    assert here - anybody == WATCHED | REVIEWS | lease
    assert elsewhere - anybody == REVIEWS


def test_the_ca_is_published_to_pools_elsewhere(release, kinds):
    """By name there, too."""
    kinds.kubectl("create", "namespace", f"{release.namespace}-pools")
    try:
        release.install(
            *(f"--values={FOLDER / 'pool.yaml'}", NO_CRDS),
            f"--set=pools[0].namespace={release.namespace}-pools",
        )
        anybody = rights(kinds, release.namespace, "default", release.namespace)
        there = rights(kinds, release.namespace, "forebay-operator", f"{release.namespace}-pools")
    finally:
        release.helm("uninstall")
        kinds.kubectl("delete", "namespace", f"{release.namespace}-pools", "--wait=false")

    published = expected("get update", "", "configmaps", "forebay-control-ca")
    assert there - anybody == WATCHED | REVIEWS | published


def test_an_endpoint_picker_may_nothing(release):
    """Its account has no more rights than anybody's, and its token is not even for the API."""
    release.install(f"--values={FOLDER / 'pool.yaml'}", NO_CRDS)
    cluster, namespace = release.cluster, release.namespace
    anybody = rights(cluster, namespace, "default", namespace)

    assert rights(cluster, namespace, "chat-epp", namespace) == anybody
    token = deployed(release, "chat").token()
    status, _ = cluster.ask("GET", f"/api/v1/namespaces/{namespace}/pods", token=token)
    assert status == 401
    spec = release.get("deployment", "chat-epp")["spec"]["template"]["spec"]
    assert spec["automountServiceAccountToken"] is False


# --- the operator as its pod would run it


class Deployed(PickerPod):
    """A pod that the chart's Deployment has made."""

    def __init__(self, cluster, namespace: str, pool: str, name: str) -> None:
        self.account = f"{pool}-epp"
        super().__init__(cluster, namespace, name, "")

    def _create(self, app: str) -> None:
        """It is there."""


def deployed(release, pool: str) -> Deployed:
    """The endpoint picker pod of a pool, running as far as the API server knows."""
    labels = ("-l", f"forebay.dev/pool={pool},app.kubernetes.io/component=endpoint-picker")

    def pods() -> list[dict]:
        return release.cluster.get("pod", "-n", release.namespace, *labels)["items"]

    until(lambda: len(pods()) == 1, WAIT_SECONDS)
    name = pods()[0]["metadata"]["name"]
    return Deployed(release.cluster, release.namespace, pool, name)


class Running:
    """The processes of a release."""

    def __init__(self, release, folder: Path) -> None:
        self.release, self.folder = release, folder
        self.processes: list = []
        self.server = f"forebay-operator.{release.namespace}.svc"

    def operator(self, name: str) -> Operator:
        release = self.release
        deployment = release.get("deployment", "forebay-operator")
        kubeconfig = release.cluster.kubeconfig_of(
            release.namespace, "forebay-operator", self.folder / name
        )
        operator = Operator(
            *(release.cluster, self.folder, None, *chart.container(deployment)["args"]),
            name=name,
            lease_namespace=release.namespace,
            kubeconfig=kubeconfig,
        )
        self.processes.append(operator)
        until(lambda: operator.ready, WAIT_SECONDS)
        return operator

    def ca(self) -> Path:
        """The CA as the kubelet would mount it, once it is there."""

        def published() -> str:
            found = self.release.get("configmap", "forebay-control-ca")
            return found.get("data", {}).get("ca.crt", "")

        until(published, WAIT_SECONDS)
        path = self.folder / "ca.crt"
        path.write_text(published())
        return path

    def picker(self, operator: Operator) -> PickerProcess:
        picker = PickerProcess(
            *(self.folder, deployed(self.release, "chat"), "chat", operator.control_port),
            *(self.ca(), f"--control-server-name={self.server}"),
        )
        self.processes.append(picker)
        until(lambda: picker.serving, WAIT_SECONDS)
        return picker


@pytest.fixture
def running(release, tmp_path):
    made = Running(release, tmp_path)
    yield made
    for process in made.processes:
        process.end()


def test_nothing_is_left_after_uninstalling(running):
    """Of all kinds that the chart makes; a running operator does not make its Lease again."""
    release = running.release
    values = f"--values={FOLDER / 'standalone.yaml'}"
    options = (values, NO_CRDS, "--set=networkPolicy.enabled=true")
    release.install(*options, "--set=monitoring.dashboard.enabled=true")
    made = {
        each["kind"].lower()
        for each in chart.objects(*options, namespace=release.namespace)
        if each["kind"] != "InferencePool"
    }
    names = ",".join((*sorted(made), "inferencepools.inference.networking.k8s.io"))
    ours = ("-l", f"app.kubernetes.io/managed-by=Helm,app.kubernetes.io/instance={release.name}")
    assert len(release.cluster.get(names, "-n", release.namespace, *ours)["items"]) > 20
    operator = running.operator("operator-0")
    until(lambda: operator.epoch > 0, WAIT_SECONDS)

    release.helm("uninstall", "--wait")
    operator.stop()

    assert release.cluster.get(names, "-n", release.namespace, *ours)["items"] == []
    assert release.cluster.get("lease", "-n", release.namespace)["items"] == []


@pytest.mark.parametrize("watched", ["all", "one"])
def test_the_operator_programs_pickers_with_the_rights_it_has(running, watched):
    """Certificates, Lease, statuses, Events: nothing is refused, of all namespaces or of one."""
    release = running.release
    one = f"--set=operator.watchNamespaces={{{release.namespace}}}"
    release.install(
        *(f"--values={FOLDER / 'standalone.yaml'}", NO_CRDS),
        *([one] if watched == "one" else []),
    )
    operator = running.operator("operator-0")
    picker = running.picker(operator)
    apply(
        *(release.cluster, release.namespace),
        *(policy("chat", "chat"), model("llama", "chat", "llama")),
    )

    def says(kind: str, name: str, condition: str) -> bool:
        found = release.get(kind, name).get("status", {}).get("conditions", [])
        return {each["type"]: each["status"] for each in found}.get(condition) == "True"

    until(lambda: says("fcp", "chat", "Programmed"), WAIT_SECONDS)
    until(lambda: says("inferencemodel", "llama", "Accepted"), WAIT_SECONDS)
    until(
        lambda: release.cluster.get(
            *("events", "-n", release.namespace, "--field-selector=involvedObject.name=chat"),
        )["items"],
        WAIT_SECONDS,
    )
    assert picker.program()[0] == "Live"
    check_log(operator.log)
    assert "forbidden" not in operator.log.lower()
    assert operator.metric("forebay_control_certificate_expiry_timestamp_seconds") > 0


def test_an_upgrade_does_not_touch_what_the_operator_has_issued(running):
    """It has been written by the operator itself here, not by a patch of the test."""
    release = running.release
    values = f"--values={FOLDER / 'standalone.yaml'}"
    release.install(values, NO_CRDS)
    operator = running.operator("operator-0")
    running.ca()
    before = [release.get(*name) for name in ISSUED]

    release.upgrade(values, NO_CRDS, "--set=operator.podLabels.changed=yes")

    assert [release.get(*name)["data"] for name in ISSUED] == [each["data"] for each in before]
    until(lambda: operator.epoch > 0, WAIT_SECONDS)


def test_a_replica_that_stands_by_serves_the_same_certificate(running):
    """It sends pickers on to the leader, over TLS that the same CA has signed."""
    running.release.install(f"--values={FOLDER / 'standalone.yaml'}", NO_CRDS)
    leader = running.operator("operator-0")
    until(lambda: leader.epoch > 0, WAIT_SECONDS)
    standby = running.operator("operator-1")
    credentials = grpc.ssl_channel_credentials(running.ca().read_bytes())
    options = [("grpc.ssl_target_name_override", running.server)]

    with grpc.secure_channel(f"127.0.0.1:{standby.control_port}", credentials, options) as raw:
        hello = pb.FromPicker(hello=pb.Hello(protocol=1, pool="a/b", boot_id="b"))
        answers = rpc.ControlStub(raw).Connect(iter([hello]), timeout=WAIT_SECONDS)
        answer = next(answers)

    assert answer.WhichOneof("message") == "not_leader"
    assert standby.epoch == 0
