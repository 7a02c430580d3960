"""The last program in force, on disk: a restarted EPP serves before any operator is up.

An invalid file is logged and ignored; the next source counts. A plan is quarantined, and the one
before it used, when the process has ended three times in a row while applying it or within a minute
of starting to run it. A plan that has run for a minute in any process is beyond suspicion: what
ends the process later, such as memory that runs out under traffic, is not the plan's fault.
Endpoints are never quarantined. A disk that hangs delays nothing for more than a moment. What plans
and endpoints mean belongs in codec/control.py.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import logging
import os
import threading
from base64 import b64decode, b64encode
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FILE = "last-known-good.json"
FORMAT = 2
MAX_FILE_BYTES = 8 << 20
CRASHES = 3
MAX_QUARANTINED = 16
MAX_NUMBER = (1 << 63) - 1

_log = logging.getLogger("forebay_epp")


@dataclass(slots=True)
class StoredPlan:
    """One plan as it is kept. `proven`: it has run in a process for a minute."""

    data: bytes
    proven: bool = False

    @property
    def sha256(self) -> bytes:
        """The hash of the plan."""
        return hashlib.sha256(self.data).digest()


@dataclass(slots=True)
class State:
    """What the file holds.

    Attributes:
        highest_epoch: ever seen.
        epoch: of the last program of which any part was taken; so the next three.
        revision: of it.
        sha256: of it; empty when there was none.
        whole: whether all of it was taken.
        deleted: the pool is deleted.
        endpoints: the endpoints in force, serialised.
        plans: the newest first, at most two.
        starts: how often in a row the process has begun to run `plans[0]` and has not lived with
            it for a minute, this time included.
        attempted: hash of the plan that is being put into force; empty when none is.
        attempts: how often in a row the process has ended over that.
        quarantined: hashes of plans that are not to be used.
    """

    highest_epoch: int = 0
    epoch: int = 0
    revision: int = 0
    sha256: bytes = b""
    whole: bool = True
    deleted: bool = False
    endpoints: bytes = b""
    plans: list[StoredPlan] = field(default_factory=list)
    starts: int = 0
    attempted: bytes = b""
    attempts: int = 0
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
        self._saving: asyncio.Task[None] | None = None
        self._unsaved = self._sync = False

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
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            self._fail("corrupt", error)
            return
        state = self.state
        if state.attempts >= CRASHES:
            self._set_aside(state.attempted)
        if state.plans and state.starts >= CRASHES:
            self._set_aside(state.plans.pop(0).sha256)
            state.starts = 0
            state.whole = False
        if state.plans and not state.plans[0].proven and not state.attempted:
            state.starts += 1  # while another was being attempted, that one is to blame
        if state.attempts >= CRASHES:
            state.attempted, state.attempts = b"", 0
        # Without fsync: this is about crashes of the process, and it must not keep it waiting.
        self._replace(self._folder, _pack(self._pool, state), sync=False)

    def _set_aside(self, sha256: bytes) -> None:
        state = self.state
        state.quarantined = [sha256, *state.quarantined][:MAX_QUARANTINED]
        _log.error(
            "a plan is quarantined: this process kept ending under it",
            extra={"sha256": sha256.hex()},
        )

    async def attempt(self, sha256: bytes, patience_seconds: float) -> None:
        """Note that a plan is about to be put into force: it may end the process."""
        state = self.state
        state.attempts = state.attempts + 1 if sha256 == state.attempted else 1
        state.attempted = sha256
        await self.save(patience_seconds, sync=False)

    def attempted(self) -> None:
        """Note that the process has lived through that, with or without success."""
        self.state.attempted, self.state.attempts = b"", 0

    def keep_plan(self, data: bytes) -> None:
        """Make a plan the newest one in memory; `save` puts it on the disk."""
        state = self.state
        known = next((plan for plan in state.plans if plan.data == data), None)
        if known is None or known is not state.plans[0]:
            plan = known or StoredPlan(data)
            state.plans = [plan, *(other for other in state.plans if other is not plan)][:2]
            state.starts = 0 if plan.proven else 1

    def survived(self) -> None:
        """Note that the process has lived with the plan for long enough."""
        self.state.starts = 0
        if self.state.plans:
            self.state.plans[0].proven = True

    def ended(self) -> None:
        """Note that the process ends in order, which is no crash."""
        self.state.starts = 0

    async def save(self, patience_seconds: float, *, sync: bool = True) -> None:
        """Put what is in memory on the disk; an error costs the warm start and nothing else.

        Returns when it is written, or when the patience is exhausted; writing then continues.
        Without `sync` it outlasts the process, but perhaps not the machine.
        """
        if self._folder is None:
            return
        self._unsaved, self._sync = True, self._sync or sync
        if self._saving is None or self._saving.done():
            self._saving = asyncio.create_task(self._save(self._folder))
        done, _ = await asyncio.wait((self._saving,), timeout=patience_seconds)
        if not done:
            self._fail("slow", f"not written within {patience_seconds:g} s")

    async def _save(self, folder: Path) -> None:
        """Write until what is on the disk is what is in memory; one write at a time."""
        while self._unsaved:
            data, sync = _pack(self._pool, self.state), self._sync
            self._unsaved = self._sync = False
            await _in_thread(functools.partial(self._replace, folder, data, sync=sync))

    def _replace(self, folder: Path, data: bytes, *, sync: bool) -> None:
        """Replace the file in one step."""
        new = folder / f"{FILE}.new"
        try:
            try:
                descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                with os.fdopen(descriptor, "wb") as stream:
                    stream.write(data)
                    stream.flush()
                    if sync:
                        os.fsync(stream.fileno())
                new.replace(folder / FILE)
            except OSError:
                with suppress(OSError):
                    new.unlink()  # half a file would take space that the next one needs
                raise
            if sync:
                _sync_folder(folder)
        except OSError as error:
            self._fail("unwritable", error)

    def _read(self, path: Path) -> State:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError("is too large")
        head, _, body = path.read_bytes().partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != head:
            raise ValueError("its checksum does not match")
        data: dict[str, Any] = json.loads(body)
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']!r} is not known")
        if data["pool"] != self._pool:
            raise ValueError(f"is for pool {data['pool']!r}")
        return State(
            highest_epoch=_number(data["highestEpoch"]),
            epoch=_number(data["epoch"]),
            revision=_number(data["revision"]),
            sha256=bytes.fromhex(data["sha256"]),
            whole=_flag(data["whole"]),
            deleted=_flag(data["deleted"]),
            endpoints=b64decode(data["endpoints"]),
            plans=[
                StoredPlan(b64decode(plan["plan"]), _flag(plan["proven"])) for plan in data["plans"]
            ],
            starts=_number(data["starts"]),
            attempted=bytes.fromhex(data["attempted"]),
            attempts=_number(data["attempts"]),
            quarantined=[bytes.fromhex(text) for text in data["quarantined"]],
        )

    def _fail(self, reason: str, error: Exception | str) -> None:
        self._failures[reason] = self._failures.get(reason, 0) + 1
        _log.error("--state-path: %s: %s", reason, error, extra={"folder": str(self._folder)})


def _number(value: object) -> int:
    if not isinstance(value, int) or not 0 <= value <= MAX_NUMBER:
        raise ValueError(f"{value!r} is not a whole number of 0 to 2^63 - 1")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is not true or false")
    return value


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


async def _in_thread(work: Callable[[], None]) -> None:
    """Run in a thread that no exit of the process waits for, unlike those of asyncio.to_thread."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def finish() -> None:
        if not done.done():
            done.set_result(None)

    def run() -> None:
        work()
        with suppress(RuntimeError):  # the loop may be gone
            loop.call_soon_threadsafe(finish)

    threading.Thread(target=run, name="last-good", daemon=True).start()
    await done


def _pack(pool: str, state: State) -> bytes:
    body = json.dumps(
        {
            "format": FORMAT,
            "pool": pool,
            "highestEpoch": state.highest_epoch,
            "epoch": state.epoch,
            "revision": state.revision,
            "sha256": state.sha256.hex(),
            "whole": state.whole,
            "deleted": state.deleted,
            "endpoints": b64encode(state.endpoints).decode(),
            "plans": [
                {"plan": b64encode(plan.data).decode(), "proven": plan.proven}
                for plan in state.plans
            ],
            "starts": state.starts,
            "attempted": state.attempted.hex(),
            "attempts": state.attempts,
            "quarantined": [sha256.hex() for sha256 in state.quarantined],
        }
    ).encode()
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body
