"""`forebay COMMAND`: what people run."""

from __future__ import annotations

import argparse
import sys

from forebay_cli import up


def main() -> int:
    """Run a command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="forebay", description="A queue in front of LLM model servers.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    up.add_arguments(
        commands.add_parser(
            "up",
            help="run endpoint picker and Envoy on this machine from a folder of manifests",
            allow_abbrev=False,
        )
    )
    return up.run(parser.parse_args(namespace=up.Settings()))


if __name__ == "__main__":
    sys.exit(main())
