"""Flags of `python -m forebay_epp`; names follow the upstream endpoint pickers where they exist."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

TRANSPORTS = ("completion-queue", "aio")

_DURATION = re.compile(r"(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?(?:(\d+)ms)?")


@dataclass(frozen=True, slots=True)
class Settings:
    """What an endpoint picker process is told at start."""

    pool_name: str
    plan_file: Path
    bind_address: str
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
    raise argparse.ArgumentTypeError(f"{text!r} is not a port of 0 to 65535")


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
        SystemExit: it is wrong (the error is printed), or asks for help.
    """
    parser = argparse.ArgumentParser(
        prog="forebay_epp",
        description="Endpoint picker: queues requests per model and criticality before it chooses "
        "a model server. Speaks Envoy's ext_proc.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--pool-name", default="default", help="InferencePool this endpoint picker serves")
    add("--plan-file", type=Path, required=True, help="plan and endpoints as JSON; watched")
    add("--bind-address", default="0.0.0.0", help="address of all ports")  # noqa: S104  # pods
    add("--grpc-port", type=_port, default=9002, help="ext_proc")
    add("--grpc-health-port", type=_port, default=9003, help="grpc.health.v1, plaintext")
    add("--metrics-port", type=_port, default=9090, help="/metrics and /debug/queues")
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
        help="folder with tls.crt and tls.key, reloaded when they change; self-signed without",
    )
    add("--transport", choices=TRANSPORTS, default=TRANSPORTS[0], help="gRPC server")
    add(
        "--drain-timeout",
        type=_duration,
        default=10.0,
        help="after SIGTERM requests may still be dispatched this long, then get 503",
    )
    add(
        "--metrics-scrape-interval",
        type=_duration,
        default=0.2,
        help="pause between scrapes of one model server",
    )
    add("--max-streams", type=_positive, default=40_000, help="open requests; beyond: 429")
    add(
        "--max-message-bytes",
        type=_positive,
        default=64 << 20,
        help="largest gRPC message; a proxy may send a whole body in one",
    )
    add("-v", "--verbosity", type=int, default=1, help="0 warnings, 1 changes, 2 everything")
    given = parser.parse_args(arguments)
    return Settings(
        pool_name=given.pool_name,
        plan_file=given.plan_file,
        bind_address=given.bind_address,
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
    )
