"""`forebay top`: what the EPPs do now, in the terminal, as the live page shows it in a browser."""

from __future__ import annotations

import json
import select
import sys
import termios
import time
import tty
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from forebay_cli import CommandError, epps
from forebay_cli.output import console
from forebay_operator.resources.messages import printable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from rich.console import RenderableType

    from forebay_cli.epps import EPP

BAR = 24
FLOWS = 5

Data = dict[str, Any]


class Settings(epps.Settings):
    """The command's arguments."""

    once: bool
    output: str
    interval: float
    web: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    epps.add_arguments(parser)
    add = parser.add_argument
    add("--once", action="store_true", help="print once and end, as without a terminal")
    add(
        "-o",
        "--output",
        choices=("table", "json"),
        default="table",
        help="json: once, for programs",
    )
    add(
        "--interval",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="between updates (default: 1)",
    )
    add("--web", action="store_true", help="print the URL of the live page, and keep it reachable")


def run(settings: Settings) -> int:
    """Show until q is pressed, or once.

    Raises:
        CommandError: an EPP does not answer.
    """
    with epps.reach(settings) as found:
        if settings.web:
            return _serve(found)
        if settings.output == "json":
            items = [{"epp": each.name, **each.read("/live/state")} for each in found]
            print(json.dumps({"items": items}, indent=2))  # noqa: T201  # what was asked for
            return 0
        if settings.once or not (sys.stdout.isatty() and sys.stdin.isatty()):
            console().print(screen(found))
            return 0
        return _watch(found, max(0.1, settings.interval))


def _serve(found: list[EPP]) -> int:
    for each in found:
        each.page("/live")
        print(f"{each.name}: {each.url}/live", flush=True)  # noqa: T201  # what was asked for
    print("Ctrl-C ends it", flush=True)  # noqa: T201
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        return 0


def _watch(found: list[EPP], interval_seconds: float) -> int:
    with _keys(), Live(screen=True, auto_refresh=False, console=console()) as live:
        while True:
            try:
                shown = screen(found)
            except CommandError as error:
                shown = Text(f"{error}\nq quits", style="red")
            live.update(shown, refresh=True)
            readable, _, _ = select.select([sys.stdin], [], [], interval_seconds)
            if readable and sys.stdin.read(1) in ("q", "Q", "\x03", ""):
                return 0


@contextmanager
def _keys() -> Iterator[None]:
    """Have each key read at once, without an echo."""
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def screen(found: list[EPP]) -> RenderableType:
    """Read all EPPs and lay them out.

    Raises:
        CommandError: one does not answer.
    """
    shown: list[RenderableType] = []
    for each in found:
        shown += _epp(each, each.read("/live/state"))
    return Group(*shown)


def _epp(epp: EPP, data: Data) -> Iterator[RenderableType]:
    top = data["bands"][0] if data["bands"] else None
    line = (
        f"{data['pool']} ({epp.name}): {data['requests']} waiting, {data['in_flight']} in flight, "
        f"saturation {data['saturation']:.2f}"
    )
    if top and top["first_token"]["now"]["count"]:
        now, long = top["first_token"]["now"], top["first_token"]["ten_minutes"]
        line += (
            f", {top['band']} first token p99 {seconds(now['p99'])} "
            f"({seconds(long['p99'])} in 10 min)"
        )
    yield Text(printable(line), style="bold")
    yield _bands(data["bands"])
    yield Text()
    yield _endpoints(data)
    refused = [each for each in data["refusals"] if each["ten_minutes"]]
    for each in refused[:5]:
        yield Text(
            printable(
                f"refused {each['outcome']} {each['band'] or '-'}: {each['now']} in 10 s, "
                f"{each['ten_minutes']} in 10 min"
            ),
            style="yellow",
        )
    policy = data["policy"]
    changed = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(policy["changed_at"]))
    away = "" if policy.get("connected", True) else ", the operator is away"
    yield Text(f"policy since {changed}, source {policy['source']}{away}", style="dim")


def _bands(bands: list[Data]) -> Table:
    most = max([1, *(band["requests"] for band in bands)])
    found = Table(box=None, pad_edge=False)
    for column in ("BAND / FLOW", "WAITING", "", "OLDEST", "OUT/S", "TTFT P50", "TTFT P99"):
        found.add_column(column, justify="left" if column in ("BAND / FLOW", "") else "right")
    for band in bands:
        first = band["first_token"]["now"]
        waits = bool(band["requests"])
        found.add_row(
            Text(printable(band["band"]), style="bold"),
            str(band["requests"]),
            bar(band["requests"] / most),
            seconds(band["oldest_seconds"]) if waits else "-",
            f"{band['dispatches_per_second']:.1f}",
            seconds(first["p50"]),
            seconds(first["p99"]),
        )
        others, requests = band["other_flows"], band["other_requests"]
        for flow in band["flows"][:FLOWS]:
            found.add_row(
                f"  {printable(flow_name(flow))}",
                str(flow["requests"]),
                bar(flow["requests"] / most),
            )
        for flow in band["flows"][FLOWS:]:
            others, requests = others + 1, requests + flow["requests"]
        if others:
            found.add_row(f"  {others} others", str(requests), bar(requests / most))
    return found


def _endpoints(data: Data) -> Table:
    found = Table(box=None, pad_edge=False)
    for column in ("ENDPOINT", "SLOTS", "", "STATE"):
        found.add_column(column, justify="right" if column == "SLOTS" else "left")
    for each in data["endpoints"]:
        out = each["out"]
        found.add_row(
            printable(each["name"] or each["address"]),
            f"{each['taken']}/{each['limit']}",
            bar(each["taken"] / max(1, each["limit"])),
            Text(f"out: {printable(each['cause'])}", style="red")
            if out
            else Text("" if each["fresh"] else "metrics are stale"),
        )
    others = data["other_endpoints"]
    if others["count"]:
        part = others["taken"] / max(1, others["limit"])
        found.add_row(
            f"{others['count']} others", f"{others['taken']}/{others['limit']}", bar(part)
        )
    return found


def flow_name(flow: Data) -> str:
    """Return the words for a flow: its tenant, its model, or both."""
    names = []
    if flow["tenant"] is not None:
        names.append(flow["tenant"] or "no tenant")
    if flow["model"] is not None:
        names.append(flow["model"] or "unmatched models")
    return " · ".join(names) or "all requests"


def bar(part: float) -> Text:
    """Draw a part of 1 as a bar."""
    full = round(BAR * min(1.0, part))
    return Text("█" * full + "░" * (BAR - full), style="blue")


def seconds(value: float | None) -> str:
    """Write a duration in at most six characters or so."""
    if value is None:
        return "-"
    if value < 1:
        return f"{1000 * value:.0f}ms"
    return f"{value:.1f}s" if value < 100 else f"{value:.0f}s"
