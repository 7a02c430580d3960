"""The list of faults names tests that exist, and no fault of the list is missing."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
FAULTS = range(1, 41)


def test_every_fault_has_a_row_and_every_test_it_names_exists():
    """A test that is renamed takes its name in the list with it."""
    table = (TESTS / "faults" / "README.md").read_text()
    rows = {
        int(number)
        for cell in re.findall(r"^\| (T.*?) \|", table, re.MULTILINE)
        for number in re.findall(r"\d+", cell)
    }
    sources = "\n".join(file.read_text() for file in TESTS.rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", table))

    assert rows == set(FAULTS)
    assert {name for name in named if f"def {name}(" not in sources} == set()
