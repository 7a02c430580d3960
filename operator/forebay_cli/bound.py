"""Runs a command that ends with the process that started it, however that process ends.

`python -I -S bound.py PARENT COMMAND...` is a program of its own and replaces itself with COMMAND.
The kernel then sends SIGKILL when the parent is gone (prctl(2), PR_SET_PDEATHSIG). This runs
between fork and the command and not in `preexec_fn`, which may deadlock where there are threads.

More exactly the signal comes when the *thread* that forked ends, so the thread that starts such a
command must live as long as the command is wanted: use the main thread. The kernel forgets the
request when the command is set-user-ID or has file capabilities.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Become the command, unless the parent has ended already."""
    parent, *command = sys.argv[1:]
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != int(parent):  # it ended before the request was made: no signal will come
        sys.exit("the parent process has ended")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and exec hands that on
    try:
        os.execvp(command[0], command)  # noqa: S606  # what its caller chose
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
