"""Where resources come from when there is no cluster: a folder of YAML files, watched.

What the resources mean does not belong here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml
from watchfiles import awatch

from forebay_operator import resources

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from forebay_operator.resources import Resource

MAX_FILE_BYTES = 4 << 20
SUFFIXES = (".yaml", ".yml")
DEBOUNCE_MILLISECONDS = 50
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
    if not folder.is_dir():
        return Manifests((), (f"{folder}: is not a folder",), ())
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    if not files:
        return Manifests((), (f"{folder}: holds no .yaml file",), ())
    found: list[Resource] = []
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
            else:
                found.append(resource)
    return Manifests(tuple(found), tuple(errors), tuple(ignored))


async def changes(folder: Path) -> AsyncIterator[Manifests]:
    """Yield the folder's manifests, and again each time a file of it has changed.

    A look every second finds what was written before the watch began.
    """
    seen: object = None
    async for _ in awatch(
        folder,
        debounce=DEBOUNCE_MILLISECONDS,
        step=10,
        recursive=False,
        rust_timeout=LOOK_MILLISECONDS,
        yield_on_timeout=True,
    ):
        files = _fingerprint(folder)
        if files != seen:
            seen = files
            yield read(folder)


def _fingerprint(folder: Path) -> dict[str, tuple[int, int]]:
    """Tell contents apart without reading them; a folder that is gone is empty."""
    try:
        return {
            file.name: ((stat := file.stat()).st_mtime_ns, stat.st_size)
            for file in folder.iterdir()
            if file.suffix in SUFFIXES
        }
    except OSError:
        return {}


def _documents(file: Path) -> list[Any]:
    if file.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"is larger than {MAX_FILE_BYTES} bytes")
    with file.open("rb") as stream:
        return [document for document in yaml.safe_load_all(stream) if document is not None]


def _title(document: Any) -> str:
    if not isinstance(document, dict):
        return type(document).__name__
    metadata = document.get("metadata")
    name = metadata.get("name", "?") if isinstance(metadata, dict) else "?"
    return f"{document.get('kind', 'no kind')} {name}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
