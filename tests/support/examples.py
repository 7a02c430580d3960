"""Manifests that are valid and ones that are not, for each reader of them.

Comments on top of an invalid one say which field an error must name, and may say the words of the
error, and that only the API server knows the rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests/examples"


@dataclass(frozen=True)
class Example:
    """One manifest; `field` is the wrong one, empty where all is valid."""

    path: Path
    manifest: dict
    field: str
    says: str
    server_only: bool

    def __str__(self) -> str:
        return f"{self.path.parent.name}/{self.path.stem}"


def _read(path: Path) -> list[Example]:
    text = path.read_text()
    notes = dict(
        line[2:].split(": ", 1)
        for line in text.splitlines()
        if line.startswith("# ") and ": " in line
    )
    valid = path.parent.name != "invalid"
    assert valid or "field" in notes, f"{path}: has no line `# field: spec...`"
    field = "" if valid else notes["field"]
    return [
        Example(path, manifest, field, notes.get("says", ""), notes.get("reader") == "API server")
        for manifest in yaml.load_all(text, yaml.CSafeLoader)
    ]


VALID = [each for path in sorted((FOLDER / "valid").glob("*.yaml")) for each in _read(path)]
INVALID = [each for path in sorted((FOLDER / "invalid").glob("*.yaml")) for each in _read(path)]
# What users are shown.
SHOWN = [each for path in sorted((ROOT / "crds/examples").rglob("*.yaml")) for each in _read(path)]
