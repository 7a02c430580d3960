"""The operator with the chart's flags and no more rights than the chart gives it."""

from __future__ import annotations

from pathlib import Path

import chart
import grpc
import pytest
from chart_release import NO_CRDS, WAIT_SECONDS
from control_plane import apply, check_log, model, policy
from ext_proc_peer import until

from forebay_control.v1 import control_pb2 as pb
from forebay_control.v1 import control_pb2_grpc as rpc

ISSUED = (("secret", "forebay-control-tls"), ("configmap", "forebay-control-ca"))
FOLDER = Path(__file__).parents[1] / "values"


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
def test_the_operator_programs_epps_with_the_rights_it_has(running, watched):
    """Certificates, Lease, statuses, Events: nothing is refused, of all namespaces or of one."""
    release = running.release
    one = f"--set=operator.watchNamespaces={{{release.namespace}}}"
    release.install(
        *(f"--values={FOLDER / 'standalone.yaml'}", NO_CRDS),
        *([one] if watched == "one" else []),
    )
    operator = running.operator("operator-0")
    epp = running.epp(operator)
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
    assert epp.program()[0] == "Live"
    check_log(operator.log)
    assert "forbidden" not in operator.log.lower()
    assert operator.metric("forebay_control_certificate_expiry_timestamp_seconds") > 0


def test_what_the_operator_has_written_survives_upgrades(running):
    """Helm's, and those of a user who renders the chart and applies it: neither owns the data."""
    release = running.release
    values = f"--values={FOLDER / 'standalone.yaml'}"
    release.install(values, NO_CRDS)
    operator = running.operator("operator-0")
    running.ca()
    until(lambda: operator.epoch > 0, WAIT_SECONDS)
    before = [release.get(*name)["data"] for name in ISSUED]
    holder = release.get("lease", "forebay-operator")["spec"]["holderIdentity"]

    release.upgrade(values, NO_CRDS, "--set=epp.podLabels.changed=yes")
    text = chart.render(values, NO_CRDS, namespace=release.namespace).stdout
    release.cluster.apply(text, "--field-manager=gitops", "--force-conflicts")

    assert [release.get(*name)["data"] for name in ISSUED] == before
    assert release.get("lease", "forebay-operator")["spec"]["holderIdentity"] == holder


def test_a_replica_that_stands_by_serves_the_same_certificate(running):
    """It sends EPPs on to the leader, over TLS that the same CA has signed."""
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
