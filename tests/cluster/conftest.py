"""Fixtures of the tests against a real Kubernetes API server."""

from __future__ import annotations

import secrets

import api_server
import pytest

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
    name = crds.make_namespace(f"test-{secrets.token_hex(4)}")
    yield api_server.Namespace(crds, name)
    crds.leave_namespace(name)
