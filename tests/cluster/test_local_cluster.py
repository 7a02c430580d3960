"""hack/local-cluster: a real API server with its data, and nothing left when it is down."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import api_server
import pytest
from api_server import local_cluster
from ext_proc_peer import until

CRD = """
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata:
  name: gates.test.forebay.dev
spec:
  group: test.forebay.dev
  scope: Namespaced
  names: {kind: Gate, plural: gates, singular: gate}
  versions:
    - name: v1
      served: true
      storage: true
      schema:
        openAPIV3Schema:
          type: object
          properties:
            spec:
              type: object
              properties:
                width: {type: integer, minimum: 1}
"""
GATE = """
apiVersion: test.forebay.dev/v1
kind: Gate
metadata: {name: north}
spec: {width: %s}
"""


def note(cluster, namespace, name) -> str:
    """Return the text of a config map, empty when there is none."""
    found = ("get", "configmap", name, "--namespace", namespace, "--ignore-not-found")
    return cluster.kubectl(*found, "-o", "jsonpath={.data.text}").stdout


def write_note(cluster, namespace, name, text) -> None:
    created = ("create", "configmap", name, "--namespace", namespace)
    cluster.kubectl(*created, f"--from-literal=text={text}")


def processes_of(folder: Path) -> list[str]:
    """Return the command lines that name the folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue  # it has ended meanwhile
        if f"{folder}/" in command:
            found.append(command)
    return found


@pytest.fixture
def gates(cluster):
    """A custom resource that the API serves."""
    cluster.apply(CRD)
    cluster.wait_established("gates.test.forebay.dev")
    yield
    # The next test's CRD of this name must not find one that is on its way out.
    cluster.kubectl("delete", "crd", "gates.test.forebay.dev")


def token_for(cluster, namespace, audience) -> str:
    """Return a token of the namespace's default account that is good for one audience."""
    request = {
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenRequest",
        "spec": {"audiences": [audience], "expirationSeconds": 600},
    }
    path = f"/api/v1/namespaces/{namespace}/serviceaccounts/default/token"
    # `kubectl create token` is younger than Debian 12's kubectl.
    answer = cluster.kubectl("create", "--raw", path, "-f", "-", input=json.dumps(request))
    return json.loads(answer.stdout)["status"]["token"]


def review(cluster, token, audience) -> dict:
    """Return the API server's review of a token shown to the audience."""
    asked = {
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenReview",
        "spec": {"token": token, "audiences": [audience]},
    }
    answer = cluster.kubectl("create", "-f", "-", "-o", "json", input=json.dumps(asked))
    return json.loads(answer.stdout)["status"]


def test_up_gives_a_ready_api_server(cluster):
    """When `up` returns the API server answers that it is ready."""
    assert cluster.kubectl("get", "--raw", "/readyz").stdout == "ok"


def test_up_again_gives_the_same_cluster(cluster):
    """A running cluster is used again: the same line on stdout, the same processes."""
    before = (cluster.dir / "state.json").read_text()

    again = local_cluster("up", cluster.dir, "--control-plane-only")

    assert again.stdout == f"export KUBECONFIG={cluster.kubeconfig}\n"
    assert (cluster.dir / "state.json").read_text() == before


def test_up_refuses_what_the_running_cluster_lacks(cluster):
    """Another port than the running one's is refused, not ignored."""
    again = local_cluster("up", cluster.dir, "--control-plane-only", "--port", "1", check=False)

    assert again.returncode == 1
    assert "--port" in again.stderr


def test_kubeconfig_is_private(cluster):
    """It holds the administrator's token, so only its owner can read it."""
    assert (cluster.dir / "kubeconfig").stat().st_mode & 0o777 == 0o600


def test_everything_listens_on_loopback(cluster):
    """No process of the cluster is given an address that others can reach."""
    commands = processes_of(cluster.dir)

    assert len(commands) == 3
    assert not [c for c in commands if "0.0.0.0" in c]
    assert cluster.url.startswith("https://127.0.0.1:")


@pytest.mark.usefixtures("gates")
def test_custom_resource_is_stored(cluster, namespace):
    """An object of an applied CRD comes back."""
    cluster.apply(GATE % 3, "--namespace", namespace)

    assert cluster.get("gate", "north", "--namespace", namespace)["spec"] == {"width": 3}


@pytest.mark.usefixtures("gates")
def test_custom_resource_is_validated(cluster, namespace):
    """An object that the CRD's schema forbids is refused with the field's name."""
    with pytest.raises(AssertionError, match=r"spec\.width"):
        cluster.apply(GATE % 0, "--namespace", namespace)


def test_token_is_good_for_its_audience(cluster, namespace):
    """TokenReview says whose token it is and for which audience."""
    status = review(cluster, token_for(cluster, namespace, "forebay-epp"), "forebay-epp")

    assert status["authenticated"]
    assert status["audiences"] == ["forebay-epp"]
    assert status["user"]["username"] == f"system:serviceaccount:{namespace}:default"


def test_token_is_refused_for_another_audience(cluster, namespace):
    """A token that was made for one audience does not authenticate at another."""
    status = review(cluster, token_for(cluster, namespace, "forebay-epp"), "other-audience")

    assert not status.get("authenticated")


def test_pods_can_be_created(cluster, namespace):
    """There is no node, but pods are stored and their status can be written."""
    pod = {"containers": [{"name": "server", "image": "none"}]}
    manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "vllm-0"}, "spec": pod}

    cluster.apply(json.dumps(manifest), "--namespace", namespace)

    assert cluster.get("pod", "vllm-0", "--namespace", namespace)["status"]["phase"] == "Pending"


def test_deleted_namespace_goes(cluster):
    """The controllers remove what is in a deleted namespace, then the namespace."""
    cluster.kubectl("create", "namespace", "short-lived")
    write_note(cluster, "short-lived", "kept", "no")

    cluster.kubectl("delete", "namespace", "short-lived", "--wait=false")

    find = ("get", "namespace", "short-lived", "--ignore-not-found")
    until(lambda: not cluster.kubectl(*find).stdout, 60)


def test_audit_log_tells_who_asked(cluster, namespace):
    """With --audit every request is a line of JSON."""
    write_note(cluster, namespace, "audited", "yes")

    lines = (cluster.dir / "audit.log").read_text().splitlines()
    events = [json.loads(line) for line in lines if '"audited"' in line or namespace in line]
    posts = [e for e in events if e["verb"] == "create" and e["user"]["username"] == "admin"]
    assert any(event["objectRef"].get("resource") == "configmaps" for event in posts)


@pytest.mark.parametrize("kill", [False, True])
def test_restart_keeps_data_and_port(cluster, namespace, kill):
    """After a restart, polite or not, the same address has the same data."""
    write_note(cluster, namespace, "kept", "yes")
    before = cluster.kubeconfig.read_text()

    cluster.restart_apiserver(kill=kill)

    assert cluster.kubeconfig.read_text() == before
    assert note(cluster, namespace, "kept") == "yes"


def test_stopped_api_server_is_away(cluster):
    """Between stop and start there is no answer."""
    cluster.stop_apiserver()
    try:
        answer = cluster.kubectl("get", "--raw", "/readyz", check=False)
    finally:
        cluster.start_apiserver()

    assert answer.returncode != 0


def test_restore_goes_back(cluster, namespace, tmp_path):
    """What was written after the snapshot is gone, what was written before is there."""
    write_note(cluster, namespace, "before", "yes")
    cluster.snapshot(tmp_path / "snapshot")
    write_note(cluster, namespace, "after", "yes")

    cluster.restore(tmp_path / "snapshot")

    assert note(cluster, namespace, "before") == "yes"
    assert not note(cluster, namespace, "after")


def test_down_leaves_nothing(tmp_path, monkeypatch):
    """After `down` there is no process and no folder."""
    monkeypatch.delenv(api_server.OTHER_CLUSTER, raising=False)
    folder = tmp_path / "cluster"
    with api_server.running(folder):
        assert len(processes_of(folder)) == 2

    assert not processes_of(folder)
    assert not folder.exists()


def test_down_again_is_fine(tmp_path):
    """`down` without a cluster has nothing to do."""
    assert local_cluster("down", tmp_path / "none").returncode == 0


def test_down_removes_clusters_only(tmp_path):
    """A folder that holds something else stays."""
    (tmp_path / "thesis").write_text("years of work")

    refused = local_cluster("down", tmp_path, check=False)

    assert refused.returncode == 1
    assert (tmp_path / "thesis").exists()


def test_down_spares_whoever_has_an_old_process_id(tmp_path):
    """A process with a recorded id but another start time is not ours."""
    (tmp_path / "cluster").mkdir()
    with subprocess.Popen(["sleep", "600"]) as bystander:
        processes = {"etcd": {"pid": bystander.pid, "start_ticks": 1}}
        state = tmp_path / "cluster" / "state.json"
        state.write_text(json.dumps({"options": {}, "processes": processes}))

        local_cluster("down", tmp_path / "cluster")

        assert bystander.poll() is None
        bystander.kill()
    assert not state.exists()


def test_missing_etcd_is_named(tmp_path):
    """Without etcd, `up` says what to install."""
    refused = subprocess.run(
        [sys.executable, api_server.PROGRAM, "up", "--control-plane-only", "--dir", tmp_path],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert refused.returncode == 1
    assert "etcd-server" in refused.stderr


def test_two_starts_at_once_choose_other_ports(tmp_path):
    """Also before either listens: a program that has chosen a port keeps others from it."""
    choose = (
        f"import random, sys; sys.path.insert(0, {str(api_server.PROGRAM.parent)!r});"
        "from cluster.processes import free_port;"
        "random.seed(1); print(free_port(), flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-P", "-c", choose]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": tmp_path}
    with subprocess.Popen(command, **pipes) as first:
        port = first.stdout.readline()
        with subprocess.Popen(command, **pipes) as second:
            assert second.communicate()[0] != port
        first.communicate()
