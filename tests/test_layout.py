"""The folders: two of them have names that must never become Python packages.

`operator/` is also a module of the standard library and `epp/` is not a package of ours; an
`__init__.py` in either, or anywhere under tests/, would shadow something.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VAGUE_NAMES = {"utils", "common", "helpers", "base", "manager"}


@pytest.mark.parametrize("folder", ["operator", "epp", "hack"])
def test_source_folders_are_not_packages(folder):
    """They hold packages or programs; they are none themselves."""
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("folder", ["operator", "epp"])
def test_source_folders_hold_packages_only(folder):
    """A module beside the packages would be imported by its bare name."""
    assert not list((ROOT / folder).glob("*.py"))


def test_no_package_under_tests():
    """Tests are imported by path, so that names may repeat between folders."""
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_no_folder_of_tests_named_operator():
    """It would shadow the standard library's operator if tests/ ever came on the path."""
    assert not (ROOT / "tests" / "operator").exists()


@pytest.mark.parametrize("folder", ["operator", "epp", "hack", "tests"])
def test_names_say_what_is_inside(folder):
    """A module or folder named utils, common, helpers, base or manager gathers anything."""
    vague = [
        path
        for path in (ROOT / folder).rglob("*")
        if path.stem in VAGUE_NAMES and (path.is_dir() or path.suffix in {"", ".py"})
    ]

    assert not vague


def test_operator_at_the_root_is_the_standard_library():
    """With the checkout first on the path, `import operator` is not our folder."""
    code = "import operator, sys; sys.stdout.write(operator.__file__ + ' ' + repr(operator.add))"
    printed = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=30,
    ).stdout

    assert printed.endswith("<built-in function add>")
    assert str(ROOT) not in printed
