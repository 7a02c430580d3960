"""Tests that share a fixture run on one worker, in the versions of pytest and xdist at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parents[1] / "support"
TESTS = """
import os
import pathlib
import pytest

@pytest.mark.parametrize("number", range(6))
def test(number):
    with (pathlib.Path(__file__).parents[2] / "log").open("a") as log:
        log.write(f"{pathlib.Path(__file__).parent.name} {os.environ['PYTEST_XDIST_WORKER']}\\n")
"""


def test_a_folder_that_shares_a_fixture_runs_on_one_worker(tmp_path):
    """The end-to-end tests' two files do, while another worker runs tests of faults."""
    for file in ("e2e/test_a.py", "e2e/test_b.py", "faults/test_c.py"):
        path = tmp_path / "tests" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(TESTS)
    options = ("-p", "xdist", "-p", "worker_groups", "-n2", "--dist=loadgroup")

    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--import-mode=importlib", "tests"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(SUPPORT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    ran = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert len(ran) == 18
    assert len({worker for _, worker in ran}) == 2
    assert len({worker for folder, worker in ran if folder == "e2e"}) == 1
