"""The terminal output of all commands."""

from __future__ import annotations

import sys

from rich.console import Console


def console(*, stderr: bool = False) -> Console:
    """Return a console that prints text as it is: no markup, no emoji."""
    file = sys.stderr if stderr else sys.stdout
    return Console(file=file, highlight=False, soft_wrap=True, markup=False, emoji=False)
