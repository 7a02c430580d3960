"""Which tests share a worker of pytest-xdist with `--dist loadgroup`, and which begin.

Tests that share a fixture stay together.
"""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest
from xdist.scheduler import LoadScopeScheduling

FOLDERS = ("e2e", "installed")


def group(nodeid: str) -> str:
    """Return the group of a test.

    It is a file, or a folder whose tests share a cluster of their own. Each test of faults has
    processes of its own, so these may run side by side.
    """
    path = PurePosixPath(nodeid.partition("::")[0])
    if path.parent.name in FOLDERS:
        return str(path.parent)
    if path.parent.name == "faults":
        return nodeid
    return str(path)


def pytest_collection_modifyitems(items):
    """Begin with the largest groups; groups of one test fill what is left at the end.

    The order is ours, because pytest sorts the files below a folder that is given.
    """

    def place(item) -> int:
        folder = PurePosixPath(group(item.nodeid)).name
        if folder in FOLDERS:
            return FOLDERS.index(folder)
        return len(FOLDERS) + ("::" in group(item.nodeid))

    items.sort(key=place)


class Groups(LoadScopeScheduling):
    """Gives a group to one worker.

    It does not need xdist's marks: xdist 3.8 writes them into IDs that pytest 9.2 does not read
    back (pytest-xdist#1386), and then gives each test to any worker without a word.
    """

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Take the place of xdist's own scheduler of that name."""
    return Groups(config, log) if config.getvalue("dist") == "loadgroup" else None
