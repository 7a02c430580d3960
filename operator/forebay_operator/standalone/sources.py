"""Reads resources from YAML files, or from a watched folder of them, instead of a cluster.

What resources mean does not belong here; folder.py passes them to an operator.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError
from watchfiles import awatch

from forebay_operator import resources
from forebay_operator.resources import messages

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from pathlib import Path

    from forebay_operator.resources import Kind, Resource

MAX_FILE_BYTES = 1 << 20
SUFFIXES = (".yaml", ".yml")

# An editor may empty a file and then write it: the folder is read once nothing has changed for a
# step, and after a debounce at the latest. The look finds what is not notified: what was written
# before the watch began, a folder that was replaced, targets of links.
STEP_MILLISECONDS = 50
DEBOUNCE_MILLISECONDS = 400
LOOK_MILLISECONDS = 1000


@dataclass(frozen=True, slots=True)
class Object:
    """One object of a file. `resource` is None where it is not valid; `where` is for people."""

    kind: Kind
    namespace: str
    name: str
    manifest: dict[str, Any]
    resource: Resource | None
    file: Path
    where: str


@dataclass(frozen=True, slots=True)
class Manifests:
    """What files hold.

    Attributes:
        objects: of the kinds that are read, as far as they are distinct.
        errors: lines that name file, object and field.
        ignored: lines about objects that are not read.
        unread: files of which not every object is among `objects`.
    """

    objects: tuple[Object, ...]
    errors: tuple[str, ...]
    ignored: tuple[str, ...]
    unread: frozenset[Path]

    @property
    def resources(self) -> tuple[Resource, ...]:
        """What is valid."""
        return tuple(entry.resource for entry in self.objects if entry.resource is not None)


def read(*paths: Path) -> Manifests:
    """Read files, and every manifest of folders."""
    reading = _Reading()
    for path in paths:
        if path.is_file():
            reading.file(path)
            continue
        try:
            files = sorted(_files(path))
        except OSError as error:
            what = "not a folder or file that can be read"
            reading.fail(path, f"{path}: is {what}: {error.strerror}")
            continue
        if not files:
            reading.fail(path, f"{path}: holds no .yaml file")
        for file in files:
            reading.file(file)
    return Manifests(
        tuple(reading.found.values()),
        tuple(map(messages.printable, reading.errors)),
        tuple(map(messages.printable, reading.ignored)),
        frozenset(reading.unread),
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


class _Reading:
    """What has been read so far; `found` holds objects by kind, namespace and name."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str, str], Object] = {}
        self.errors: list[str] = []
        self.ignored: list[str] = []
        self.unread: set[Path] = set()

    def fail(self, file: Path, error: str) -> None:
        self.errors.append(error)
        self.unread.add(file)

    def file(self, file: Path) -> None:
        try:
            documents = _documents(file)
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            text = (isinstance(error, OSError) and error.strerror) or str(error)
            self.fail(file, f"{file}: {' '.join(text.split())}")
            return
        for number, document in enumerate(_items(documents), 1):
            self._document(file, f"{file} (document {number}, {_title(document)})", document)

    def _document(self, file: Path, where: str, document: Any) -> None:
        if not isinstance(document, dict):
            self.fail(file, f"{where}: is not an object with apiVersion and kind")
            return
        kind = resources.kind_of(document)
        if kind is None:
            self.ignored.append(f"{where}: this kind has no effect here")
            return
        resource = None
        try:
            resource = resources.read(kind, document)
        except resources.ResourceError as error:
            self.errors.extend(f"{where}: {path}: {what}" for path, what in error.problems)
        try:
            metadata = resources.Metadata.model_validate(document.get("metadata"))
        except ValidationError:
            self.unread.add(file)
            return
        key = (kind.kind, metadata.namespace, metadata.name)
        if key in self.found:
            self.fail(file, f"{where}: is also in {self.found[key].where}")
            return
        self.found[key] = Object(
            kind, metadata.namespace, metadata.name, document, resource, file, where
        )


def _items(documents: Iterable[Any]) -> list[Any]:
    """Take lists apart, as kubectl does."""
    found: list[Any] = []
    for document in documents:
        items = document.get("items") if isinstance(document, dict) else None
        if isinstance(items, list) and document.get("kind") == "List":
            found += items
        else:
            found.append(document)
    return found


def _files(folder: Path) -> list[Path]:
    """Return the folder's manifests. What begins with a dot is an editor's."""
    return [
        file
        for file in folder.iterdir()
        if file.suffix in SUFFIXES and not file.name.startswith(".")
    ]


def _fingerprint(folder: Path) -> dict[Path, tuple[int, int, int]]:
    """Return a fingerprint of the contents."""
    found = {}
    with suppress(OSError):  # a folder that is gone is empty
        for file in _files(folder):
            with suppress(OSError):  # a link that leads nowhere
                stat = file.stat()
                found[file] = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
    return found


def _documents(file: Path) -> list[Any]:
    size = file.stat().st_size
    if size == 0:
        raise ValueError("is empty")  # maybe it is just being written
    if size > MAX_FILE_BYTES:
        raise ValueError(f"is larger than {MAX_FILE_BYTES} bytes")
    with file.open("rb") as stream:
        documents = yaml.load_all(stream, _Loader)
        return [document for document in documents if document is not None]


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which refuses a duplicate key instead of taking the last.

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
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (name := (key.tag, key.value)) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} is duplicated", key.start_mark
                )
            seen.add(name)
        super().flatten_mapping(node)


def _title(document: Any) -> str:
    if not isinstance(document, dict):
        return type(document).__name__
    metadata = document.get("metadata")
    names = (document.get("kind"), metadata.get("name") if isinstance(metadata, dict) else None)
    return " ".join(name if isinstance(name, str) else "?" for name in names)
