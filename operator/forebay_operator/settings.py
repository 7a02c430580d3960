"""Flags of `python -m forebay_operator`."""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from forebay_operator.resources.fields import Seconds

CLIENT_AUTHS = ("token", "certificate", "none")
PEER_ADDRESSES = ("pod", "any")
AUDIENCE = "forebay-control"

_LABEL_VALUE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class Settings:
    """The operator's flags: a field is the `dest` of the flag that `parse` declares for it."""

    namespaces: tuple[str, ...]
    manifests: Path | None
    control_bind_address: str
    control_port: int
    control_tls_path: Path | None
    control_tls_secret: str
    control_ca_configmaps: tuple[tuple[str, str], ...]
    control_server_name: str
    control_client_auth: str
    control_audience: str
    control_peer_address: str
    http_bind_address: str
    http_port: int
    lease_namespace: str
    lease_name: str
    controller_name: str
    identity: str
    endpoint_slices: bool
    sweep_interval_seconds: float
    verbosity: int


def _port(text: str) -> int:
    if text.isdecimal() and int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")


def _label_value(text: str) -> str:
    if _LABEL_VALUE.fullmatch(text):
        return text
    raise argparse.ArgumentTypeError(
        f"{text!r} is not the value of a label: at most 63 letters, digits, '.', '_' and '-', with "
        "a letter or digit at both ends"
    )


def _duration(text: str) -> float:
    try:
        return float(TypeAdapter(Seconds).validate_python(text))
    except ValidationError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a duration such as 60s or 5m, of at most 1h"
        ) from None


def _ip(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an IP address") from None


def parse(arguments: list[str] | None = None) -> Settings:
    """Read the command line.

    Raises:
        SystemExit: it is invalid (the error is printed), or asks for help.
    """
    parser = argparse.ArgumentParser(
        prog="forebay_operator",
        description="Plans the queues of every InferencePool, programs its EPPs and "
        "reports in the status of FlowControlPolicies and InferenceModels.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "-n",
        "--namespace",
        dest="namespaces",
        metavar="NAMESPACE",
        action="append",
        default=[],
        help="watch only this namespace; may be given several times (default: all)",
    )
    add("--manifests", type=Path, metavar="DIR", help="a folder of YAML instead of a cluster")
    add(
        "--endpoint-slices",
        action="store_true",
        help="also take servers from EndpointSlices that name a pool by label; anyone who may "
        "create one can then have requests sent to any address",
    )
    add("--control-bind-address", type=_ip, default="0.0.0.0", help="control channel")  # noqa: S104  # a pod's
    add("--control-port", type=_port, default=8443, help="control channel, gRPC")
    add(
        "--control-tls-path",
        type=Path,
        metavar="DIR",
        help="tls.crt and tls.key (and ca.crt for client certificates), reloaded when they change; "
        "without it and --control-tls-secret the control channel is plaintext, on a loopback "
        "address only",
    )
    _add_issuing(parser)
    add(
        "--control-client-auth",
        choices=CLIENT_AUTHS,
        default="token",
        help="how EPPs authenticate: a service account token of their pod, a "
        "client certificate with a SPIFFE URI, or not at all (on a loopback address only)",
    )
    add("--control-audience", default=AUDIENCE, help="audience of EPPs' tokens")
    add(
        "--control-peer-address",
        choices=PEER_ADDRESSES,
        default="pod",
        help="from where a pod's token or certificate is accepted: an address of the pod, or any "
        "address, for networks and meshes that rewrite addresses",
    )
    add("--http-bind-address", type=_ip, default="0.0.0.0", help="pages")  # noqa: S104  # a pod's
    add("--http-port", type=_port, default=8080, help="/metrics, /livez, /readyz, /resources")
    add(
        "--lease-namespace",
        default=os.environ.get("POD_NAMESPACE", "default"),
        help="namespace of the leader's Lease (default: $POD_NAMESPACE)",
    )
    add("--lease-name", default="forebay-operator", help="name of the leader's Lease")
    add(
        "--controller-name",
        type=_label_value,
        default="forebay",
        help="this operator acts on pools whose EPP Service has this as its label "
        "forebay.dev/controller (default: forebay)",
    )
    add(
        "--identity",
        default=os.environ.get("POD_UID", ""),
        help="an identity that survives a restart of this replica's container (default: $POD_UID)",
    )
    add(
        "--sweep-interval",
        dest="sweep_interval_seconds",
        metavar="DURATION",
        type=_duration,
        default=60.0,
        help="interval between LISTs of everything, which correct missed events (default: 60s)",
    )
    add("-v", "--verbosity", type=int, default=1, help="0 warnings, 1 changes, 2 everything")
    given = parser.parse_args(arguments)
    _check(parser, given)
    values = vars(given) | {
        "namespaces": tuple(dict.fromkeys(given.namespaces)),
        "control_ca_configmaps": tuple(
            (namespace or given.lease_namespace, name)
            for namespace, name in given.control_ca_configmaps
        ),
    }
    return Settings(**values)


def _add_issuing(parser: argparse.ArgumentParser) -> None:
    """Declare the flags for certificates that the operator issues itself."""
    add = parser.add_argument_group("own certificate authority").add_argument
    add(
        "--control-tls-secret",
        default="",
        metavar="NAME",
        help="issue the control channel's certificate and keep it in this Secret, which must "
        "exist in the Lease's namespace; instead of --control-tls-path",
    )
    add(
        "--control-ca-configmap",
        dest="control_ca_configmaps",
        type=_namespaced,
        action="append",
        default=[],
        metavar="[NAMESPACE/]NAME",
        help="publish the CA in this ConfigMap, which must exist; may be given several times",
    )
    add("--control-server-name", default="", metavar="DNS", help="name in that certificate")


def _namespaced(text: str) -> tuple[str, str]:
    namespace, slash, name = text.rpartition("/")
    if not name or (slash and not _LABEL.fullmatch(namespace)):
        raise argparse.ArgumentTypeError(f"{text!r} is not [NAMESPACE/]NAME")
    return namespace, name


def _check(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Refuse flags that do not go together."""
    local = ipaddress.ip_address(given.control_bind_address).is_loopback
    if not (given.control_tls_path or given.control_tls_secret or local):
        parser.error(
            "--control-tls-path or --control-tls-secret is required unless --control-bind-address "
            "is a loopback address"
        )
    _check_issuing(parser, given)
    if given.control_client_auth == "none" and not local:
        parser.error("--control-client-auth none needs a loopback --control-bind-address")
    if given.control_client_auth == "certificate" and given.control_tls_path is None:
        parser.error("--control-client-auth certificate needs --control-tls-path")
    if given.manifests is not None:
        _check_folder(parser, given)
    for flag in ("control_audience", "lease_namespace", "lease_name"):
        if not getattr(given, flag):
            parser.error(f"--{flag.replace('_', '-')} must not be empty")
    for namespace in given.namespaces:
        if not _LABEL.fullmatch(namespace):
            parser.error(f"--namespace: {namespace!r} is not the name of a namespace")


def _check_issuing(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Refuse an incomplete set of flags for issuing certificates."""
    issuing = bool(given.control_tls_secret)
    if issuing and given.control_tls_path is not None:
        parser.error("--control-tls-secret and --control-tls-path exclude each other")
    for flag, value in (
        ("--control-ca-configmap", given.control_ca_configmaps),
        ("--control-server-name", given.control_server_name),
    ):
        if bool(value) != issuing:
            parser.error(f"--control-tls-secret and {flag} need each other")


def _check_folder(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Refuse flags without effect with a folder, whose control channel is plaintext and open."""
    if given.control_client_auth != "none":
        parser.error("--manifests needs --control-client-auth none: no API server reviews tokens")
    for flag in ("control_tls_path", "control_tls_secret", "endpoint_slices"):
        if getattr(given, flag):
            name = flag.replace("_", "-")
            parser.error(f"--{name} has no effect with --manifests: leave it out")
    if not given.manifests.is_dir():
        parser.error(f"--manifests: {given.manifests} is not a folder")
