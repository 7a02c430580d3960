"""Releases of the chart on an API server, and the processes that their pods would be.

There is no kubelet: Deployments make pods, but none runs. What a pod would run is started
here, with the flags of the Deployment and the token of the pod or its service account.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import chart
from control_plane import EPPPod, EPPProcess, Operator
from ext_proc_peer import until
from operator_account import kubeconfig_of

if TYPE_CHECKING:
    from pathlib import Path


NO_CRDS = "--set=crds.install=false"  # they are there already
WAIT_SECONDS = 60


class Release:
    """The chart as helm has installed it."""

    def __init__(self, cluster, namespace: str, name: str = chart.RELEASE) -> None:
        self.cluster, self.namespace, self.name = cluster, namespace, name

    def helm(self, command: str, *options: str, check=True):
        where = (f"--namespace={self.namespace}", f"--kubeconfig={self.cluster.kubeconfig}")
        return chart.helm(command, self.name, *options, *where, check=check)

    def install(self, *options: str) -> None:
        self.helm("install", str(chart.CHART), *options)

    def upgrade(self, *options: str) -> None:
        self.helm("upgrade", str(chart.CHART), *options)

    def get(self, kind: str, name: str) -> dict:
        return self.cluster.get(kind, name, "-n", self.namespace)


class Deployed(EPPPod):
    """A pod that the chart's Deployment has made."""

    def __init__(self, cluster, namespace: str, pool: str, name: str) -> None:
        self.account = f"{pool}-epp"
        super().__init__(cluster, namespace, name, "")

    def _create(self, app: str) -> None:
        """It is there."""


def deployed(release, pool: str) -> Deployed:
    """The EPP pod of a pool, running as far as the API server knows."""
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
        kubeconfig = kubeconfig_of(
            release.cluster, release.namespace, "forebay-operator", self.folder
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

    def epp(self, operator: Operator) -> EPPProcess:
        epp = EPPProcess(
            *(self.folder, deployed(self.release, "chat"), "chat", operator.control_port),
            *(self.ca(), f"--control-server-name={self.server}"),
        )
        self.processes.append(epp)
        until(lambda: epp.serving, WAIT_SECONDS)
        return epp
