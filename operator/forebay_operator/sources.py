"""Where resources come from when there is no cluster: a folder of YAML files, watched.

What the resources mean does not belong here.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml
from watchfiles import awatch

from forebay_operator import resources, wording

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from forebay_operator.resources import Resource

MAX_FILE_BYTES = 1 << 20
SUFFIXES = (".yaml", ".yml")

# An editor may empty a file and then write it: the folder is read once nothing has changed for a
# step, and after a debounce at the latest. The look finds what is not notified: what was written
# before the watch began, a folder that was replaced, targets of links.
STEP_MILLISECONDS = 50
DEBOUNCE_MILLISECONDS = 400
LOOK_MILLISECONDS = 1000


@dataclass(frozen=True, slots=True)
class Manifests:
    """What a folder holds.

    `errors` make the folder as a whole unusable; `ignored` tells of objects nobody here reads.
    """

    resources: tuple[Resource, ...]
    errors: tuple[str, ...]
    ignored: tuple[str, ...]


def read(folder: Path) -> Manifests:
    """Read every manifest of a folder; problems are lines that name file, object and field."""
    try:
        files = sorted(_files(folder))
    except OSError as error:
        return Manifests((), (f"{folder}: {error.strerror}",), ())
    if not files:
        return Manifests((), (f"{folder}: holds no .yaml or .yml file",), ())
    found: dict[tuple[str, str, str], tuple[str, Resource]] = {}
    errors: list[str] = []
    ignored: list[str] = []
    for file in files:
        try:
            documents = _documents(file)
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            errors.append(f"{file}: {_one_line(error)}")
            continue
        for number, document in enumerate(documents, 1):
            where = f"{file} (document {number}, {_title(document)})"
            if not isinstance(document, dict):
                errors.append(f"{where}: is not an object with apiVersion and kind")
                continue
            try:
                resource = resources.parse(document)
            except resources.ResourceError as error:
                errors.extend(f"{where}: {path}: {what}" for path, what in error.problems)
                continue
            if resource is None:
                ignored.append(f"{where}: this kind has no effect here")
                continue
            key = (document["kind"], resource.metadata.namespace, resource.metadata.name)
            if key in found:
                errors.append(f"{where}: is also in {found[key][0]}")
            else:
                found[key] = (where, resource)
    return Manifests(
        tuple(resource for _, resource in found.values()),
        tuple(map(wording.printable, errors)),
        tuple(map(wording.printable, ignored)),
    )


async def changes(folder: Path) -> AsyncIterator[Manifests]:
    """Yield the folder's manifests, and again each time a file of it has changed.

    Raises:
        OSError: the folder cannot be watched.
    """
    seen: object = None
    async for _ in awatch(
        folder,
        debounce=DEBOUNCE_MILLISECONDS,
        step=STEP_MILLISECONDS,
        recursive=False,
        rust_timeout=LOOK_MILLISECONDS,
        yield_on_timeout=True,
    ):
        files = _fingerprint(folder)
        if files != seen:
            seen = files
            yield await asyncio.to_thread(read, folder)


def _files(folder: Path) -> list[Path]:
    """Return the folder's manifests. What begins with a dot is an editor's."""
    return [
        file
        for file in folder.iterdir()
        if file.suffix in SUFFIXES and not file.name.startswith(".")
    ]


def _fingerprint(folder: Path) -> dict[str, tuple[int, int, int]] | None:
    """Tell contents apart without reading them."""
    try:
        return {
            file.name: ((stat := file.stat()).st_ino, stat.st_mtime_ns, stat.st_size)
            for file in _files(folder)
        }
    except OSError:
        return None


def _documents(file: Path) -> list[Any]:
    size = file.stat().st_size
    if size == 0:
        raise ValueError("is empty")  # maybe it is just being written
    if size > MAX_FILE_BYTES:
        raise ValueError(f"is larger than {MAX_FILE_BYTES} bytes")
    with file.open("rb") as stream:
        documents = yaml.load_all(stream, _Loader)  # noqa: S506  # it is a SafeLoader
        return [document for document in documents if document is not None]


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which refuses a key that is there twice instead of taking the last.

    It is the one in Python: libyaml's crashes the process on deep nesting.
    """

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._checked: dict[int, yaml.MappingNode] = {}

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Check the keys as they are written, before those of a merge join them."""
        if id(node) in self._checked:
            return
        self._checked[id(node)] = node
        seen = set()
        for key, _ in node.value:
            if (name := (key.tag, str(key.value))) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} is there twice", key.start_mark
                )
            seen.add(name)
        super().flatten_mapping(node)


def _title(document: Any) -> str:
    if not isinstance(document, dict):
        return type(document).__name__
    metadata = document.get("metadata")
    names = (document.get("kind"), metadata.get("name") if isinstance(metadata, dict) else None)
    return " ".join(name if isinstance(name, str) else "?" for name in names)


def _one_line(error: BaseException) -> str:
    return error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
