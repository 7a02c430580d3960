"""A Kubernetes API server for the chart's tests alone: its CRDs are those that helm brings."""

from __future__ import annotations

import pytest
from chart_release import Release, Running
from cluster_fixtures import cluster, namespace

__all__ = ["cluster", "namespace"]


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


@pytest.fixture
def running(release, tmp_path):
    made = Running(release, tmp_path)
    yield made
    for process in made.processes:
        process.end()
