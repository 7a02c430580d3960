"""From pods and EndpointSlices to the endpoints of one pool."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

from forebay_control.limits import MAX_ENDPOINTS
from forebay_control.v1 import control_pb2 as pb
from forebay_operator.planning.membership import selects
from forebay_operator.planning.problem import problem_of
from forebay_operator.resources import POOL_LABEL, EndpointSlice, Pod
from forebay_operator.resources.kubernetes import ACTIVE_PORTS

if TYPE_CHECKING:
    from forebay_operator.planning.problem import Problem
    from forebay_operator.resources import AnyPool, Resource


def endpoints_of(pool: AnyPool, resources: list[Resource], problems: list[Problem]) -> pb.Endpoints:
    """Return the ready pods and each ready address of the pool's slices, ordered by address.

    A slice's ports count if it has any; else, and for pods, the pool's.
    """
    found: dict[str, pb.Endpoint] = {}
    for resource in resources:
        if isinstance(resource, Pod):
            if resource.ready and selects(pool.selector, resource):
                _add_pod(pool, resource, found)
        elif (
            isinstance(resource, EndpointSlice)
            and resource.metadata.labels.get(POOL_LABEL) == pool.metadata.name
        ):
            _add_slice(pool, resource, found, problems)
    addresses = sorted(found)
    if len(addresses) > MAX_ENDPOINTS:
        message = f"has {len(addresses)} endpoints; those beyond {MAX_ENDPOINTS} get no requests"
        problems.append(problem_of("InferencePool", pool.metadata, "TooManyEndpoints", message))
    return pb.Endpoints(endpoints=[found[address] for address in addresses[:MAX_ENDPOINTS]])


def _add_pod(pool: AnyPool, pod: Pod, found: dict[str, pb.Endpoint]) -> None:
    """Add a pod once per port; an annotation may leave only some of the ports."""
    host = _host(pod.status.pod_ip)
    if host is None:
        return
    active = next(
        (pod.metadata.annotations[key] for key in ACTIVE_PORTS if key in pod.metadata.annotations),
        None,
    )
    allowed = None if active is None else {text.strip() for text in active.split(",")}
    for rank, port in enumerate(pool.ports):
        if allowed is None or str(port) in allowed:
            name = f"{pod.metadata.name}-rank-{rank}" if len(pool.ports) > 1 else pod.metadata.name
            address, uid = f"{host}:{port}", pod.metadata.uid
            found.setdefault(address, pb.Endpoint(address=address, name=name, uid=uid))


def _add_slice(
    pool: AnyPool, part: EndpointSlice, found: dict[str, pb.Endpoint], problems: list[Problem]
) -> None:
    ports = tuple(port.port for port in part.ports if port.port) or pool.ports
    for endpoint in part.endpoints:
        if endpoint.conditions.ready is False:
            continue
        for text in endpoint.addresses:
            host = _host(text)
            if host is None:
                reason, message = "InvalidAddress", f"address {text!r} is not an IP address"
                problems.append(problem_of("EndpointSlice", part.metadata, reason, message))
                continue
            for port in ports:
                address = f"{host}:{port}"
                name = endpoint.target_ref.name or address
                uid = endpoint.target_ref.uid
                found.setdefault(address, pb.Endpoint(address=address, name=name, uid=uid))


def _host(text: str) -> str | None:
    """Write an IP address as needed before a colon and a port."""
    try:
        ip = ipaddress.ip_address(text)
    except ValueError:
        return None
    return f"[{ip}]" if ip.version == 6 else str(ip)
