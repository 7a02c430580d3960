"""What the README promises of its commands, and what they cost."""

from __future__ import annotations

import json
import re

import pytest

MAX_RESIDENT_MB = 150


def test_the_readme_ends_with_an_answer(quickstart):
    """The commands succeed where PodSecurity is restricted: policy in force, request answered."""
    _, printed = quickstart

    # The mode comes with an EPP's first report.
    row = r"^chat +chat +(Enforce +)?True +True +Programmed +1/1 "
    assert re.search(row, printed, re.MULTILINE)
    answer = json.loads(re.findall(r"^\{.*\}", printed, re.MULTILINE)[-1])
    assert answer["choices"][0]["message"]["content"]


def test_every_model_is_accepted(forebay):
    """The status of an InferenceModel says that it counts."""
    for model in forebay.get("inferencemodels")["items"]:
        conditions = {c["type"]: c["status"] for c in model["status"]["conditions"]}
        assert conditions["Accepted"] == "True"


@pytest.mark.parametrize("component", ["operator", "endpoint-picker"])
def test_a_pod_needs_little_memory(forebay, figure, component):
    """With next to no traffic its resident memory is within the bound."""
    resident_mb = forebay.resident_mb(component)
    figure(f"{component}: {resident_mb:.0f} MB resident")

    assert resident_mb <= MAX_RESIDENT_MB
