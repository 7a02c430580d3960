"""Fixtures of the tests against a real Kubernetes API server."""

from __future__ import annotations

import secrets

import api_server
import pytest
from cluster_fixtures import cluster, crds, namespace, node_cluster

__all__ = ["cluster", "crds", "namespace", "node_cluster", "somewhere"]


@pytest.fixture(scope="module")
def somewhere(crds):
    """A namespace for all tests of this module; each uses names of its own."""
    name = f"test-{secrets.token_hex(4)}"
    crds.kubectl("create", "namespace", name)
    yield api_server.Namespace(crds, name)
    crds.kubectl("delete", "namespace", name, "--wait=false")
