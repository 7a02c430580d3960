"""`forebay COMMAND`, also as `kubectl forebay COMMAND`."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

from forebay_cli import CommandError

COMMANDS = {
    "up": "run EPP and Envoy on this machine from a folder of manifests",
    "top": "show what waits, for whom, and how full the servers are",
    "get": "show the conditions of what forebay up runs",
    "check": "say what is wrong with manifests, without a cluster",
    "plan": "show the queues that manifests lead to",
    "debug": "write an archive for a report of a problem, without secrets",
    "completion": "print a script that completes commands and flags in a shell",
}


def main() -> int:
    """Run a command and return its exit status."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    try:
        given = parser(*({name} & COMMANDS.keys())).parse_args()
        return int(import_module(f"forebay_cli.{given.command}").run(given))
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("forebay"):
            raise
        print(  # noqa: T201  # rich may be what is missing
            f"forebay {name}: needs the Python package {error.name}: "
            "pip install 'forebay[standalone]'",
            file=sys.stderr,
        )
        return 1
    except CommandError as error:
        from forebay_cli.output import console  # noqa: PLC0415  # as above

        console(stderr=True).print(f"forebay {name}: {error}", style="red")
        return 1


def parser(*loaded: str) -> argparse.ArgumentParser:
    """Return the parser of all commands, with the flags of some: each brings its imports.

    Raises:
        ModuleNotFoundError: a package that one of them needs is not installed.
    """
    program = Path(sys.argv[0]).name
    found = argparse.ArgumentParser(
        prog="kubectl forebay" if program == "kubectl-forebay" else "forebay",
        description="A queue in front of LLM model servers.",
        allow_abbrev=False,
    )
    commands = found.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        if name in loaded:
            import_module(f"forebay_cli.{name}").add_arguments(command)
    return found


if __name__ == "__main__":
    sys.exit(main())
