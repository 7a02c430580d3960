"""The baseline of hack/bench transport: a public grpc.aio servicer that does nothing.

It collects the body, names a fixed destination, and echoes the answer: no policy, no queue, no
metrics, no parsing. Run as `bare_aio.py GRPC_PORT DESTINATION`.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from forebay_extproc.v3 import external_processor_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"


class Servicer:
    """The smallest EPP."""

    def __init__(self, destination: str) -> None:
        """Answer with this destination, always."""
        self._route = pb.ProcessingResponse()
        response = self._route.request_headers.response
        response.clear_route_cache = True
        response.header_mutation.set_headers.add().header.CopyFrom(
            pb.HeaderValue(key="x-gateway-destination-endpoint", raw_value=destination.encode())
        )

    async def process(
        self, requests: AsyncIterator[pb.ProcessingRequest], _: Any
    ) -> AsyncIterator[pb.ProcessingResponse]:
        """Carry one request."""
        body = b""
        async for message in requests:
            match message.WhichOneof("request"):
                case "request_body":
                    body += message.request_body.body
                    if message.request_body.end_of_stream:
                        yield self._route
                        yield pb.ProcessingResponse(
                            request_body=_echo(pb.HttpBody(body=body, end_of_stream=True))
                        )
                case "response_headers":
                    yield pb.ProcessingResponse(response_headers=pb.HeadersResponse())
                case "response_body":
                    yield pb.ProcessingResponse(response_body=_echo(message.response_body))


def _echo(body: pb.HttpBody) -> pb.BodyResponse:
    streamed = pb.StreamedBodyResponse(body=body.body, end_of_stream=body.end_of_stream)
    return pb.BodyResponse(
        response=pb.CommonResponse(body_mutation=pb.BodyMutation(streamed_response=streamed))
    )


class Health(health_pb2_grpc.HealthServicer):
    """Always serving."""

    async def Check(self, *_: Any) -> health_pb2.HealthCheckResponse:  # noqa: N802  # its name
        """Answer Envoy's health check."""
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


async def main() -> None:
    """Serve until killed."""
    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(
        Servicer(sys.argv[2]).process,
        pb.ProcessingRequest.FromString,
        pb.ProcessingResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(SERVICE, {"Process": handler}),)
    )
    health_pb2_grpc.add_HealthServicer_to_server(Health(), server)
    server.add_insecure_port(f"127.0.0.1:{sys.argv[1]}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
