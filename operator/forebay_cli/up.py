"""`forebay up DIR`: an EPP and its Envoy on this machine, until Ctrl-C.

The folder holds the manifests that kubectl takes. The operator that plans them runs in this process
and programs the EPP as it would in a cluster: edit a manifest and the EPP follows.
Planning belongs in forebay_operator, running processes in stack.py.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import json
import shlex
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from forebay_cli import OPERATOR_PORT, CommandError, envoy
from forebay_cli.output import console
from forebay_cli.stack import Stack, StackSettings
from forebay_control.channel import host_port
from forebay_operator import planning
from forebay_operator.resources import messages
from forebay_operator.standalone import sources
from forebay_operator.standalone.folder import FolderOperator

if TYPE_CHECKING:
    from rich.console import Console

    from forebay_control.v1 import control_pb2 as pb
    from forebay_operator.resources import AnyPool
    from forebay_operator.standalone.sources import Manifests


class Settings(StackSettings):
    """The command's arguments."""

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
    add("--pool", metavar="NAME", help="the InferencePool to serve, if the folder holds several")
    add(
        "--epps",
        type=_epps,
        default=1,
        metavar="N",
        help="EPPs that share the pool; ports of further ones are free ones",
    )
    add("--no-proxy", action="store_true", help="run no Envoy")
    add("--listen", type=_ip, default="127.0.0.1", metavar="IP", help="address of all ports")
    add("--http-port", type=_port, default=8080, metavar="PORT", help="Envoy's HTTP")
    add("--grpc-port", type=_port, default=9002, metavar="PORT", help="ext_proc")
    add("--grpc-health-port", type=_port, default=9003, metavar="PORT", help="gRPC health")
    add("--metrics-port", type=_port, default=9090, metavar="PORT", help="Prometheus metrics")
    add(
        "--operator-port",
        type=_port,
        default=OPERATOR_PORT,
        metavar="PORT",
        help="the operator's pages, for forebay get",
    )
    add("--envoy-admin-port", type=_port, default=0, metavar="PORT", help="0 picks one")
    add("--proxy-concurrency", type=_threads, default=1, metavar="N", help="Envoy's threads")
    add(
        "--responses",
        choices=(envoy.OBSERVE, envoy.READ),
        default=envoy.OBSERVE,
        help="Observe: the EPP sees when an answer ends, and no token passes through it. Read: "
        "answers pass through it, for exact token counts, times to first token, and the client's "
        "name of a model that a target renames",
    )
    add(
        "--secure-serving",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="TLS between Envoy and the EPP",
    )
    add("--live-to-all", action="store_true", help="show the live page to other machines too")
    add(
        "--transport",
        choices=("completion-queue", "aio"),
        default="completion-queue",
        help="the EPP's gRPC server",
    )


def _port(text: str) -> int:
    if text.isdecimal() and int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")


def _threads(text: str) -> int:
    if text.isdecimal() and 1 <= int(text) <= 256:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 256")


def _epps(text: str) -> int:
    if text.isdecimal() and 1 <= int(text) <= 32:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 32")


def _ip(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an IP address") from None


def run(settings: Settings) -> int:
    """Run until a signal and return the exit status.

    Raises:
        CommandError: it cannot start, or a process has ended by itself.
    """
    try:
        return asyncio.run(_Up(settings, console(stderr=True)).run())
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
        raise CommandError(f"--endpoint {text}: not a host name") from error
    family, *_, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    if family == socket.AF_INET6:
        return host_port(str(ipaddress.ip_address(address[0])), int(port))
    return host_port(str(address[0]), int(port))


class _Up:
    """One run of the command."""

    def __init__(self, settings: Settings, out: Console) -> None:
        self._settings = settings
        self._console = out
        # Each once: an endpoint is its address.
        self._endpoints = tuple(dict.fromkeys(address_of(text) for text in settings.endpoint))
        self._stack = Stack(settings, lambda line: out.print(line, style="dim"))
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()

    async def run(self) -> int:
        manifests = sources.read(self._settings.folder)
        pool = self._pool(manifests)
        self._stack.check()
        running = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup means it
                running.add_signal_handler(number, self._on_signal)
        operator = FolderOperator(self._settings.folder, self._tell, pool, self._endpoints)
        port = await operator.start(manifests, "127.0.0.1", 0, "127.0.0.1", self._operator_port)
        following = asyncio.create_task(operator.run())
        try:
            if await self._started(pool, port):
                self._show(operator.planned(pool))
                await self._unless_stopped(self._follow(following))
            self._console.print("stopping; a second Ctrl-C does not wait for open requests")
        finally:
            self._stopping.set()
            await self._stack.stop(self._hurry)
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            await operator.stop()
        return 0

    async def _started(self, pool: str, control_port: int) -> bool:
        """Start the processes; return whether all serve before a signal comes.

        Raises:
            CommandError: one has ended by itself or does not serve in time.
        """
        stack = self._stack
        await stack.start_epps(pool, control_port)
        if not await self._unless_stopped(stack.ready()):
            return False
        await stack.start_envoy()
        return await self._unless_stopped(stack.ready())

    @property
    def _operator_port(self) -> int:
        return self._settings.operator_port

    def _tell(self, line: str, bad: bool) -> None:  # noqa: FBT001  # the only property of a line
        self._console.print(line, style="yellow" if bad else "green")

    async def _follow(self, following: asyncio.Task[None]) -> None:
        """Wait for what should not end.

        Raises:
            CommandError: the folder cannot be watched.
        """
        try:
            await asyncio.shield(following)
        except OSError as error:
            raise CommandError(f"{self._settings.folder}: cannot be watched: {error}") from error

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

    def _pool(self, manifests: Manifests) -> str:
        """Return namespace/name of the pool to serve."""
        if manifests.errors:
            raise CommandError("\n".join(manifests.errors))
        folder, name = self._settings.folder, self._settings.pool
        pools = planning.pools(manifests.resources)
        names = ", ".join(map(_full_name, pools)) or "none"
        if name is not None:
            pools = [pool for pool in pools if name in (pool.metadata.name, _full_name(pool))]
            if not pools:
                raise CommandError(
                    f"--pool {name}: {folder} contains no such InferencePool; it contains {names}"
                )
        if not pools:
            raise CommandError(f"{folder}: contains no InferencePool")
        if len(pools) > 1:
            raise CommandError(
                f"{folder}: contains several InferencePools ({names}); choose one with --pool NAME"
            )
        return _full_name(pools[0])

    # --- what people see

    def _show(self, snapshot: pb.Snapshot) -> None:
        plan, endpoints = snapshot.plan, snapshot.endpoints.endpoints
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
                messages.printable(", ".join(names)) or "-",
            )
        given, say, address = self._settings, self._console.print, self._stack.address
        say(table)
        if not endpoints:
            self._tell("warning: the pool has no endpoints: requests will wait for some", True)
        say(f"endpoints  {', '.join(endpoint.address for endpoint in endpoints) or 'none'}")
        port = "" if self._operator_port == OPERATOR_PORT else f" --port={self._operator_port}"
        say(f"conditions forebay get{port}")
        for metrics_port in self._stack.metrics_ports:
            say(f"live page  http://{address(metrics_port)}/live")
            say(f"queues     http://{address(metrics_port)}/debug/queues")
            say(f"metrics    http://{address(metrics_port)}/metrics")
        if given.no_proxy:
            say(f"ext_proc   {address(given.grpc_port)}")
        else:
            url = f"http://{address(given.http_port)}"
            say(f"requests   {url}\n\n  {_curl(url, models[0] if models else 'any')}")
        say(f"\nedit {given.folder} and the EPP follows; Ctrl-C ends it")


def _curl(url: str, model: str) -> str:
    """Write a command that sends a first request."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hi"}]})
    where, what = shlex.quote(f"{url}/v1/chat/completions"), shlex.quote(body)
    return f"curl {where} -H 'content-type: application/json' -d {what}"


def _full_name(pool: AnyPool) -> str:
    return f"{pool.metadata.namespace}/{pool.metadata.name}"
