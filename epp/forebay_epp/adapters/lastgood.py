"""The last program that was applied, on disk: a restarted picker serves before any operator is up.

Whatever is wrong with the file, it is told of and ignored; the next source counts. A program under
which the process has crashed three times in a row within a minute of its start is set aside
(quarantined) and the one before it is used. What a program means is codec/control.py's business.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from base64 import b64decode, b64encode
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

FILE = "last-known-good.json"
FORMAT = 1
MAX_FILE_BYTES = 8 << 20
CRASHES = 3
MAX_QUARANTINED = 16

_log = logging.getLogger("forebay_epp")


@dataclass(slots=True)
class Stored:
    """One program as it is kept."""

    epoch: int
    revision: int
    sha256: bytes
    snapshot: bytes


@dataclass(slots=True)
class State:
    """What the file holds.

    Attributes:
        starts: how often in a row the process has started on `programs[0]` and not lived through
            its first minute.
        programs: the newest first, at most two.
        quarantined: hashes of programs that are not to be used.
    """

    highest_epoch: int = 0
    starts: int = 0
    programs: list[Stored] = field(default_factory=list)
    quarantined: list[bytes] = field(default_factory=list)


class LastGood:
    """Reads and writes the file.

    Args:
        folder: where it is; None keeps nothing.
        pool: whose it must be.
        failures: counted by reason, for the metrics page.
    """

    def __init__(self, folder: Path | None, pool: str, failures: dict[str, int]) -> None:
        self._folder = folder
        self._pool = pool
        self._failures = failures
        self.state = State()

    def load(self) -> None:
        """Read the file, count this start, and set aside what has crashed too often."""
        if self._folder is None:
            return
        try:
            self.state = self._read(self._folder / FILE)
        except FileNotFoundError:
            return
        except OSError as error:
            self._fail("unreadable", error)
            return
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self._fail("corrupt", error)
            return
        state = self.state
        if state.programs:
            if state.starts >= CRASHES:
                bad = state.programs.pop(0)
                state.quarantined = [bad.sha256, *state.quarantined][:MAX_QUARANTINED]
                state.starts = 0
                _log.error(
                    "a program under which this process kept ending is set aside",
                    extra={"epoch": bad.epoch, "revision": bad.revision},
                )
            state.starts += 1
            self.write()

    def keep(self, program: Stored, highest_epoch: int) -> None:
        """Make a program the newest one in memory; `write` puts it on the disk."""
        state = self.state
        state.highest_epoch = max(state.highest_epoch, highest_epoch)
        if state.programs and state.programs[0].sha256 == program.sha256:
            state.programs[0] = program
        else:
            state.programs = [program, *state.programs][:2]
            state.starts = 1

    def survived(self) -> None:
        """Note that the process has lived long enough on this program."""
        self.state.starts = 0

    def write(self) -> None:
        """Replace the file in one step; an error costs the warm start and nothing else."""
        if self._folder is None:
            return
        new = self._folder / f"{FILE}.new"
        try:
            data = _pack(self._pool, self.state)
            descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            new.replace(self._folder / FILE)
            folder = os.open(self._folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            self._fail("unwritable", error)

    def _read(self, path: Path) -> State:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError("is too large")
        head, _, body = path.read_bytes().partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != head:
            raise ValueError("its checksum does not fit")
        data: dict[str, Any] = json.loads(body)
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']!r} is not known")
        if data["pool"] != self._pool:
            raise ValueError(f"is of pool {data['pool']!r}")
        return State(
            highest_epoch=int(data["highestEpoch"]),
            starts=int(data["starts"]),
            programs=[
                Stored(
                    int(program["epoch"]),
                    int(program["revision"]),
                    bytes.fromhex(program["sha256"]),
                    b64decode(program["snapshot"]),
                )
                for program in data["programs"]
            ],
            quarantined=[bytes.fromhex(text) for text in data["quarantined"]],
        )

    def _fail(self, reason: str, error: Exception) -> None:
        self._failures[reason] = self._failures.get(reason, 0) + 1
        _log.error("--state-path: %s: %s", reason, error, extra={"folder": str(self._folder)})


def _pack(pool: str, state: State) -> bytes:
    body = json.dumps(
        {
            "format": FORMAT,
            "pool": pool,
            "highestEpoch": state.highest_epoch,
            "starts": state.starts,
            "programs": [
                {
                    "epoch": program.epoch,
                    "revision": program.revision,
                    "sha256": program.sha256.hex(),
                    "snapshot": b64encode(program.snapshot).decode(),
                }
                for program in state.programs
            ],
            "quarantined": [sha256.hex() for sha256 in state.quarantined],
        }
    ).encode()
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body
