"""Fixtures of the tests that break things."""

from __future__ import annotations

import pytest
from cluster_fixtures import cluster, crds, namespace
from control_plane import Stage

__all__ = ["cluster", "crds", "namespace"]


@pytest.fixture
def stage(crds, namespace, tmp_path):
    """A namespace with a pool, for operators and EPPs, which end with the test."""
    stage = Stage(crds, namespace, tmp_path)
    yield stage
    stage.end()
