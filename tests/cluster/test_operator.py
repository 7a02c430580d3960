"""The operator on a real API server, with real EPPs; every part is a process.

One operator for all tests, with the rights of operator/rbac and no others; a namespace per test.
"""

from __future__ import annotations

import json
import secrets
import time
from queue import Empty, Queue

import grpc
import operator_account
import pytest
import yaml
from control_plane import Authority, EPPPod, model, policy, pool, service
from ext_proc_peer import channel, until
from operator_site import (
    CRDS,
    SECONDS,
    RestartableOperator,
    Site,
    answer,
    endpoints,
    install,
    send,
    waiting,
)

from forebay_control.v1 import control_pb2 as pb
from forebay_control.v1 import control_pb2_grpc

POOLS = "inferencepools.inference.networking.k8s.io"
# What a request for an unknown model gets shows which policy is in force: 404 or 413, at once.
REJECTS = {"unmatched": {"action": "Reject"}}
SMALL = {"limits": {"maxBodyBytes": 100}}


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def operator(cluster, authority, tmp_path_factory):
    """One operator for all namespaces, with its ClusterRole."""
    install(cluster)
    folder = tmp_path_factory.mktemp("operator")
    home = cluster.make_namespace(f"home-{secrets.token_hex(4)}")
    kubeconfig = operator_account.cluster_wide(cluster, home, folder)
    operator = RestartableOperator(
        cluster, folder, authority.leaf("op"), lease_namespace=home, kubeconfig=kubeconfig
    )
    try:
        operator.until_leading()
        yield operator
        assert operator.process.stop() == 0, operator.process.log[-3000:]
        assert "Traceback" not in operator.process.log
    finally:
        operator.process.end()
        cluster.kubectl("delete", "clusterrolebinding", f"forebay-operator-{home}")
        cluster.leave_namespace(home)


@pytest.fixture(scope="module", autouse=True)
def still(cluster, operator, authority, tmp_path_factory):
    """A site on which nothing happens, and how often its status was written until it stood."""
    namespace = cluster.make_namespace(f"still-{secrets.token_hex(4)}")
    folder = tmp_path_factory.mktemp("still")
    found = Site(cluster, namespace, operator.control_port, authority.path, folder)
    found.pool()
    found.epp()
    found.apply(policy("still", "chat"))
    found.until_programmed("still")
    until(lambda: found.status("still")["pools"][0].get("queues"), SECONDS)
    yield found, written(found)
    found.end()
    cluster.leave_namespace(namespace)


@pytest.fixture
def site(cluster, namespace, operator, authority, tmp_path):
    found = Site(cluster, namespace, operator.control_port, authority.path, tmp_path)
    yield found
    found.end()


def table(site) -> dict[str, str]:
    """The row of `kubectl get fcp`, once EPPs have reported what its last columns show."""

    def lines() -> list[list[str]]:
        printed = site.cluster.kubectl("get", "fcp", "-n", site.namespace).stdout
        return [line.split() for line in printed.splitlines()]

    until(lambda: len({len(line) for line in lines()}) == 1, SECONDS)
    header, row = lines()
    return dict(zip(header, row, strict=True))


# --- what people apply


def test_kubectl_apply_changes_what_running_epps_do(site):
    """The quickstart's YAML, then an edit of it: an unknown model's request waits, then is 404."""
    site.apply(service())
    for name in ("pool", "models", "policy"):
        file = CRDS / "examples" / "quickstart" / f"{name}.yaml"
        site.cluster.kubectl("apply", "-n", site.namespace, "-f", str(file))
    site.apply(pool("chat"))
    epps = site.epps(2)
    site.until_programmed("chat")
    with channel(f"127.0.0.1:{epps[0].grpc}") as open_channel:
        _kept = send(open_channel)
        until(lambda: waiting(epps[0]) == {"Critical": 0, "Standard": 1, "Sheddable": 0}, SECONDS)

    site.cluster.kubectl(
        *("patch", "fcp", "chat", "-n", site.namespace, "--type=merge"),
        *("-p", json.dumps({"spec": REJECTS})),
    )

    site.until_programmed("chat")
    assert [answer(epp) for epp in epps] == [404, 404]
    row = table(site)
    assert (row["ACCEPTED"], row["PROGRAMMED"], row["EPPS"]) == ("True", "True", "2/2")
    found = site.object("chat")
    assert found["status"]["programmedGeneration"] == found["metadata"]["generation"] == 2
    for name in ("chat", "summary", "batch"):
        site.until(name, "Programmed", "True", "Programmed", "inferencemodel")
        assert site.condition(name, "Accepted", "inferencemodel") == ("True", "Accepted")


def test_the_oldest_of_two_policies_counts_until_it_is_deleted(site):
    """The younger one's status names it; that it has the smaller name does not matter."""
    site.pool()
    epp = site.epp()
    site.apply(policy("z-old", "chat", **SMALL))
    made_at = int(time.time())
    until(lambda: time.time() >= made_at + 2, SECONDS)  # ages are in whole seconds
    site.apply(policy("a-young", "chat", **REJECTS))

    site.until("a-young", "Accepted", "False", "Conflicted")
    site.until_programmed("z-old")
    assert "z-old" in site.message("a-young", "Accepted")
    assert site.condition("a-young", "Programmed") == ("False", "Conflicted")
    assert answer(epp) == 413
    (ancestor,) = site.status("a-young")["ancestors"]
    assert ancestor["ancestorRef"]["name"] == "chat"
    assert ancestor["controllerName"] == "forebay.dev/forebay"
    assert [(c["type"], c["status"], c["reason"]) for c in ancestor["conditions"]] == [
        ("Accepted", "False", "Conflicted"),
        ("ResolvedRefs", "True", "ResolvedRefs"),
        ("Programmed", "False", "Conflicted"),
        ("Degraded", "False", "AsExpected"),
    ]

    site.delete("fcp", "z-old")

    site.until_programmed("a-young")
    assert site.condition("a-young", "Accepted") == ("True", "Accepted")
    assert answer(epp) == 404
    (ancestor,) = site.status("a-young")["ancestors"]
    assert ancestor["conditions"][0]["status"] == "True"


def test_a_pool_may_come_later_and_go(site):
    """Its EPPs keep what they run when it goes, and the status says that it is not there."""
    site.apply(policy("p", "chat", **REJECTS), service())
    site.until("p", "ResolvedRefs", "False", "TargetNotFound")
    site.until("p", "Programmed", "False", "TargetNotFound")
    assert "chat" in site.message("p", "ResolvedRefs")
    assert site.condition("p", "Accepted") == ("False", "TargetNotFound")

    site.pool()
    epp = site.epp()
    site.until_programmed("p")
    site.until("p", "ResolvedRefs", "True", "ResolvedRefs")

    site.delete(POOLS, "chat")

    site.until("p", "ResolvedRefs", "False", "TargetNotFound")
    assert answer(epp) == 404

    site.pool()
    site.until_programmed("p")


def test_deleting_all_policies_is_honoured(site):
    """A watch that says so is no accident of a LIST: the pool gets the defaults."""
    site.pool()
    epp = site.epp()
    site.apply(policy("p", "chat", **REJECTS))
    site.until_programmed("p")
    before = epp.version

    site.delete("fcp")

    until(lambda: (epp.version or before) > before, SECONDS)
    with channel(f"127.0.0.1:{epp.grpc}") as open_channel:
        _kept = send(open_channel)
        until(lambda: waiting(epp)["Standard"] == 1, SECONDS)


def test_a_model_name_belongs_to_the_oldest_model(site):
    """The other one says so, and counts when the oldest goes."""
    site.pool()
    epp = site.epp()
    kind = "inferencemodel"
    site.apply(model("a", "chat", "llama", "Critical"), model("b", "chat", "llama", "Sheddable"))
    site.until("b", "Accepted", "False", "ModelNameInUse", kind)
    site.until("a", "Programmed", "True", "Programmed", kind)
    assert "InferenceModel a" in site.message("b", "Accepted", kind)
    assert site.condition("b", "Programmed", kind) == ("False", "ModelNameInUse")

    site.delete(kind, "a")

    site.until("b", "Programmed", "True", "Programmed", kind)
    assert site.condition("b", "Accepted", kind) == ("True", "Accepted")
    with channel(f"127.0.0.1:{epp.grpc}") as open_channel:
        _kept = send(open_channel, b'{"model": "llama"}')
        until(lambda: waiting(epp)["Sheddable"] == 1, SECONDS)


@pytest.mark.parametrize("group", ["inference.networking.x-k8s.io", "llm-d.ai"])
def test_an_objective_decides_the_band_where_the_policy_trusts_the_header(site, group):
    """Its priority is below that of Standard, so the band is Sheddable; without trust Standard.

    Its status says which of the two it is.
    """
    site.pool()
    epp = site.epp()
    objectives = f"inferenceobjectives.{group}"
    objective = {
        "apiVersion": f"{group}/v1alpha2",
        "kind": "InferenceObjective",
        "metadata": {"name": "night"},
        "spec": {"priority": -5, "poolRef": {"name": "chat"}},
    }
    site.apply(policy("p", "chat", trustedHeaders=["Objective"]), objective)
    site.until_programmed("p")
    header = {"x-gateway-inference-objective": "night"}
    with channel(f"127.0.0.1:{epp.grpc}") as open_channel:
        _kept = [send(open_channel, **header)]
        until(lambda: waiting(epp)["Sheddable"] == 1, SECONDS)
        site.until("night", "Accepted", "True", "Accepted", objectives)
        assert "band Sheddable" in site.message("night", "Accepted", objectives)

        site.apply(policy("p", "chat", trustedHeaders=[]))
        site.until_programmed("p")
        until(lambda: "no request" in site.message("night", "Accepted", objectives), SECONDS)
        _kept.append(send(open_channel, **header))
        until(lambda: waiting(epp)["Standard"] == 1, SECONDS)


# --- what the schema cannot catch


@pytest.fixture
def loose_schema(cluster):
    """The CRD as an older release might have had it: any spec is stored."""
    name = "flowcontrolpolicies.forebay.dev"
    crd = yaml.safe_load((CRDS / "forebay.dev_flowcontrolpolicies.yaml").read_text())
    properties = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    properties["spec"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    trial = json.dumps(policy("trial", "chat", limits={"maxRequests": 0}))

    def loose() -> bool:
        command = ("create", "--dry-run=server", "-f", "-")
        return cluster.kubectl(*command, input=trial, check=False).returncode == 0

    cluster.apply(yaml.safe_dump(crd), "--force-conflicts")
    until(loose, SECONDS)
    yield
    install(cluster, name)
    until(lambda: not loose(), SECONDS)


@pytest.mark.usefixtures("loose_schema")
def test_an_invalid_generation_leaves_the_last_valid_one_in_force(site, operator):
    """Also over a restart of the operator, which has never seen that one; then it is fixed."""
    site.pool()
    site.apply(pool("other", service="epp-other"), service("epp-other"))
    epp, other = site.epp(), site.epp(pool="other", app="epp-other")
    site.apply(policy("p", "chat", **SMALL), policy("q", "other", **SMALL))
    site.until_programmed("p")
    site.until_programmed("q")

    site.apply(policy("p", "chat", limits={"maxRequests": 0}), policy("q", "other", **REJECTS))

    site.until("p", "Accepted", "False", "Invalid")
    site.until_programmed("q")
    assert answer(other) == 404
    assert "spec.limits.maxRequests" in site.message("p", "Accepted")
    assert "Generation 1" in site.message("p", "Accepted")
    assert site.condition("p", "Programmed") == ("False", "Invalid")
    assert site.condition("p", "Degraded") == ("True", "LastValidInForce")
    found = site.object("p")
    assert (found["status"]["programmedGeneration"], found["metadata"]["generation"]) == (1, 2)
    site.apply(model("m", "chat", "llama"))
    site.until("m", "Programmed", "True", "Programmed", "inferencemodel")
    assert answer(epp) == 413

    operator.restart()

    site.until("p", "Degraded", "True", "PlanHeld")
    site.until("m", "Programmed", "Unknown", "PlanHeld", "inferencemodel")
    site.server("server", "10.0.0.7")
    until(lambda: endpoints(epp) == ["10.0.0.7:8000"], SECONDS)  # not everything is held
    site.until_programmed("q")
    assert answer(epp) == 413

    site.apply(policy("p", "chat", **REJECTS))

    site.until_programmed("p")
    site.until("m", "Programmed", "True", "Programmed", "inferencemodel")
    assert answer(epp) == 404
    assert site.condition("p", "Degraded") == ("False", "AsExpected")


# --- pods


def test_endpoints_and_epps_come_and_go(site):
    """What is ready is an endpoint; the counts follow the pods behind the Service."""
    site.pool()
    site.apply(policy("p", "chat"))
    site.until("p", "Programmed", "False", "NoEndpointPickers")
    first = site.epp()
    site.until_programmed("p")
    a, b = site.server("a", "10.0.0.1"), site.server("b", "10.0.0.2")
    until(lambda: endpoints(first) == ["10.0.0.1:8000", "10.0.0.2:8000"], SECONDS)
    a.run("10.0.0.1", ready=False)
    until(lambda: endpoints(first) == ["10.0.0.2:8000"], SECONDS)
    b.delete()
    until(lambda: endpoints(first) == [], SECONDS)

    second = site.epp()
    until(lambda: site.status("p")["endpointPickers"]["ready"] == "2/2", SECONDS)
    second.freeze()
    site.until("p", "Programmed", "False", "Stale")
    assert site.message("p", "Programmed").startswith("no connection from epp-1;")
    counts = site.status("p")["endpointPickers"]
    assert {name: counts[name] for name in ("desired", "stale", "rejected")} == {
        "desired": 2,
        "stale": 1,
        "rejected": 0,
    }
    second.thaw()
    site.until("p", "Programmed", "True", "Programmed")

    second.kill()
    site.pods[1].delete()
    until(lambda: site.status("p")["endpointPickers"]["ready"] == "1/1", SECONDS)
    site.until("p", "Programmed", "True", "Programmed")


class RefusingEPP:
    """A bare client of the control channel with a real pod's token, which refuses what it gets.

    It stands for an EPP of another release: ours refuses nothing that the operator makes.
    """

    def __init__(self, site, operator, authority, pod) -> None:
        credentials = grpc.ssl_channel_credentials(authority.path.read_bytes())
        options = [("grpc.ssl_target_name_override", "forebay-operator")]
        address = f"127.0.0.1:{operator.control_port}"
        self._channel = grpc.secure_channel(address, credentials, options)
        self._metadata = [("authorization", f"Bearer {pod.token()}")]
        self._hello = pb.Hello(
            protocol=1,
            pool=f"{site.namespace}/chat",
            pod_namespace=site.namespace,
            pod_name=pod.name,
            pod_uid=pod.uid,
        )
        until(self._dialled, SECONDS)

    def _dialled(self) -> bool:
        """Whether the operator knows the pod by now, and takes its stream."""
        self._outgoing = Queue()
        self._outgoing.put(pb.FromPicker(hello=self._hello))
        stub = control_pb2_grpc.ControlStub(self._channel)
        self._call = stub.Connect(self._sent(self._outgoing), metadata=self._metadata)
        try:
            self._first = self._next()
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return False
        return True

    def _sent(self, outgoing):
        while True:
            try:
                message = outgoing.get(timeout=5)
            except Empty:  # as an EPP does, which would be cut off after 30 s of silence
                message = pb.FromPicker(stats=pb.Stats())
            if message is None:
                return
            yield message

    def _next(self) -> pb.Program:
        return next(m.program for m in self._call if m.WhichOneof("message") == "program")

    def program(self) -> pb.Program:
        first, self._first = self._first, None
        return first or self._next()

    def other_program(self, refused: pb.Program, path: str, why: str) -> pb.Program:
        """Return the next program that is another, and go on refusing this one until then."""
        while (program := self.program()).sha256 == refused.sha256:
            self.refuse(program, path, why)
        return program

    def refuse(self, program: pb.Program, path: str, why: str) -> None:
        nack = pb.Nack(nonce=program.nonce, version=program.version, code="Invalid")
        nack.errors.add(path=path, message=why)
        self._outgoing.put(pb.FromPicker(nack=nack))

    def accept(self, program: pb.Program) -> None:
        ack = pb.Ack(nonce=program.nonce, version=program.version, sha256=program.sha256)
        self._outgoing.put(pb.FromPicker(ack=ack))

    def close(self) -> None:
        self._outgoing.put(None)
        self._channel.close()


def test_an_epp_that_refuses_is_named(site, operator, authority):
    """With its words; the others run the new program; one that it accepts corrects the status."""
    site.pool()
    site.apply(policy("p", "chat"))
    site.epp()
    site.until_programmed("p")
    pod = EPPPod(site.cluster, site.namespace, "old-release", "epp")
    refusing = RefusingEPP(site, operator, authority, pod)
    try:
        program = refusing.program()
        refusal = ("plan.bands[0].ordering", "is not known here")
        refusing.refuse(program, *refusal)

        site.until("p", "Programmed", "False", "Rejected")
        message = site.message("p", "Programmed")
        assert "old-release: Invalid: plan.bands[0].ordering: is not known here" in message
        assert message.startswith("1 of 2 EPPs refuse")
        assert site.condition("p", "Degraded") == ("True", "EndpointPickersReject")
        until(lambda: site.status("p")["endpointPickers"]["ready"] == "1/2", SECONDS)
        counts = site.status("p")["endpointPickers"]
        assert (counts["connected"], counts["rejected"], counts["stale"]) == (2, 1, 0)

        site.apply(policy("p", "chat", **REJECTS))
        refusing.accept(refusing.other_program(program, *refusal))

        site.until("p", "Programmed", "True", "Programmed")
        assert site.status("p")["endpointPickers"]["ready"] == "2/2"
    finally:
        refusing.close()


# --- what is written


def test_only_statuses_are_written_and_only_their_own_parts(site):
    """No annotation, no finalizer, and another writer's condition on the same object survives."""
    site.pool()
    site.epp()
    site.apply(policy("p", "chat"), model("m", "chat", "llama"))
    site.until_programmed("p")
    foreign = {
        "type": "Checked",
        "status": "True",
        "reason": "ByPeople",
        "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    site.cluster.kubectl(
        *("apply", "--server-side", "--subresource=status", "--field-manager=people"),
        *("-n", site.namespace, "-f", "-"),
        input=json.dumps(
            {
                "apiVersion": "forebay.dev/v1alpha1",
                "kind": "FlowControlPolicy",
                "metadata": {"name": "p"},
                "status": {"conditions": [foreign]},
            }
        ),
    )
    site.apply(policy("p", "chat", **REJECTS))
    site.until_programmed("p")
    assert site.condition("p", "Checked") == ("True", "ByPeople")

    for kind, name in (("fcp", "p"), ("inferencemodel", "m"), (POOLS, "chat")):
        command = ("get", kind, name, "-n", site.namespace, "-o", "json", "--show-managed-fields")
        metadata = json.loads(site.cluster.kubectl(*command).stdout)["metadata"]
        ours = [f for f in metadata["managedFields"] if f["manager"] == "forebay-operator-forebay"]
        assert [f["subresource"] for f in ours] == ([] if kind == POOLS else ["status"]), kind
        assert all(list(f["fieldsV1"]) == ["f:status"] for f in ours)
        assert "finalizers" not in metadata
        assert "annotations" not in metadata
    assert (
        "annotations"
        not in site.pods[0].cluster.get("pod", site.pods[0].name, "-n", site.namespace)["metadata"]
    )


def events(site, name: str) -> list[tuple[str, str]]:
    """(reason, first word of the message) of the Events about a policy."""
    found = site.cluster.get(
        "events", "-n", site.namespace, "--field-selector", f"involvedObject.name={name}"
    )
    return sorted((e["reason"], e["message"].partition(":")[0]) for e in found["items"])


def test_events_tell_of_transitions_only(site):
    """Edits that succeed are none."""
    site.pool()
    site.epp()
    site.server("server", "10.0.0.1")
    site.apply(policy("p", "chat"))
    site.until_programmed("p")
    first = [("Accepted", "Accepted=True"), ("Programmed", "Programmed=True")]
    until(lambda: events(site, "p")[:2] == first, SECONDS)
    for ttl in ("1s", "2s", "3s", "4s"):
        site.apply(policy("p", "chat", noEndpoints={"ttl": ttl}))
        site.until_programmed("p")
    site.delete(POOLS, "chat")
    site.until("p", "ResolvedRefs", "False", "TargetNotFound")
    gone = [("TargetNotFound", "Accepted=False")]  # what only repeats it has no Event
    until(lambda: events(site, "p") == first + gone, SECONDS)


def test_nothing_is_written_about_what_stands_still(site, still):
    """For 35 s, while numbers that move all the time are written at most every 30 s.

    Of what has stood still since the first test nothing was written either, although the operator
    has been started again meanwhile. Where the machine is so busy that its EPP was silent for 30 s,
    that is news, and so is its return.
    """
    unchanged, first_writes = still
    site.pool()
    epp = site.epp()
    site.apply(policy("p", "chat"))
    site.until_programmed("p")
    before = written(site)
    began_at = time.monotonic()
    streams = []
    with channel(f"127.0.0.1:{epp.grpc}") as open_channel:

        def one_more_each_second() -> bool:
            if time.monotonic() - began_at >= len(streams):
                streams.append(send(open_channel))
            return time.monotonic() - began_at > 35

        until(one_more_each_second, SECONDS)
        assert len(streams) > 30
        assert 1 <= written(site) - before <= 2
        assert site.status("p")["queued"] > 0
    silences = sum("Stale" in reason for reason, _ in events(unchanged, "still"))
    assert written(unchanged) <= first_writes + 2 * silences


def test_endpoint_pickers_that_come_and_go_write_nothing_into_models(site):
    """Not one write for any of 20 models; an edit of one is written for that one."""
    site.pool()
    site.epp()
    names = [f"m-{number}" for number in range(20)]
    site.apply(policy("p", "chat"), *(model(name, "chat", name) for name in names))
    for name in names:
        site.until(name, "Programmed", "True", "Programmed", "inferencemodel")
    before = len(writes(site, "inferencemodels"))
    assert before >= len(names)

    second = site.epp()
    until(lambda: site.status("p")["endpointPickers"]["ready"] == "2/2", SECONDS)
    second.kill()
    site.pods[1].delete()
    until(lambda: site.status("p")["endpointPickers"]["ready"] == "1/1", SECONDS)
    site.apply(model("m-0", "chat", "m-0", "Critical"))

    until(lambda: len(writes(site, "inferencemodels")) > before, SECONDS)
    assert set(writes(site, "inferencemodels")[before:]) == {"m-0"}


def written(site) -> int:
    """How often statuses of policies were written."""
    return len(writes(site, "flowcontrolpolicies"))


def writes(site, plural: str) -> list[str]:
    """The object of each status that was written, by the API server's audit log."""
    return [
        entry["objectRef"]["name"]
        for entry in map(json.loads, (site.cluster.dir / "audit.log").read_text().splitlines())
        if entry["verb"] == "patch"
        and "objectRef" in entry
        and entry["objectRef"].get("subresource") == "status"
        and entry["objectRef"].get("resource") == plural
        and entry["objectRef"].get("namespace") == site.namespace
    ]
