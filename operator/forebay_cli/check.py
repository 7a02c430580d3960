"""`forebay check FILE...`: report errors in manifests, without a cluster.

Errors are those the API server would give, and those of rules that no schema can hold. Warnings
are about what has no effect, or is valid but probably not intended.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from forebay_cli.output import console
from forebay_operator import planning
from forebay_operator.resources import messages
from forebay_operator.standalone import sources
from forebay_operator.status import advice


class Settings(argparse.Namespace):
    """The command's arguments."""

    paths: list[Path]
    strict: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "paths", type=Path, nargs="+", metavar="FILE", help="a YAML file, or a folder of them"
    )
    parser.add_argument("--strict", action="store_true", help="fail on warnings")


def run(settings: Settings) -> int:
    """Print problems; return 1 if anything is invalid, or with `strict` if there are warnings."""
    out = console()
    manifests = sources.read(*settings.paths)
    for error in manifests.errors:
        out.print(f"error: {error}", style="red")
    problems = list(planning.unattached(manifests.resources))
    for pool in planning.pools(manifests.resources):
        problems += planning.plan(pool, manifests.resources).problems
    problems += advice.advice(manifests.resources)
    warnings = [*manifests.ignored, *(messages.printable(str(problem)) for problem in problems)]
    for line in warnings:
        out.print(f"warning: {line}", style="yellow")
    if manifests.errors:
        return 1
    out.print(f"{len(manifests.objects)} objects are valid", style="green")
    return 1 if settings.strict and warnings else 0
