"""Settings of all tests."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parent

# A job in a shell's background ignores Ctrl-C, and so would the programs that tests send it to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No test measures time, so no example has a deadline. The gate must not depend on luck: there every
# run tries the same examples; elsewhere each run tries new ones.
settings.register_profile("forebay", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("forebay")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """With pytest-xdist's `--dist loadgroup`, keep together what shares a fixture.

    That is a file, or the folder of end-to-end tests, which share an installation. Each fault
    has its own processes, so these tests may run side by side.
    """
    for item in items:
        path = item.path.relative_to(ROOT)
        if "e2e" in path.parts:
            group = "e2e"
        elif path.parts[0] == "faults":
            group = f"{path.stem}::{item.name}"
        else:
            group = path.stem
        item.add_marker(pytest.mark.xdist_group(group))
