"""Fixtures of the tests that break things."""

from __future__ import annotations

import pytest
from control_plane import Stage


@pytest.fixture
def stage(crds, namespace, tmp_path):
    """A namespace with a pool, for operators and EPPs, which end with the test."""
    stage = Stage(crds, namespace, tmp_path)
    yield stage
    stage.end()
