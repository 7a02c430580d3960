"""The READMEs name every metric that is declared, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("readme", "module"),
    [
        ("epp/README.md", "epp/forebay_epp/adapters/prometheus.py"),
        ("operator/README.md", "operator/forebay_operator/metrics.py"),
    ],
)
def test_the_table_of_metrics_is_complete(readme, module):
    """Counters are listed with the _total that the page gives them."""
    table = (ROOT / readme).read_text().split("\n## Metrics", 1)[1].split("\n\n    ")[0]
    told = {name.removesuffix("_total") for name in re.findall(r"`(forebay_\w+)`", table)}

    assert told == set(re.findall(r'"(forebay_\w+)"', (ROOT / module).read_text()))
