"""`forebay get`: the conditions of what `forebay up` runs, as kubectl would show them."""

from __future__ import annotations

import argparse
import json
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from rich.table import Table

from forebay_cli import OPERATOR_PORT, CommandError
from forebay_cli.output import console
from forebay_operator.resources import messages

TIMEOUT_SECONDS = 5


class Settings(argparse.Namespace):
    """The command's arguments."""

    name: str | None
    port: int
    output: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", help="one object's name (default: all)")
    add("--port", type=int, default=OPERATOR_PORT, help="forebay up's --operator-port")
    add("-o", "--output", choices=("table", "json"), default="table", help="output format")


def run(settings: Settings) -> int:
    """Print the objects and their conditions.

    Raises:
        CommandError: no operator answers there, or there is no such object.
    """
    url = f"http://127.0.0.1:{settings.port}/resources"
    try:
        with urlopen(url, timeout=TIMEOUT_SECONDS) as answer:  # http, as written above
            items = json.load(answer)["items"]
    except (URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise CommandError(
            f"{url}: {reason}; is forebay up running, with another --operator-port?"
        ) from error
    if settings.name is not None:
        items = [item for item in items if item["metadata"]["name"] == settings.name]
        if not items:
            raise CommandError(f"no policy or model is named {settings.name}")
    if settings.output == "json":
        print(json.dumps({"items": items}, indent=2))  # noqa: T201  # what was asked for
        return 0
    out = console()
    out.print(table(items))
    for item in items:
        for condition in item["status"].get("conditions", []):
            good = "False" if condition["type"] == "Degraded" else "True"
            if condition["status"] != good:
                text = (
                    f"{item['kind']} {item['metadata']['name']}: {condition['type']}="
                    f"{condition['status']} {condition['reason']}: {condition['message']}"
                )
                out.print(messages.printable(text), style="yellow")
    return 0


def table(items: list[dict[str, Any]]) -> Table:
    """Lay the objects out with the columns that kubectl has."""
    columns = (
        *("kind", "name", "pools", "mode", "accepted", "programmed", "reason"),
        *("epps", "queued", "saturation"),
    )
    found = Table(box=None, pad_edge=False)
    for column in columns:
        found.add_column(column.upper())
    for item in items:
        status = item["status"]
        conditions = {c["type"]: c["status"] for c in status.get("conditions", [])}
        reasons = {c["type"]: c["reason"] for c in status.get("conditions", [])}
        row = (
            item["kind"],
            item["metadata"]["name"],
            status.get("poolNames", ""),
            next((pool.get("mode", "") for pool in status.get("pools", [])), ""),
            conditions.get("Accepted", ""),
            conditions.get("Programmed", ""),
            reasons.get("Programmed", ""),
            status.get("endpointPickers", {}).get("ready", ""),
            status.get("queued", ""),
            status.get("saturation", ""),
        )
        found.add_row(*(messages.printable(str(value)) for value in row))
    return found
