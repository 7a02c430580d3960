"""Fixtures of the tests against a real Kubernetes API server."""

from __future__ import annotations

import secrets

import api_server
import pytest
from cluster_fixtures import cluster, crds, namespace, node_cluster

__all__ = ["cluster", "crds", "namespace", "node_cluster", "somewhere"]


FIGURES = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def figure(pytestconfig):
    """Have a measured number shown after the tests."""
    return pytestconfig.stash.setdefault(FIGURES, []).append


def pytest_terminal_summary(terminalreporter, config):
    """Show the figures."""
    if FIGURES in config.stash:
        terminalreporter.section("figures")
        for line in config.stash[FIGURES]:
            terminalreporter.line(line)


@pytest.fixture(scope="module")
def somewhere(crds):
    """A namespace for all tests of this module; each uses names of its own."""
    name = f"test-{secrets.token_hex(4)}"
    crds.kubectl("create", "namespace", name)
    yield api_server.Namespace(crds, name)
    crds.kubectl("delete", "namespace", name, "--wait=false")
