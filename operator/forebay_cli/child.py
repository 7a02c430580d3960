"""A child process that a command starts, reads and ends, and that never outlives the command.

Which processes to run, and in which order they end, does not belong here.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

from forebay_cli import bound

if TYPE_CHECKING:
    from collections.abc import Callable

LAST_LINES = 15


def dying_with_us(*command: str) -> tuple[str, ...]:
    """Return the command in a form that is killed when this process ends, by kill -9 too.

    To be started from the main thread: the kernel looks at the thread that forks (bound.py).
    """
    # -I -S: some 20 ms less, and nothing of the folder where it is started is imported.
    return (sys.executable, "-I", "-S", bound.__file__, str(os.getpid()), *command)


class Child:
    """A process we started, and the last lines it wrote. `tell` gets each line as it comes."""

    def __init__(
        self, name: str, process: asyncio.subprocess.Process, tell: Callable[[str], None]
    ) -> None:
        self.name = name
        self._process = process
        self._tell = tell
        self._lines: deque[str] = deque(maxlen=LAST_LINES)
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, name: str, tell: Callable[[str], None], *command: str) -> Child:
        """Start a process in a session of its own: Ctrl-C is ours to pass on, in order."""
        process = await asyncio.create_subprocess_exec(
            *dying_with_us(*command),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        return cls(name, process, tell)

    async def _read(self) -> None:
        stream = self._process.stderr
        if stream is None:
            raise AssertionError("started with a pipe")
        while not stream.at_eof():
            try:
                line = await stream.readline()
            except ValueError:  # longer than the stream's limit; what was read of it is dropped
                continue
            if text := line.decode(errors="replace").rstrip():
                self._lines.append(text)
                self._tell(f"{self.name}: {text}")

    async def wait(self) -> str:
        """Wait for the end and report it."""
        status = await self._process.wait()
        await asyncio.shield(self._reading)  # a waiter that is cancelled must not end it
        last = "\n  ".join(self._lines)
        return f"{self.name} ended with status {status}" + (f":\n  {last}" if last else "")

    async def stop(self, seconds: float, hurry: asyncio.Event) -> None:
        """Ask the process to end; make it end after `seconds`, or when there is a hurry."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        ended = asyncio.create_task(self._process.wait())
        hurried = asyncio.create_task(hurry.wait())
        await asyncio.wait((ended, hurried), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if not ended.done():
            with suppress(ProcessLookupError):
                self._process.kill()
        await ended
        await self._reading
