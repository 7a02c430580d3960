"""Many requests that wait at an EPP, in a known order, without a proxy."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import grpc
from ext_proc_peer import http_headers

from forebay_epp.transport import PROCESS
from forebay_extproc.v3 import external_processor_pb2 as pb

if TYPE_CHECKING:
    from typing import Self

    from loop_thread import LoopThread

WAIT_SECONDS = 60
CONFIG = pb.ProtocolConfiguration(
    request_body_mode=pb.BUFFERED, response_body_mode=pb.FULL_DUPLEX_STREAMED
)


class Waiting:
    """ext_proc streams of one request each; their proxy buffers bodies.

    To such a proxy an EPP says when a request has been queued, so that the order is known.

    Args:
        thread: where they run.
        grpc_port: the EPP's.

    Attributes:
        order: requests as they were dispatched.
        refused: outcome of those that were refused, and the seconds from sending to it.
    """

    def __init__(self, thread: LoopThread, grpc_port: int) -> None:
        self._thread = thread
        self._target = f"127.0.0.1:{grpc_port}"
        self._tasks: list[asyncio.Task[None]] = []
        self.order: list[int] = []
        self.refused: dict[int, tuple[str, float]] = {}

    def __enter__(self) -> Self:
        self._thread.do(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.do(self._close())

    async def _open(self) -> None:
        self._channel = grpc.aio.insecure_channel(self._target)
        self._process = self._channel.stream_stream(
            PROCESS,
            request_serializer=pb.ProcessingRequest.SerializeToString,
            response_deserializer=pb.ProcessingResponse.FromString,
        )

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close()

    def enqueue(self, number: int, model: str = "m") -> None:
        """Send a request and wait until it is queued."""
        self._thread.do(self._enqueue(number, model))

    async def _enqueue(self, number: int, model: str) -> None:
        call = self._process()
        head = http_headers({":method": "POST", ":path": "/v1/completions"})
        await call.write(pb.ProcessingRequest(request_headers=head, protocol_config=CONFIG))
        assert (await self._read(call)).HasField("request_headers")
        body = pb.HttpBody(body=b'{"model":"%b"}' % model.encode(), end_of_stream=True)
        began = time.monotonic()
        await call.write(pb.ProcessingRequest(request_body=body))
        answer = await self._read(call)
        assert answer.HasField("override_message_timeout"), answer
        self._tasks.append(asyncio.create_task(self._wait(number, call, began)))

    async def _read(self, call) -> pb.ProcessingResponse:
        return await asyncio.wait_for(call.read(), WAIT_SECONDS)

    async def _wait(self, number: int, call, began: float) -> None:
        """Take the decision; if it is to dispatch, answer at once as a model server."""
        answer = await call.read()
        if answer.HasField("immediate_response"):
            headers = answer.immediate_response.headers.set_headers
            outcomes = [h.header.raw_value for h in headers if h.header.key == "x-forebay-outcome"]
            assert number not in self.refused
            self.refused[number] = outcomes[0].decode(), time.monotonic() - began
        else:
            assert answer.HasField("request_body"), answer
            self.order.append(number)
            head = http_headers({":status": "200"})
            await call.write(pb.ProcessingRequest(response_headers=head))
            assert (await self._read(call)).HasField("response_headers")
            body = pb.HttpBody(body=b"{}", end_of_stream=True)
            await call.write(pb.ProcessingRequest(response_body=body))
            assert (await self._read(call)).HasField("response_body")
            await call.done_writing()
        assert await self._read(call) is grpc.aio.EOF, "a second answer"

    def serve_all(self) -> list[int]:
        """Wait until each request has had its decision; return who was dispatched, in order."""

        async def finish() -> None:
            await asyncio.wait_for(asyncio.gather(*self._tasks), WAIT_SECONDS)

        self._thread.do(finish())
        return self.order
