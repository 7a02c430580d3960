"""operator/README.md names every reason that a condition or a problem can have."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from forebay_operator import planning, resources
from forebay_operator.status import advice, conditions

ROOT = Path(__file__).parents[2]
NO_REASONS = {
    *(
        "True",
        "False",
        "Unknown",
        "Degraded",
        "Unsupported",
    ),  # statuses, a type, a code's beginning
    *("Concurrency", "Reject", "Queue", "Adaptive"),
    *planning.PRIORITIES,
    *(kind.kind for kind in resources.KINDS),
}


@pytest.mark.parametrize("module", [advice, conditions, planning])
def test_every_reason_is_explained(module):
    """Constants that are one word in CamelCase are reasons."""
    told = set(re.findall(r"`([A-Z]\w+)`", (ROOT / "operator/README.md").read_text()))
    constants = {
        node.value
        for node in ast.walk(ast.parse(Path(module.__file__).read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    reasons = {text for text in constants if re.fullmatch(r"([A-Z][a-z]+)+", text)} - NO_REASONS

    assert len(reasons) > 3
    assert reasons - told == set()
