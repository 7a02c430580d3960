"""Fixtures of the tests against a real Kubernetes API server.

tests/conftest.py imports them, so that a worker has one API server for all folders; the chart's
tests have their own, since helm brings its CRDs.
"""

from __future__ import annotations

import secrets

import api_server
import pytest


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """One cluster for all tests, with controllers and an audit log; ends with the session."""
    folder = tmp_path_factory.mktemp("cluster")
    with api_server.running(folder, "--controller-manager", "--audit") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def node_cluster(tmp_path_factory):
    """One cluster with a node for all tests that run pods, with the project's images and CRDs."""
    folder = tmp_path_factory.mktemp("node")
    with api_server.running(folder, node=True) as cluster:
        api_server.load_images(cluster)
        cluster.apply_crds()
        yield cluster


@pytest.fixture
def namespace(cluster):
    """The name of a new namespace, which is deleted after the test."""
    name = cluster.make_namespace(f"test-{secrets.token_hex(4)}")
    yield name
    cluster.leave_namespace(name)


@pytest.fixture(scope="session")
def crds(cluster):
    """The cluster with the project's CRDs."""
    cluster.apply_crds()
    return cluster
