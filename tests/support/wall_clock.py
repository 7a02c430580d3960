"""A wall clock that a test sets, for processes: libfaketime, which leaves monotonic clocks alone.

With it `time.sleep` fails (libfaketime 0.9.10); none of our processes calls that.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from api_server import need

if TYPE_CHECKING:
    from collections.abc import Iterator


class WallClock:
    """The clock of processes that are started with `env`; within a second they see a jump."""

    def __init__(self, file: Path, offset: str = "+0") -> None:
        need("faketime")
        self._file = file
        self.jump(offset)
        self.env = {
            "LD_PRELOAD": str(next(_libraries())),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def jump(self, offset: str) -> None:
        """Differ from the machine's clock by this from now on: "+1h", "-1d"."""
        new = self._file.with_suffix(".new")
        new.write_text(offset)
        new.replace(self._file)


def _libraries() -> Iterator[Path]:
    for folder in ("/usr/lib", "/usr/lib64", "/usr/local/lib"):
        yield from Path(folder).rglob("libfaketimeMT.so.1")
