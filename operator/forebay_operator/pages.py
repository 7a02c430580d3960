"""The operator's HTTP pages: probes, metrics, and what it has planned and reported.

/resources names objects of every namespace, so only loopback peers get it; `kubectl port-forward`
is one. /metrics names pools, and anyone who reaches the port may read it; the chart's NetworkPolicy
restricts that.
"""

from __future__ import annotations

import ipaddress
import time
from typing import TYPE_CHECKING, Any

from aiohttp import web
from prometheus_client import REGISTRY, exposition

if TYPE_CHECKING:
    from collections.abc import Callable

    from forebay_operator.cluster.store import Store
    from forebay_operator.reconcile.statuses import Statuses

STUCK_SECONDS = 60.0


async def serve(
    address: str,
    port: int,
    statuses: Statuses,
    store: Store,
    alive_at: Callable[[], float],
    waits_for: Callable[[], str],
    lacks: Callable[[], str] = str,
) -> web.AppRunner:
    """Serve until the runner is cleaned up.

    Liveness fails only when the loops stand still, never because an API server is away: restarts
    would not bring it back. Every replica that knows the cluster is ready, whether it leads or not.

    Args:
        address: to listen on.
        port: to listen on.
        statuses: what they should be.
        store: what is known.
        alive_at: says when the loops last turned, in monotonic seconds.
        waits_for: says why the store is not filled yet, nothing when it is.
        lacks: says in lines what the operator may not do, nothing when it may do all it should.

    Raises:
        OSError: the address cannot be bound.
    """
    app = web.Application()
    app.add_routes(routes(statuses, store, alive_at, waits_for, lacks))
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, address, port).start()
    except OSError:
        await runner.cleanup()
        raise
    return runner


def routes(
    statuses: Statuses,
    store: Store,
    alive_at: Callable[[], float],
    waits_for: Callable[[], str],
    lacks: Callable[[], str] = str,
) -> list[web.RouteDef]:
    """Return the pages; the arguments are those of `serve`."""

    async def livez(_: web.Request) -> web.Response:
        late = time.monotonic() - alive_at()
        return web.Response(
            text=f"loop {late:.1f} s ago\n", status=503 if late > STUCK_SECONDS else 200
        )

    async def readyz(_: web.Request) -> web.Response:
        reason = waits_for()
        denied = "".join(f"denied: {line}\n" for line in lacks().splitlines())
        if reason:
            return web.Response(text=f"waits for {reason}\n{denied}", status=503)
        return web.Response(text=f"ok\n{denied}")

    async def metrics(request: web.Request) -> web.Response:
        data, kind = exposition.choose_encoder(request.headers.get("accept", ""))
        return web.Response(body=data(REGISTRY), headers={"content-type": kind})

    async def resources(request: web.Request) -> web.Response:
        if not _is_loopback(request.remote):
            message = "served to loopback only: use kubectl port-forward\n"
            return web.Response(text=message, status=403)
        return web.json_response({"items": listed(statuses, store)})

    return [
        web.get("/livez", livez),
        web.get("/readyz", readyz),
        web.get("/metrics", metrics),
        web.get("/resources", resources),
    ]


def listed(statuses: Statuses, store: Store) -> list[dict[str, Any]]:
    """Return each policy and model with the status it has now, as the API server would."""
    return [
        {
            "apiVersion": entry.kind.api_version,
            "kind": entry.kind.kind,
            "metadata": {
                "name": entry.metadata.name,
                "namespace": entry.metadata.namespace,
                "generation": entry.metadata.generation,
            },
            "status": status,
        }
        for namespace in store.namespaces()
        for entry, status in statuses.of(namespace)
    ]


def _is_loopback(peer: str | None) -> bool:
    """Return whether an IP address is this machine's own, also when IPv4 is written as IPv6."""
    try:
        address = ipaddress.ip_address(peer or "")
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
