"""forebay_cli/bound.py and the commands that child.py starts by it: real processes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from ext_proc_peer import until

from forebay_cli import bound, child

SLEEP = ("sleep", "600")


def ended(pid: int) -> bool:
    """Whether a process has ended; its parent may not have waited for it yet."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"


def test_the_command_replaces_it():
    """Same process id, arguments and exit status; SIGPIPE as a program expects it."""
    script = 'echo $$ "$1"; grep SigIgn /proc/$$/status; exit 7'
    command = child.dying_with_us("sh", "-c", script, "sh", "a b")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        output, _ = process.communicate(timeout=30)

    first, ignored = output.splitlines()
    assert first == f"{process.pid} a b"
    assert not int(ignored.split()[1], 16) >> (signal.SIGPIPE - 1) & 1
    assert process.returncode == 7


def test_it_is_killed_with_its_parent():
    """The kernel sends SIGKILL: the parent had no chance to do anything."""
    script = (
        "import subprocess, sys; from forebay_cli import child;"
        f"print(subprocess.Popen(child.dying_with_us(*{SLEEP})).pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-P", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        pid = int(parent.stdout.readline())
        until(lambda: _command(pid)[0] == b"sleep")
        parent.kill()

    until(lambda: ended(pid), 2)


def test_a_parent_that_has_ended_already_is_noticed():
    """It may end between fork and prctl, and then no signal would ever come."""
    gone = subprocess.Popen(["true"])
    gone.wait()

    done = subprocess.run(
        [sys.executable, "-I", "-S", bound.__file__, str(gone.pid), "echo", "started"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )

    assert (done.returncode, done.stdout) == (1, "")
    assert "has ended" in done.stderr


def test_a_command_that_does_not_exist_is_named():
    """As a line, not as a traceback."""
    command = child.dying_with_us("/nowhere/envoy")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)

    assert (done.returncode, done.stderr) == (1, "/nowhere/envoy: No such file or directory\n")


def _command(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
