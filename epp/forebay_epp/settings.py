"""Flags of `python -m forebay_epp`; names follow the upstream endpoint pickers where they exist."""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path

TRANSPORTS = ("completion-queue", "aio")

_DURATION = re.compile(r"(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?(?:(\d+)ms)?")


@dataclass(frozen=True, slots=True)
class ControlSettings:
    """The operator's address, the identity that it sees, and where its programs are kept."""

    host: str
    port: int
    server_name: str
    ca_path: Path | None
    token_path: Path | None
    cert_path: Path | None
    pod_namespace: str
    pod_name: str
    pod_uid: str
    state_path: Path | None
    bootstrap_timeout_seconds: float
    stats_interval_seconds: float


@dataclass(frozen=True, slots=True)
class Settings:
    """The flags of an EPP; `plan_file` xor `control` is set."""

    pool_namespace: str
    pool_name: str
    plan_file: Path | None
    control: ControlSettings | None
    bind_address: str
    advertised_address: str
    grpc_port: int
    grpc_health_port: int
    metrics_port: int
    secure_serving: bool
    cert_path: Path | None
    transport: str
    drain_timeout_seconds: float
    scrape_interval_seconds: float
    max_streams: int
    max_message_bytes: int
    verbosity: int
    live_to_all: bool = False


def _boolean(text: str) -> bool:
    match text.lower():
        case "true" | "1":
            return True
        case "false" | "0":
            return False
    raise argparse.ArgumentTypeError(f"{text!r} is not true or false")


def _port(text: str) -> int:
    if text.isdecimal() and int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")


def _positive(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")


def _duration(text: str) -> float:
    match = _DURATION.fullmatch(text)
    if match is None or not text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration such as 10s, 500ms or 1m30s")
    minutes, seconds, milliseconds = (float(part or 0) for part in match.groups())
    return minutes * 60 + seconds + milliseconds / 1000


def parse(arguments: list[str] | None = None) -> Settings:
    """Read the command line.

    Raises:
        SystemExit: it is invalid (the error is printed), or asks for help.
    """
    parser = argparse.ArgumentParser(
        prog="forebay_epp",
        description="Endpoint picker: queues requests per model and criticality before it chooses "
        "a model server. Speaks Envoy's ext_proc.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--pool-name", default="default", help="InferencePool that this EPP serves")
    add(
        "--pool-namespace",
        default=os.environ.get("POD_NAMESPACE", "default"),
        help="its namespace (default: $POD_NAMESPACE)",
    )
    add(
        "--plan-file",
        type=Path,
        help="Plan and endpoints as JSON; watched; excludes --control-address",
    )
    _add_control(parser)
    add("--bind-address", default="0.0.0.0", help="address of all ports")  # noqa: S104  # pods
    add(
        "--advertised-address",
        default=os.environ.get("POD_IP", ""),
        metavar="IP",
        help="where a proxy that knows several EPPs finds this one, to show it its answers "
        "(default: $POD_IP)",
    )
    add("--grpc-port", type=_port, default=9002, help="ext_proc")
    add("--grpc-health-port", type=_port, default=9003, help="grpc.health.v1, plaintext")
    add("--metrics-port", type=_port, default=9090, help="/metrics, /live and /debug/queues")
    add(
        "--live-to-all",
        action="store_true",
        help="show /live to other machines too: it names models and tenants",
    )
    add(
        "--secure-serving",
        type=_boolean,
        nargs="?",
        const=True,
        default=True,
        help="TLS on the ext_proc port",
    )
    add(
        "--cert-path",
        type=Path,
        help="folder with tls.crt and tls.key, reloaded when they change (default: self-signed)",
    )
    add("--transport", choices=TRANSPORTS, default=TRANSPORTS[0], help="gRPC server")
    add(
        "--drain-timeout",
        type=_duration,
        default=120.0,
        help="how long after SIGTERM requests are still dispatched and answered; then waiting "
        "requests get 503, and 5s later running answers are cut. The process ends as soon as "
        "no request is left",
    )
    add(
        "--metrics-scrape-interval",
        type=_duration,
        default=0.2,
        help="interval between scrape starts of one model server",
    )
    add(
        "--max-streams", type=_positive, default=40_000, help="limit of open requests; more get 429"
    )
    add(
        "--max-message-bytes",
        type=_positive,
        default=64 << 20,
        help="largest gRPC message; a proxy may send a whole body in one",
    )
    add("-v", "--verbosity", type=int, default=1, help="0 warnings, 1 changes, 2 everything")
    given = parser.parse_args(arguments)
    if (given.plan_file is None) == (given.control_address is None):
        parser.error("exactly one of --plan-file and --control-address is needed")
    return Settings(
        pool_namespace=given.pool_namespace,
        pool_name=given.pool_name,
        plan_file=given.plan_file,
        control=_control(parser, given) if given.control_address else None,
        bind_address=given.bind_address,
        advertised_address=given.advertised_address,
        grpc_port=given.grpc_port,
        grpc_health_port=given.grpc_health_port,
        metrics_port=given.metrics_port,
        secure_serving=given.secure_serving,
        cert_path=given.cert_path,
        transport=given.transport,
        drain_timeout_seconds=given.drain_timeout,
        scrape_interval_seconds=given.metrics_scrape_interval,
        max_streams=given.max_streams,
        max_message_bytes=given.max_message_bytes,
        verbosity=given.verbosity,
        live_to_all=given.live_to_all,
    )


def _add_control(parser: argparse.ArgumentParser) -> None:
    """Declare the flags for the operator's connection."""
    add = parser.add_argument_group("operator").add_argument
    environ = os.environ.get
    add("--control-address", type=_host_port, metavar="HOST:PORT", help="the operator")
    add("--control-ca-path", type=Path, help="PEM bundle of the CA that signs its certificate")
    add("--control-server-name", default="", help="name in its certificate (default: HOST)")
    add("--control-token-path", type=Path, help="service account token to present")
    add("--control-cert-path", type=Path, help="folder with tls.crt and tls.key to present")
    add(
        "--control-insecure",
        action="store_true",
        help="plaintext instead of --control-ca-path; for a loopback address only",
    )
    add(
        "--pod-name",
        default=environ("POD_NAME", socket.gethostname()),
        help="this pod (default: $POD_NAME, or the host's name)",
    )
    add(
        "--pod-namespace",
        default=environ("POD_NAMESPACE", ""),
        help="its namespace (default: $POD_NAMESPACE, or the pool's)",
    )
    add("--pod-uid", default=environ("POD_UID", ""), help="its uid (default: $POD_UID)")
    add(
        "--state-path",
        type=Path,
        help="folder for the last program, so that a restart needs no operator",
    )
    add(
        "--bootstrap-timeout",
        type=_duration,
        default=30.0,
        help="how long to stay unready without any program before serving by built-in defaults "
        "(0s: wait for a program indefinitely)",
    )
    add(
        "--stats-interval",
        type=_report_interval,
        default=5.0,
        help="interval between reports to the operator, at least 1s",
    )


def _report_interval(text: str) -> float:
    seconds = _duration(text)
    if seconds < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is less than 1s")
    return seconds


def _host_port(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host, int(port)


def _control(parser: argparse.ArgumentParser, given: argparse.Namespace) -> ControlSettings:
    host, port = given.control_address
    if given.control_insecure == (given.control_ca_path is not None):
        parser.error("exactly one of --control-ca-path and --control-insecure is needed")
    if given.control_insecure:
        if not _is_loopback(host):
            parser.error(f"--control-insecure: {host} is not a loopback address")
        if given.control_token_path or given.control_cert_path:
            parser.error(
                "--control-insecure cannot be combined with "
                "--control-token-path or --control-cert-path"
            )
    return ControlSettings(
        host=host,
        port=port,
        server_name=given.control_server_name,
        ca_path=given.control_ca_path,
        token_path=given.control_token_path,
        cert_path=given.control_cert_path,
        pod_namespace=given.pod_namespace or given.pool_namespace,
        pod_name=given.pod_name,
        pod_uid=given.pod_uid,
        state_path=given.state_path,
        bootstrap_timeout_seconds=given.bootstrap_timeout,
        stats_interval_seconds=given.stats_interval,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
