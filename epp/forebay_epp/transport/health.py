"""grpc.health.v1: whether this EPP takes requests, and whether it is alive.

`liveness` asks the second, on the health port only. Every other service name asks the first,
because proxies and charts ask under different ones. Watch is not implemented; probes use Check.
"""

from __future__ import annotations

from concurrent import futures
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable

CHECK = "/grpc.health.v1.Health/Check"
LIVENESS = "liveness"

_SERVING = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
_NOT_SERVING = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)
_BYTES: dict[bool, bytes] = {
    True: _SERVING.SerializeToString(),
    False: _NOT_SERVING.SerializeToString(),
}


def answer(*, serving: bool) -> bytes:
    """Return a serialised HealthCheckResponse."""
    return _BYTES[serving]


class _Servicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # has no stubs
    def __init__(self, serving: Callable[[], bool], alive: Callable[[], bool]) -> None:
        self._serving = serving
        self._alive = alive

    def Check(  # noqa: N802  # the service's method name
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> health_pb2.HealthCheckResponse:
        good = self._alive() if request.service == LIVENESS else self._serving()
        return _SERVING if good else _NOT_SERVING


def serve(
    address: str, serving: Callable[[], bool], alive: Callable[[], bool]
) -> tuple[grpc.Server, int]:
    """Start the plaintext health server.

    Args:
        address: where.
        serving: returns whether requests are welcome.
        alive: returns whether a restart would be no improvement; may block.

    Returns:
        The running server and its port.

    Raises:
        RuntimeError: the address is in use.
    """
    server = grpc.server(
        futures.ThreadPoolExecutor(max_workers=2, thread_name_prefix="health"),
        options=[("grpc.so_reuseport", 0)],
    )
    health_pb2_grpc.add_HealthServicer_to_server(_Servicer(serving, alive), server)
    port = server.add_insecure_port(address)
    server.start()
    return server, port
