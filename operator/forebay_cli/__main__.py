"""`forebay COMMAND`."""

from __future__ import annotations

import argparse
import sys

from forebay_cli import CommandError, check, get, plan, up
from forebay_cli.output import console

COMMANDS = {
    "up": (up, "run EPP and Envoy on this machine from a folder of manifests"),
    "get": (get, "show the conditions of what forebay up runs"),
    "check": (check, "say what is wrong with manifests, without a cluster"),
    "plan": (plan, "show the queues that manifests lead to"),
}


def main() -> int:
    """Run a command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="forebay", description="A queue in front of LLM model servers.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=text, allow_abbrev=False))
    given = parser.parse_args()
    try:
        return int(COMMANDS[given.command][0].run(given))
    except CommandError as error:
        console(stderr=True).print(f"forebay {given.command}: {error}", style="red")
        return 1


if __name__ == "__main__":
    sys.exit(main())
