"""Fixtures of the chart's tests that need a Kubernetes API server."""

from __future__ import annotations

import chart
import pytest
from cluster_fixtures import cluster, namespace

__all__ = ["cluster", "namespace", "release"]


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

    def patch(self, kind: str, name: str, patch: str) -> None:
        self.cluster.kubectl(
            *("patch", kind, name, "-n", self.namespace, "--type=merge", "-p", patch)
        )


@pytest.fixture(scope="session")
def kinds(cluster):
    """The cluster after a release that has come and gone: what stays are the CRDs."""
    first = Release(cluster, "default", "first")
    first.install("--set=operator.replicas=0", "--set=crds.inference=true")
    for name in ("flowcontrolpolicies.forebay.dev", "inferencepools.inference.networking.k8s.io"):
        cluster.wait_established(name)
    cluster.wait_established("inferencemodels.inference.networking.x-k8s.io")
    first.helm("uninstall")
    return cluster


@pytest.fixture
def release(kinds, namespace):
    """A release that is not installed yet, in a namespace of its own; it ends with the test."""
    made = Release(kinds, namespace)
    yield made
    made.helm("uninstall", "--ignore-not-found")
