"""The terminal output of all commands."""

from __future__ import annotations

import sys

from rich.console import Console

WIDE = 1000  # characters of a line that no terminal has to hold


def console(*, stderr: bool = False) -> Console:
    """Return a console that prints text as it is: no markup, no emoji."""
    file = sys.stderr if stderr else sys.stdout
    width = None if file.isatty() else WIDE
    return Console(
        file=file, width=width, highlight=False, soft_wrap=True, markup=False, emoji=False
    )
