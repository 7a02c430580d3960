"""`forebay up DIR`: an endpoint picker and its Envoy on this machine, until Ctrl-C.

The folder holds the manifests that kubectl takes. They are planned here and handed to the endpoint
picker as a file; when a manifest changes, so does the file, and the running picker follows. What a
manifest means is planning.py's business, how the processes are run is stack.py's.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import json
import shlex
import signal
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf import json_format
from rich.console import Console
from rich.table import Table

from forebay_cli import CommandError
from forebay_cli.stack import Stack, StackSettings, join
from forebay_control.v1 import control_pb2 as pb
from forebay_operator import planning, sources, wording

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forebay_operator.planning import Planned
    from forebay_operator.resources import AnyPool
    from forebay_operator.sources import Manifests

MAX_CHANGES = 20


class Settings(StackSettings):
    """What was given on the command line."""

    folder: Path
    endpoint: list[str]
    pool: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="folder of YAML manifests")
    add(
        "--endpoint",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="a model server, instead of EndpointSlices; may be given several times",
    )
    add("--pool", metavar="NAME", help="the InferencePool, where the folder holds several")
    add("--no-proxy", action="store_true", help="leave Envoy out")
    add("--listen", type=_ip, default="127.0.0.1", metavar="IP", help="address of all ports")
    add("--http-port", type=_port, default=8080, metavar="PORT", help="Envoy's HTTP")
    add("--grpc-port", type=_port, default=9002, metavar="PORT", help="ext_proc")
    add("--grpc-health-port", type=_port, default=9003, metavar="PORT", help="gRPC health")
    add("--metrics-port", type=_port, default=9090, metavar="PORT", help="Prometheus metrics")
    add("--envoy-admin-port", type=_port, default=0, metavar="PORT", help="0 picks one")
    add("--proxy-concurrency", type=_threads, default=1, metavar="N", help="Envoy's threads")
    add(
        "--secure-serving",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="TLS between Envoy and the endpoint picker",
    )
    add(
        "--transport",
        choices=("completion-queue", "aio"),
        default="completion-queue",
        help="the endpoint picker's gRPC server",
    )


def _port(text: str) -> int:
    if text.isdecimal() and int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a port of 0 to 65535")


def _threads(text: str) -> int:
    if text.isdecimal() and 1 <= int(text) <= 256:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 to 256")


def _ip(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an IP address") from None


def run(settings: Settings) -> int:
    """Run until a signal and return the exit status."""
    # What manifests hold is shown as it is: no markup, no emoji.
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
    try:
        return asyncio.run(_Up(settings, console).run())
    except CommandError as error:
        console.print(f"forebay up: {error}", style="red")
        return 1
    except KeyboardInterrupt:  # before there was a handler
        return 0


def address_of(text: str) -> str:
    """Resolve HOST:PORT to ip:port; where a name has both, to its IPv4 address.

    Raises:
        CommandError: it is not of that form, or the host is unknown.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) <= 65535:
        raise CommandError(f"--endpoint {text}: must be HOST:PORT")
    try:
        found = socket.getaddrinfo(
            host.removeprefix("[").removesuffix("]"), int(port), type=socket.SOCK_STREAM
        )
    except OSError as error:
        raise CommandError(f"--endpoint {text}: {error.strerror}") from error
    except UnicodeError as error:
        raise CommandError(f"--endpoint {text}: is not a host name") from error
    family, *_, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    if family == socket.AF_INET6:
        return join(str(ipaddress.ip_address(address[0])), int(port))
    return join(str(address[0]), int(port))


class _Up:
    """One run of the command."""

    def __init__(self, settings: Settings, console: Console) -> None:
        self._settings = settings
        self._console = console
        # Each once: an endpoint is its address.
        self._endpoints = tuple(dict.fromkeys(address_of(text) for text in settings.endpoint))
        self._said: frozenset[str] = frozenset()
        self._stack = Stack(settings, lambda line: console.print(line, style="dim"))
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()

    async def run(self) -> int:
        manifests = sources.read(self._settings.folder)
        planned = self._plan(manifests)
        self._stack.check_ports()
        self._complain(manifests, planned)
        running = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup means it
                running.add_signal_handler(number, self._on_signal)
        with tempfile.TemporaryDirectory(prefix="forebay-") as name:
            folder = Path(name)
            plan_file = folder / "plan" / "plan.json"
            plan_file.parent.mkdir()
            _write(plan_file, planned)
            try:
                pool = planned.snapshot.plan.pool.rpartition("/")[2]
                await self._stack.start(pool, plan_file, folder / "envoy.json")
                if await self._unless_stopped(self._stack.ready()):
                    self._show(planned)
                    await self._unless_stopped(self._watch(plan_file, planned))
                self._console.print("stopping; a second Ctrl-C does not wait for open requests")
            finally:
                self._stopping.set()
                await self._stack.stop(self._hurry)
        return 0

    def _on_signal(self) -> None:
        (self._hurry if self._stopping.is_set() else self._stopping).set()

    async def _unless_stopped(self, work: Any) -> bool:
        """Wait for `work`; return whether it finished before a signal came.

        Raises:
            CommandError: a process has ended by itself.
        """
        working = asyncio.ensure_future(work)
        stop = asyncio.create_task(self._stopping.wait())
        ends = [asyncio.create_task(end) for end in self._stack.waits()]
        tasks: list[asyncio.Future[Any]] = [working, stop, *ends]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        done = [task for task in tasks if task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if stop in done:
            return False
        for end in ends:
            if end in done:
                raise CommandError(end.result())
        working.result()
        return True

    # --- planning

    def _plan(self, manifests: Manifests) -> Planned:
        if manifests.errors:
            raise CommandError("\n".join(manifests.errors))
        planned = planning.plan(self._pool(manifests), manifests.resources)
        if self._endpoints:
            del planned.snapshot.endpoints.endpoints[:]
            planned.snapshot.endpoints.endpoints.extend(
                pb.Endpoint(address=address, name=address) for address in self._endpoints
            )
        return planned

    def _pool(self, manifests: Manifests) -> AnyPool:
        folder, name = self._settings.folder, self._settings.pool
        pools = planning.pools(manifests.resources)
        names = ", ".join(map(_full_name, pools)) or "none"
        if name is not None:
            pools = [pool for pool in pools if name in (pool.metadata.name, _full_name(pool))]
            if not pools:
                raise CommandError(
                    f"--pool {name}: {folder} has no such InferencePool; it has {names}"
                )
        if not pools:
            raise CommandError(f"{folder}: holds no InferencePool")
        if len(pools) > 1:
            raise CommandError(
                f"{folder}: holds several InferencePools ({names}); choose one with --pool NAME"
            )
        return pools[0]

    def _complain(self, manifests: Manifests, planned: Planned) -> None:
        """Print what has no effect, once per message."""
        problems = [*planning.unattached(manifests.resources), *planned.problems]
        lines = [*manifests.ignored, *(wording.printable(str(problem)) for problem in problems)]
        if not planned.snapshot.endpoints.endpoints:
            lines.append("the pool has no endpoints: requests will wait for some")
        for line in lines:
            if line not in self._said:
                self._console.print(f"warning: {line}", style="yellow")
        self._said = frozenset(lines)

    async def _watch(self, plan_file: Path, planned: Planned) -> None:
        """Follow the folder; what cannot be planned leaves the last good plan in force.

        Raises:
            CommandError: the folder cannot be watched.
        """
        current = planned.snapshot
        refused: str | None = None
        try:
            async for manifests in sources.changes(self._settings.folder):
                try:
                    planned = self._plan(manifests)
                except CommandError as error:
                    if str(error) != refused:
                        self._console.print(
                            f"not taken, the last good plan stays:\n{error}", style="red"
                        )
                    refused = str(error)
                    continue
                self._complain(manifests, planned)
                if planned.snapshot != current:
                    _write(plan_file, planned)
                    changes = planning.differences(current, planned.snapshot)
                    self._console.print(_listed("plan written", changes))
                    current = planned.snapshot
                elif refused:
                    self._console.print("manifests are valid again; the plan is as before")
                refused = None
        except OSError as error:
            raise CommandError(f"{self._settings.folder}: cannot be watched: {error}") from error

    # --- what people see

    def _show(self, planned: Planned) -> None:
        plan, endpoints = planned.snapshot.plan, planned.snapshot.endpoints.endpoints
        table = Table(title=f"forebay serves InferencePool {plan.pool}", title_justify="left")
        for column in ("band", "fairness", "ttl", "queue", "models"):
            table.add_column(column)
        models: list[str] = []
        for band in plan.bands:
            names = [model.name for model in plan.models if model.band == band.name]
            models += names
            table.add_row(
                band.name,
                band.fairness,
                f"{band.ttl_seconds:g} s",
                f"{band.max_requests} requests",
                wording.printable(", ".join(names)) or "-",
            )
        given, say, address = self._settings, self._console.print, self._stack.address
        say(table)
        say(f"endpoints  {', '.join(endpoint.address for endpoint in endpoints) or 'none'}")
        say(f"queues     http://{address(given.metrics_port)}/debug/queues")
        say(f"metrics    http://{address(given.metrics_port)}/metrics")
        if given.no_proxy:
            say(f"ext_proc   {address(given.grpc_port)}")
        else:
            url = f"http://{address(given.http_port)}"
            say(f"requests   {url}\n\n  {_curl(url, models[0] if models else 'any')}")
        say(f"\nedit {given.folder} and the endpoint picker follows; Ctrl-C ends")


def _curl(url: str, model: str) -> str:
    """Write a command that sends a first request."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hi"}]})
    where, what = shlex.quote(f"{url}/v1/chat/completions"), shlex.quote(body)
    return f"curl {where} -H 'content-type: application/json' -d {what}"


def _listed(title: str, lines: Sequence[str]) -> str:
    shown = [wording.printable(line) for line in lines[:MAX_CHANGES]]
    if len(lines) > MAX_CHANGES:
        shown.append(f"and {len(lines) - MAX_CHANGES} more")
    return "\n  ".join([f"{title}:", *shown])


def _full_name(pool: AnyPool) -> str:
    return f"{pool.metadata.namespace}/{pool.metadata.name}"


def _write(path: Path, planned: Planned) -> None:
    """Replace the plan file in one step, so that nobody reads half of it."""
    new = path.with_suffix(".new")
    new.write_text(json_format.MessageToJson(planned.snapshot))
    new.replace(path)
