"""The fallback transport: public grpc.aio behind the same exchanges.

Tests use it as an oracle for completion_queue.py; users get it with `--transport=aio` should a
grpcio release break the private API there. It costs several times the CPU (hack/bench transport).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from forebay_epp.codec.extproc.watching import calling
from forebay_epp.transport import PROCESS, health

if TYPE_CHECKING:
    from forebay_epp.data_plane import DataPlane
    from forebay_epp.exchange import Exchange
    from forebay_epp.transport import Connections


class AioTransport:
    """An ext_proc server on grpc.aio; see `CompletionQueueTransport` for the arguments."""

    def __init__(
        self,
        data_plane: DataPlane,
        address: str,
        credentials: grpc.ServerCredentials | None,
        connections: Connections,
    ) -> None:
        self._data_plane = data_plane
        self._stopping = asyncio.Event()
        self._runner = asyncio.Runner()
        self._server = self._runner.run(self._bind(address, credentials, connections))

    async def _bind(
        self, address: str, credentials: grpc.ServerCredentials | None, connections: Connections
    ) -> grpc.aio.Server:
        server = grpc.aio.server(options=connections.options())
        server.add_generic_rpc_handlers((_Handlers(self),))
        if credentials is None:
            self._port = server.add_insecure_port(address)
        else:
            self._port = server.add_secure_port(address, credentials)
        await server.start()
        return server

    @property
    def port(self) -> int:
        """The bound port."""
        return self._port

    def stop(self) -> None:
        """Cancel what is open and have `serve` return."""
        self._stopping.set()

    def serve(self) -> None:
        """Serve until `stop`."""
        with self._runner:
            self._runner.run(self._serve())

    async def _serve(self) -> None:
        data_plane = self._data_plane
        while not self._stopping.is_set():
            data_plane.tick()
            await asyncio.sleep(data_plane.timeout(data_plane.clock()))
        await self._server.stop(grace=None)

    async def process(self, _: Any, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """Carry one exchange."""
        wake = asyncio.Event()
        filter_ = calling(context.invocation_metadata() or ())
        exchange = self._data_plane.open(wake.set, context.peer(), filter_)
        reader = asyncio.create_task(self._read(exchange, context, wake))
        try:
            while True:
                wake.clear()
                while exchange.outbox:
                    await context.write(exchange.outbox.popleft())
                if exchange.ended:
                    break
                await wake.wait()
            if exchange.failure is not None:
                context.set_code(grpc.StatusCode.INVALID_ARGUMENT)
                context.set_details(exchange.failure)
        finally:
            reader.cancel()
            exchange.close()

    async def _read(
        self,
        exchange: Exchange,
        context: grpc.aio.ServicerContext[bytes, bytes],
        wake: asyncio.Event,
    ) -> None:
        while not exchange.ended:
            message = await context.read()
            if isinstance(message, bytes):
                exchange.receive(message)
                wake.set()
            else:
                exchange.half_close()
                wake.set()
                return

    async def check(self, _: bytes, __: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        """Answer a health check."""
        return health.answer(serving=self._data_plane.serving)


class _Handlers(grpc.GenericRpcHandler):
    """Routes by method name; messages stay bytes."""

    def __init__(self, transport: AioTransport) -> None:
        self._routes: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            PROCESS: grpc.stream_stream_rpc_method_handler(transport.process),
            health.CHECK: grpc.unary_unary_rpc_method_handler(transport.check),
        }

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        return self._routes.get(handler_call_details.method)
