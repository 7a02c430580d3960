"""Private files, and folders with one user at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING

from cluster.needs import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def write_private(path: Path, text: str) -> None:
    """Replace the file at once by one that only its owner can read."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    new.replace(path)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder when it is missing and be its only user among these programs.

    Raises:
        UserError: it belongs to another user.
    """
    while True:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        try:
            if os.fstat(descriptor).st_uid != os.getuid():
                raise UserError(f"{folder} belongs to another user: choose another folder")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # The previous holder of the lock may have removed the folder.
            with contextlib.suppress(FileNotFoundError):
                if folder.stat().st_ino == os.fstat(descriptor).st_ino:
                    yield
                    return
        finally:
            os.close(descriptor)
