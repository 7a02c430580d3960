"""`forebay check FILE...`: say what is wrong with manifests, without a cluster.

Errors are those the API server would give, and those of rules that no schema can hold.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from forebay_cli.output import console
from forebay_operator import planning, sources, wording


class Settings(argparse.Namespace):
    """What was given on the command line."""

    paths: list[Path]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "paths", type=Path, nargs="+", metavar="FILE", help="a YAML file, or a folder of them"
    )


def run(settings: Settings) -> int:
    """Print what is wrong; return 1 if anything is invalid.

    What has no effect, such as a policy for a pool that is not among the files, is a warning.
    """
    out = console()
    manifests = sources.read(*settings.paths)
    for error in manifests.errors:
        out.print(f"error: {error}", style="red")
    problems = list(planning.unattached(manifests.resources))
    for pool in planning.pools(manifests.resources):
        problems += planning.plan(pool, manifests.resources).problems
    for line in (*manifests.ignored, *(wording.printable(str(problem)) for problem in problems)):
        out.print(f"warning: {line}", style="yellow")
    if manifests.errors:
        return 1
    out.print(f"{len(manifests.objects)} objects are valid", style="green")
    return 0
