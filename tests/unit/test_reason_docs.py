"""operator/README.md names every reason that a condition or a problem can have."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import get_args

import pytest

from forebay_control.plan import DEFAULT_BANDS, Between, FairnessName
from forebay_operator import planning, resources
from forebay_operator.resources.policy import FairnessCost, TrustedHeader
from forebay_operator.status import advice, conditions, verdicts

ROOT = Path(__file__).parents[2]
NO_REASONS = {
    *(
        "True",
        "False",
        "Unknown",
        "Degraded",
        "Unsupported",
    ),  # statuses, a type, a code's beginning
    *(str(word) for word in get_args(TrustedHeader) + get_args(FairnessCost)),
    *FairnessName,
    *Between,
    *("Concurrency", "Reject", "Queue", "Adaptive"),
    *planning.__all__,
    "DataclassInstance",  # a type that is known to the type checker only
    *(band.name for band in DEFAULT_BANDS),
    *(kind.kind for kind in resources.KINDS),
}


@pytest.mark.parametrize(
    "sources",
    [
        pytest.param([Path(advice.__file__)], id="advice"),
        pytest.param([Path(conditions.__file__), Path(verdicts.__file__)], id="conditions"),
        pytest.param(Path(planning.__file__).parent.glob("*.py"), id="planning"),
    ],
)
def test_every_reason_is_explained(sources):
    """Constants that are one word in CamelCase are reasons."""
    told = set(re.findall(r"`([A-Z]\w+)`", (ROOT / "operator/README.md").read_text()))
    constants = {
        node.value
        for source in sources
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    reasons = {text for text in constants if re.fullmatch(r"([A-Z][a-z]+)+", text)} - NO_REASONS

    assert len(reasons) > 3
    assert reasons - told == set()
