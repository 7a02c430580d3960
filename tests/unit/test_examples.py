"""The examples as our own readers see them; tests/cluster asks the API server the same."""

from __future__ import annotations

from types import SimpleNamespace

import examples
import pytest
from manifest_reading import resource_of

from forebay_cli import check
from forebay_operator import resources


@pytest.mark.parametrize("example", [*examples.VALID, *examples.SHOWN], ids=str)
def test_a_valid_example_is_read(example):
    """It becomes a resource."""
    assert resource_of(example.manifest).metadata.name == example.manifest["metadata"]["name"]


@pytest.mark.parametrize(
    "example", [each for each in examples.INVALID if not each.server_only], ids=str
)
def test_an_invalid_example_is_refused_at_its_field(example):
    """The error names the field and nothing else, and says what the file says."""
    with pytest.raises(resources.ResourceError) as error:
        resource_of(example.manifest)

    assert [path for path, _ in error.value.problems] == [example.field]
    assert example.says in error.value.problems[0][1]


@pytest.mark.parametrize(
    "example", [each for each in examples.INVALID if each.server_only], ids=str
)
def test_what_is_not_used_of_a_foreign_kind_is_not_judged(example):
    """Its owner may have added a value since."""
    assert resource_of(example.manifest).metadata.name == example.manifest["metadata"]["name"]


def test_check_tells_valid_files_from_invalid_ones():
    """`forebay check` ends with 1 for each invalid one, and with 0 for the rest."""
    everything = [*examples.VALID, *examples.INVALID]

    statuses = {
        str(each): check.run(SimpleNamespace(paths=[each.path], strict=False))
        for each in everything
    }

    assert statuses == {
        str(each): int(bool(each.field) and not each.server_only) for each in everything
    }
