"""Processes that outlive the program that starts them, known by id and start time."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import subprocess
import time
from pathlib import Path

from cluster.needs import UserError

# Below Linux's range of ephemeral ports: no outgoing connection takes a component's port while
# that component restarts.
PORTS = range(20000, 32768)
LOOPBACK = "127.0.0.1"
END_SECONDS = 10.0

_claims: list[socket.socket] = []  # held until the program ends; its processes listen by then


def start_ticks(pid: int) -> int | None:
    """Return when the process started, in clock ticks since boot; None when it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The program's name comes first and may hold anything, brackets too.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])


class Process:
    """A detached process, known by its id and start time, so that no other is taken for it."""

    def __init__(self, pid: int, started: int | None) -> None:
        self.pid = pid
        self.started = started

    @classmethod
    def start(cls, command: list[str], log: Path, **environment: str) -> Process:
        """Start the command in a session of its own; its output is appended to the log."""
        with log.open("a") as output:
            child = subprocess.Popen(
                command,
                cwd=log.parent,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                umask=0o077,
            )
        # Until it is waited for, a child's id is its own, even when it has already ended.
        return cls(child.pid, start_ticks(child.pid))

    def only_child(self) -> Process:
        """Return the one process that it starts, as soon as there is one.

        Raises:
            UserError: it ends before.
        """
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        while self.runs():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                for child in children.read_text().split():
                    return Process(int(child), start_ticks(int(child)))
            time.sleep(0.01)
        raise UserError(f"process {self.pid} has ended too early")

    def runs(self) -> bool:
        """Return whether it still runs."""
        return self.started is not None and start_ticks(self.pid) == self.started

    def end(self, first_signal: signal.Signals = signal.SIGTERM) -> None:
        """Send the signal, SIGKILL when that was not enough, and return when it has ended.

        Raises:
            UserError: it survives SIGKILL.
        """
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(self.pid)
            try:
                if not self.runs():
                    return
                for number in (first_signal, signal.SIGKILL):
                    signal.pidfd_send_signal(descriptor, number)
                    if select.select([descriptor], [], [], END_SECONDS)[0]:
                        return
            finally:
                os.close(descriptor)
            raise UserError(f"process {self.pid} does not end")


def free_port() -> int:
    """Return a TCP port that is free, and that no other cluster chooses while this program runs.

    Two that start at the same moment would else take one etcd for the other's. The claim is the
    UDP port of the same number, which nothing here uses.
    """
    while True:
        port = random.choice(PORTS)
        claim = socket.socket(type=socket.SOCK_DGRAM)
        with socket.socket() as probe, contextlib.suppress(OSError):
            claim.bind((LOOPBACK, port))
            probe.bind((LOOPBACK, port))
            _claims.append(claim)
            return port
        claim.close()
