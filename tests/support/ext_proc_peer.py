"""A running EPP without a process, and a bare ext_proc client to talk to it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from queue import Queue
from typing import TYPE_CHECKING

import grpc
from ports import free_port

from forebay_control.plan import Plan, SaturationMode, SaturationPlan
from forebay_epp.core.observation.shadowed import ShadowedController
from forebay_epp.core.terms import Endpoint
from forebay_epp.data_plane import DataPlane
from forebay_epp.traffic import Traffic
from forebay_epp.transport import PROCESS, Connections
from forebay_epp.transport.aio import AioTransport
from forebay_epp.transport.completion_queue import CompletionQueueTransport
from forebay_extproc.v3 import external_processor_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TRANSPORTS = {"completion-queue": CompletionQueueTransport, "aio": AioTransport}
DEADLINE_SECONDS = 10.0
MIN_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.002, 0.2


def until(claim: Callable[[], bool], seconds: float = DEADLINE_SECONDS) -> None:
    """Wait until a claim becomes true; fail if it does not in time.

    The longer the wait and the dearer the claim, the longer the pauses: a test that polls without
    one keeps a whole core from the programs that it waits for.
    """
    began = asked = time.monotonic()
    while not claim():
        now = time.monotonic()
        assert now < began + seconds, "did not come true in time"
        time.sleep(min(max(MIN_PAUSE_SECONDS, (now - began) / 10, now - asked), MAX_PAUSE_SECONDS))
        asked = time.monotonic()


class EPPThread:
    """An EPP's data plane on a thread of this process."""

    def __init__(
        self,
        transport: str,
        *,
        plan: Plan | None = None,
        endpoints: tuple[str, ...] = ("10.0.0.1:8000",),
        slots: int = 1,
        credentials: grpc.ServerCredentials | None = None,
        max_streams: int = 1000,
        connections: Connections | None = None,
        advertised: bool = False,
    ) -> None:
        self.plan = plan or Plan(
            saturation=SaturationPlan(SaturationMode.CONCURRENCY, max_concurrency=slots)
        )
        self.controller = ShadowedController(self.plan, random.Random(1))
        self.controller.set_endpoints([Endpoint(e) for e in endpoints], time.monotonic())
        self.traffic = Traffic()
        address = f"127.0.0.1:{free_port() if advertised else 0}"
        self.data_plane = DataPlane(
            self.controller, self.traffic, max_streams, address=address if advertised else ""
        )
        self.data_plane.serving = True
        self.transport = TRANSPORTS[transport](
            self.data_plane, address, credentials, connections or Connections()
        )
        self._thread = threading.Thread(target=self.transport.serve)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.transport.port}"

    def ask(self, question):
        """Have the data-plane thread answer."""
        answers = Queue()
        self.data_plane.post(lambda now: answers.put(question(now)))
        return answers.get(timeout=DEADLINE_SECONDS)

    def state(self):
        return self.ask(self.controller.state)

    def idle(self) -> bool:
        """Whether nothing is queued, in flight or open any more."""
        state = self.state()
        return (state.requests, state.in_flight, self.data_plane.open_streams) == (0, 0, 0)

    def stop(self) -> None:
        self.data_plane.post(lambda _: self.transport.stop())
        self._thread.join(DEADLINE_SECONDS)
        assert not self._thread.is_alive()


def http_headers(values: dict[str, str], *, end: bool = False) -> pb.HttpHeaders:
    """Headers as Envoy sends them: in `raw_value`."""
    return pb.HttpHeaders(
        headers=pb.HeaderMap(
            headers=[
                pb.HeaderValue(key=key, raw_value=value.encode()) for key, value in values.items()
            ]
        ),
        end_of_stream=end,
    )


def headers_message(
    path: str = "/v1/completions", *, end: bool = False, **more
) -> pb.ProcessingRequest:
    """The first message of a stream."""
    return pb.ProcessingRequest(
        request_headers=http_headers({":method": "POST", ":path": path, **more}, end=end),
        protocol_config=pb.ProtocolConfiguration(
            request_body_mode=pb.FULL_DUPLEX_STREAMED,
            response_body_mode=pb.FULL_DUPLEX_STREAMED,
        ),
    )


def body_message(body: bytes = b'{"model":"m"}', *, end: bool = True) -> pb.ProcessingRequest:
    """A piece of a request's body."""
    return pb.ProcessingRequest(request_body=pb.HttpBody(body=body, end_of_stream=end))


class Stream:
    """One ext_proc stream as a proxy holds it."""

    def __init__(self, channel: grpc.Channel, **metadata: str) -> None:
        self._outgoing = Queue()
        self.call = channel.stream_stream(
            PROCESS,
            request_serializer=pb.ProcessingRequest.SerializeToString,
            response_deserializer=pb.ProcessingResponse.FromString,
        )(
            iter(self._outgoing.get, None),
            timeout=60,
            metadata=[(key.replace("_", "-"), value) for key, value in metadata.items()],
        )

    def send(self, **fields) -> None:
        self._outgoing.put(pb.ProcessingRequest(**fields))

    def half_close(self) -> None:
        self._outgoing.put(None)

    def cancel(self) -> None:
        self.call.cancel()

    def answer(self) -> pb.ProcessingResponse:
        return next(self.call)

    def send_headers(self, path: str = "/v1/completions", *, end: bool = False, **more) -> None:
        self._outgoing.put(headers_message(path, end=end, **more))

    def send_body(self, body: bytes, *, end: bool = True) -> None:
        self._outgoing.put(body_message(body, end=end))

    def send_request(self, body: bytes = b'{"model":"m"}') -> None:
        self.send_headers()
        self.send_body(body)

    def routed(self) -> str:
        """Take the answer to a whole request and return the endpoint it names."""
        headers = self.answer().request_headers.response.header_mutation.set_headers
        endpoint = next(
            h.header.raw_value.decode()
            for h in headers
            if h.header.key == "x-gateway-destination-endpoint"
        )
        while True:
            piece = self.answer().request_body.response.body_mutation.streamed_response
            if piece.end_of_stream:
                return endpoint

    def respond(self, body: bytes = b"{}", status: str = "200") -> None:
        """Show the EPP a whole answer and take its echo."""
        self.send(response_headers=http_headers({":status": status}))
        assert self.answer().HasField("response_headers")
        self.send(response_body=pb.HttpBody(body=body, end_of_stream=True))
        echo = self.answer().response_body.response.body_mutation.streamed_response
        assert (echo.body, echo.end_of_stream) == (body, True)


@contextmanager
def client_process(program: str, address: str, word: str) -> Iterator[subprocess.Popen]:
    """A client in a process of its own, once it has printed `word`; it ends with the block.

    The program finds the address in `sys.argv[1]` and may import what tests import.
    """
    command = [sys.executable, "-P", "-c", program, address]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        try:
            assert process.stdout.readline() == f"{word}\n".encode()
            yield process
        finally:
            process.kill()


@contextmanager
def channel(address: str) -> Iterator[grpc.Channel]:
    """A channel of its own TCP connection."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(address, options=options) as open_channel:
        yield open_channel
