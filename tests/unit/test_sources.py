"""A folder of manifests as editors, mistakes and mischief leave it."""

from __future__ import annotations

import asyncio
import os
from contextlib import aclosing

import pytest

from forebay_operator.standalone import sources

POOL = """
apiVersion: inference.networking.k8s.io/v1
kind: InferencePool
metadata: {name: chat}
spec: {selector: {matchLabels: {app: vllm}}, targetPorts: [{number: 8000}]}
"""
SECONDS = 10


def errors(folder, text: str) -> str:
    (folder / "a.yaml").write_text(text)
    return "\n".join(sources.read(folder).errors)


def test_a_key_that_is_there_twice_is_an_error(tmp_path):
    """The last one would win silently, and kubectl refuses it too."""
    found = errors(tmp_path, f"{POOL}\nspec: {{}}\n")

    assert "key 'spec' is duplicated" in found
    assert 'a.yaml", line 7' in found


def test_a_merge_may_bring_a_key_again(tmp_path):
    """That is what YAML's merge is for, also of what was merged itself."""
    merged = """
x: &a {name: a, namespace: one}
y: &b {<<: *a, name: b}
apiVersion: inference.networking.k8s.io/v1
kind: InferencePool
metadata: {<<: *b, name: chat}
spec: {selector: {matchLabels: {app: vllm}}, targetPorts: [{number: 8000}]}
"""

    assert errors(tmp_path, merged) == ""
    (pool,) = sources.read(tmp_path).resources
    assert (pool.metadata.namespace, pool.metadata.name) == ("one", "chat")


def test_an_object_that_is_there_twice_is_an_error(tmp_path):
    """Both places are named."""
    (tmp_path / "b.yaml").write_text(POOL)

    found = errors(tmp_path, POOL)

    assert found == (
        f"{tmp_path}/b.yaml (document 1, InferencePool chat): "
        f"is also in {tmp_path}/a.yaml (document 1, InferencePool chat)"
    )


def test_an_empty_file_is_an_error(tmp_path):
    """It may be one that is just being written; its objects are not taken as deleted."""
    assert errors(tmp_path, "") == f"{tmp_path}/a.yaml: is empty"


def test_a_file_of_comments_is_none(tmp_path):
    """Commenting out is a way to delete."""
    (tmp_path / "b.yaml").write_text(POOL)

    assert errors(tmp_path, "# kind: InferencePool\n") == ""


@pytest.mark.parametrize(
    "text", ["[" * 50_000, "{a: " * 50_000 + "}" * 50_000, "- " * 50_000 + "a"], ids=len
)
def test_deep_nesting_is_an_error(tmp_path, text):
    """Neither a crash nor a traceback."""
    assert "a.yaml: " in errors(tmp_path, text)


def test_aliases_that_multiply_stay_small(tmp_path):
    """Nine levels of nine: four hundred million entries if they were expanded."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 9)]
    spec = "apiVersion: forebay.dev/v1alpha1\nkind: FlowControlPolicy\nmetadata: {name: x}"

    found = errors(tmp_path, "\n".join([*lines, spec, "spec: {targetRefs: *a8, bands: *a8}"]))

    assert "spec.targetRefs[0]: must be an object, not a list" in found
    assert len(found) < 5000


def test_what_a_terminal_would_obey_is_escaped(tmp_path):
    """An error line cannot clear the screen, and can be encoded."""
    found = errors(tmp_path, POOL.replace("name: chat", r'name: "\e[2J\ud800"') + "---\n- 1\n")

    assert r"\x1b[2J\ud800" in found
    assert found.replace("\n", "").isprintable()


def test_what_editors_leave_is_not_read(tmp_path):
    """Lock files of Emacs are links that lead nowhere."""
    (tmp_path / "a.yaml").write_text(POOL)
    (tmp_path / ".#a.yaml").symlink_to("user@host")
    (tmp_path / "a.yaml~").write_text("{")
    (tmp_path / ".a.yaml.swp").write_text("{")

    assert sources.read(tmp_path).errors == ()


def test_a_link_that_leads_nowhere_is_an_error(tmp_path):
    """With the file's name and the reason."""
    (tmp_path / "a.yaml").symlink_to("nowhere")

    assert sources.read(tmp_path).errors == (f"{tmp_path}/a.yaml: No such file or directory",)


async def test_a_file_emptied_and_then_written_is_seen_whole(tmp_path):
    """As many editors save; at the latest the next look has the whole content."""
    (tmp_path / "a.yaml").write_text(POOL)
    async with asyncio.timeout(SECONDS), aclosing(sources.changes(tmp_path)) as changes:
        await anext(changes)
        with (tmp_path / "a.yaml").open("w") as file:
            file.write(POOL.replace("8000", "9000"))
            file.flush()

            while (seen := await anext(changes)).errors:
                pass

    assert seen.resources[0].ports == (9000,)


async def test_a_folder_that_is_replaced_is_followed(tmp_path):
    """A checkout or a mounted ConfigMap changes as a whole."""
    folder = tmp_path / "now"
    folder.mkdir()
    (folder / "a.yaml").write_text(POOL)
    async with asyncio.timeout(SECONDS), aclosing(sources.changes(folder)) as changes:
        await anext(changes)
        folder.rename(tmp_path / "before")
        new = tmp_path / "new"
        new.mkdir()
        (new / "a.yaml").write_text(POOL.replace("8000", "9000"))
        new.rename(folder)

        while (seen := await anext(changes)).errors:
            pass

    assert seen.resources[0].ports == (9000,)


async def test_a_touched_file_is_not_a_change_of_names(tmp_path):
    """A new time is a reason to read again; what is read is the same."""
    (tmp_path / "a.yaml").write_text(POOL)
    async with asyncio.timeout(SECONDS), aclosing(sources.changes(tmp_path)) as changes:
        first = await anext(changes)
        os.utime(tmp_path / "a.yaml", (1, 1))
        second = await anext(changes)

    assert first == second
