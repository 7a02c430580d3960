"""hack/local-cluster with a node: pods really run, and nothing is left of them when it is down.

NetworkPolicies are stored and not enforced: the node's network plugin (ptp) knows none.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import api_server
import pods
import pytest
from api_server import local_cluster
from ext_proc_peer import until

AUDIENCE = "forebay-control"


@pytest.fixture(scope="module")
def place(node_cluster):
    """A namespace that enforces PodSecurity's restricted level."""
    name = f"test-{secrets.token_hex(4)}"
    node_cluster.kubectl("create", "namespace", name)
    level = "pod-security.kubernetes.io/enforce=restricted"
    node_cluster.kubectl("label", "namespace", name, level)
    account = ("get", "serviceaccount", "default", "--namespace", name)
    until(lambda: node_cluster.kubectl(*account, check=False).returncode == 0, 30)
    yield name
    node_cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="module")
def server(node_cluster, place):
    """A simulated model server behind a Service on port 80 and a headless one."""
    probe = {"httpGet": {"path": "/health", "port": 8000}, "periodSeconds": 1}
    pods.apply(
        node_cluster,
        place,
        pods.pod("sim", "sim", readinessProbe=probe),
        pods.service("sim", 80, 8000),
        pods.service("sim", 8000, 8000, headless=True),
    )
    pods.wait_ready(node_cluster, place, "sim")
    return "sim"


@pytest.fixture(scope="module")
def client(node_cluster, place):
    """A pod that does nothing by itself, with a token for one audience."""
    token = {"serviceAccountToken": {"path": "token", "audience": AUDIENCE}}
    manifest = pods.pod(
        "client",
        "sim",
        command=["python3", "-c", "import signal; signal.pause()"],
        volumeMounts=[{"name": "token", "mountPath": "/var/run/forebay"}],
    )
    manifest["spec"]["volumes"] = [{"name": "token", "projected": {"sources": [token]}}]
    pods.apply(node_cluster, place, manifest)
    pods.wait_ready(node_cluster, place, "client")
    return lambda code: pods.python(node_cluster, place, "client", code).strip()


def fetched(url: str) -> str:
    """Return code that prints a page; a name or a Service may need a moment."""
    return f"""
import time, urllib.request
for _ in range(100):
    try:
        print(urllib.request.urlopen({url!r}, timeout=5).read().decode())
        break
    except OSError as error:
        problem = error
        time.sleep(0.1)
else:
    raise problem
"""


def own(cluster):
    """Skip the test where the cluster is not one of hack/local-cluster."""
    return cluster.dir


def test_the_node_is_ready(node_cluster):
    """When `up` returns, the one node takes pods."""
    nodes = node_cluster.get("nodes")["items"]

    for node in nodes:
        conditions = {c["type"]: c["status"] for c in node["status"]["conditions"]}
        assert conditions["Ready"] == "True"
    assert nodes


def test_a_service_is_reached_from_this_machine(node_cluster, place, server):
    """The cluster IP of a Service leads from the machine itself to a pod."""
    own(node_cluster)
    address = node_cluster.get("service", server, "-n", place)["spec"]["clusterIP"]

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"http://{address}/v1/models", timeout=5) as page:
                return '"list"' in page.read().decode()
        except OSError:
            return False

    until(answers, 30)


@pytest.mark.parametrize("service", ["sim:80", "sim-headless:8000"])
def test_a_service_is_reached_by_name_from_a_pod(client, place, server, service):
    """Services with and without a cluster IP have names in DNS."""
    assert server
    name, _, port = service.partition(":")

    page = client(fetched(f"http://{name}.{place}.svc.cluster.local:{port}/v1/models"))

    assert '"list"' in page


def test_a_short_name_is_enough_within_the_namespace(client, server):
    """The search list of a pod makes a Service's bare name do."""
    assert '"list"' in client(fetched(f"http://{server}/v1/models"))


def test_a_pod_reaches_the_api_server_by_name(client):
    """The Service `kubernetes` leads to the API server, whose certificate has that name."""
    folder = "/var/run/secrets/kubernetes.io/serviceaccount"
    code = f"""
import ssl, urllib.request
trust = ssl.create_default_context(cafile="{folder}/ca.crt")
print(urllib.request.urlopen("https://kubernetes.default.svc/version", context=trust).status)
"""
    assert client(code) == "200"


def test_a_projected_token_names_its_pod(node_cluster, place, client):
    """TokenReview tells of which pod a mounted token is, for the audience it was made for."""
    token = client("print(open('/var/run/forebay/token').read())")

    status = review(node_cluster, token, AUDIENCE)
    elsewhere = review(node_cluster, token, "other-audience")

    assert status["authenticated"]
    assert status["user"]["username"] == f"system:serviceaccount:{place}:default"
    assert status["user"]["extra"]["authentication.kubernetes.io/pod-name"] == ["client"]
    assert not elsewhere.get("authenticated")


def review(cluster, token, audience) -> dict:
    asked = {
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenReview",
        "spec": {"token": token, "audiences": [audience]},
    }
    status, answer = cluster.ask("POST", "/apis/authentication.k8s.io/v1/tokenreviews", asked)
    assert status == 201, answer
    return answer["status"]


def test_pods_send_nothing_beyond_this_machine(node_cluster, client):
    """There is no route from a pod to addresses outside the cluster."""
    own(node_cluster)
    code = """
import errno, socket
with socket.socket() as outside:
    outside.settimeout(5)
    print(errno.errorcode[outside.connect_ex(("198.51.100.1", 80))])
"""
    assert client(code) == "ENETUNREACH"


def test_a_restricted_namespace_refuses_root(node_cluster, place):
    """PodSecurity is enforced: a pod that may run as root is not admitted."""
    manifest = pods.pod("root", "sim", securityContext={})

    refused = node_cluster.kubectl(
        *("apply", "-n", place, "-f", "-"), input=json.dumps(manifest), check=False
    )

    assert refused.returncode != 0
    assert "runAsNonRoot" in refused.stderr


def test_the_operator_runs_as_a_user_without_a_name(node_cluster, place):
    """The operator's image becomes ready as 65532, whom /etc/passwd does not know."""
    bound = ("clusterrolebinding", place)
    account = f"--serviceaccount={place}:default"
    node_cluster.kubectl("create", *bound, "--clusterrole=cluster-admin", account)
    manifest = pods.pod(
        "operator",
        "operator",
        args=["--control-bind-address=127.0.0.1", "--control-client-auth=none"],
        env=[{"name": "POD_NAMESPACE", "value": place}, {"name": "POD_UID", "value": "1"}],
        readinessProbe={"httpGet": {"path": "/readyz", "port": 8080}, "periodSeconds": 1},
    )
    try:
        pods.apply(node_cluster, place, manifest)
        pods.wait_ready(node_cluster, place, "operator")
    finally:
        node_cluster.kubectl("delete", *bound)


def test_the_epp_starts(node_cluster, place):
    """The EPP's image is alive while no operator answers."""
    manifest = pods.pod(
        "epp",
        "epp",
        args=["--control-address=127.0.0.1:1", "--control-insecure"],
        env=[{"name": "POD_NAMESPACE", "value": place}],
        readinessProbe={"grpc": {"port": 9003, "service": "liveness"}, "periodSeconds": 1},
    )

    pods.apply(node_cluster, place, manifest)

    pods.wait_ready(node_cluster, place, "epp")


# ------------------------------------------------------------------------------------ up and down


@pytest.fixture
def short_lived(tmp_path, monkeypatch):
    """A cluster with a node and one pod, of the only image that every node has."""
    monkeypatch.delenv(api_server.OTHER_CLUSTER, raising=False)
    with api_server.running(tmp_path / "cluster", node=True) as cluster:
        manifest = pods.pod("idle", "pause")
        manifest["spec"]["containers"][0]["image"] = "localhost/forebay/pause:1"
        pods.apply(cluster, "default", manifest)
        pods.wait_ready(cluster, "default", "idle")
        yield cluster


def leftovers(folder: Path, link: str) -> list[str]:
    """Return what exists outside the folder because of its cluster."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode(errors="replace")
            mounts = (process / "mountinfo").read_text()
            groups = (process / "cgroup").read_text()
        except OSError:
            continue  # it has ended meanwhile
        if f"{folder}/" in command or f"/{link}/" in groups:
            found.append(f"process {process.name} {command}")
        if str(folder) in mounts:
            found.append(f"mounts of process {process.name}")
    listings = (
        ["ip", "link"],
        ["ip", "route"],
        ["ip", "netns", "list"],
        ["nft", "list", "tables"],
        ["find", "/sys/fs/cgroup", "-name", link],
    )
    for command in listings:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        marks = (f"{link}:", f"{link}@", f" {link} ", f"/{link}", "kube-proxy", "cni-")
        found += [line for line in listed.splitlines() if any(mark in line for mark in marks)]
    return found


def test_down_leaves_nothing(short_lived):
    """With a pod running, `down` ends every process and undoes mounts, links, rules and groups."""
    folder = short_lived.dir
    link = f"forebay{json.loads((folder / 'state.json').read_text())['network']}"
    assert leftovers(folder, link)

    local_cluster("down", folder)

    assert leftovers(folder, link) == []
    assert not folder.exists()


def test_up_starts_a_dead_node_again(short_lived):
    """When the node's first process has died, `up` brings back the node and its pod."""
    state = json.loads((short_lived.dir / "state.json").read_text())
    first = state["processes"]["node"]["pid"]
    os.kill(first, 9)
    until(lambda: not Path(f"/proc/{first}").exists(), 30)

    local_cluster("up", short_lived.dir)

    restarts = ("get", "pod", "idle", "-o", "jsonpath={.status.containerStatuses[0].restartCount}")
    until(lambda: short_lived.kubectl(*restarts).stdout == "1", 60)
    pods.wait_ready(short_lived, "default", "idle")


def test_what_a_node_lacks_is_named(tmp_path):
    """Without containerd, `up` says what to install, and has made nothing."""
    api_server.need_node()
    (tmp_path / "etcd").symlink_to(shutil.which("etcd"))

    refused = subprocess.run(
        [sys.executable, api_server.PROGRAM, "up", "--dir", tmp_path / "cluster"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert refused.returncode == 1
    assert "apt-get install containerd" in refused.stderr
    assert not (tmp_path / "cluster").exists()
