"""From the control plane's Snapshot message to a Plan and endpoints.

The contract is control.proto. What a plan is and how it is mapped is forebay_control's.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

from google.protobuf import json_format

from forebay_control.limits import MAX_ENDPOINTS
from forebay_control.mapping import plan_from_message
from forebay_control.plan import Plan, PlanError
from forebay_control.v1 import control_pb2 as pb
from forebay_epp.core.terms import Endpoint

if TYPE_CHECKING:
    from forebay_control.fields import Problem


def parse_snapshot_json(text: str) -> tuple[Plan, tuple[Endpoint, ...]]:
    """Read a Snapshot in protobuf's JSON form; see `parse_snapshot`.

    Raises:
        PlanError: the text is not a Snapshot, or not a valid one.
    """
    try:
        message = json_format.Parse(text, pb.Snapshot())
    except json_format.ParseError as error:
        raise PlanError([("snapshot", f"is not a Snapshot message: {error}")]) from None
    return parse_snapshot(message)


def parse_snapshot(message: pb.Snapshot) -> tuple[Plan, tuple[Endpoint, ...]]:
    """Map and validate.

    Raises:
        PlanError: with the path of every field that is wrong.
    """
    problems: list[Problem] = []
    try:
        plan = plan_from_message(message.plan)
    except PlanError as error:
        problems += error.problems
    endpoints = _endpoints(message.endpoints, problems)
    if problems:
        raise PlanError(problems)
    return plan, endpoints


def parse_endpoints(message: pb.Endpoints) -> tuple[Endpoint, ...]:
    """Map and validate endpoints that come without a plan.

    Raises:
        PlanError: with the path of every field that is wrong.
    """
    problems: list[Problem] = []
    endpoints = _endpoints(message, problems)
    if problems:
        raise PlanError(problems)
    return endpoints


def _endpoints(message: pb.Endpoints, problems: list[Problem]) -> tuple[Endpoint, ...]:
    if len(message.endpoints) > MAX_ENDPOINTS:
        text = f"must have at most {MAX_ENDPOINTS} entries, has {len(message.endpoints)}"
        problems.append(("endpoints.endpoints", text))
        return ()
    seen: set[str] = set()
    endpoints: list[Endpoint] = []
    for index, endpoint in enumerate(message.endpoints):
        path = f"endpoints.endpoints[{index}].address"
        if not _is_address(endpoint.address):
            problems.append((path, f"{endpoint.address!r} is not ip:port"))
        elif endpoint.address in seen:
            problems.append((path, f"{endpoint.address!r} is given twice"))
        seen.add(endpoint.address)
        endpoints.append(Endpoint(endpoint.address, endpoint.name, endpoint.uid))
    return tuple(endpoints)


def _is_address(text: str) -> bool:
    """Check for ip:port in the one form that makes equal addresses equal texts."""
    host, _, port = text.rpartition(":")
    try:
        ip = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
        number = int(port)
    except ValueError:
        return False
    return 0 < number <= 65535 and text == (
        f"[{ip}]:{number}" if ip.version == 6 else f"{ip}:{number}"
    )
