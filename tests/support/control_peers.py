"""Bare ends of the control channel: an operator and an EPP that say what the test says."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, Queue
from typing import TYPE_CHECKING

import grpc
from manifest_reading import resource_of

from forebay_control.v1 import control_pb2 as pb
from forebay_control.v1 import control_pb2_grpc as rpc
from forebay_operator import planning

if TYPE_CHECKING:
    from collections.abc import Iterator

CONNECT = "/forebay.control.v1.Control/Connect"
WAIT_SECONDS = 30
POOL = "default/chat"
_POOL = resource_of(
    {
        "apiVersion": "inference.networking.k8s.io/v1",
        "kind": "InferencePool",
        "metadata": {"name": "chat", "namespace": "default"},
        "spec": {"selector": {"matchLabels": {"app": "a"}}, "targetPorts": [{"number": 8000}]},
    }
)
_PLAN = planning.plan(_POOL, [_POOL]).snapshot.plan


def snapshot(ttl_seconds: float = 30.0, pool: str = POOL, *addresses: str) -> pb.Snapshot:
    """What the operator plans for a pool without a policy; the number tells one from another."""
    made = pb.Snapshot(
        endpoints=pb.Endpoints(endpoints=[pb.Endpoint(address=a) for a in addresses])
    )
    made.plan.CopyFrom(_PLAN)
    made.plan.pool = pool
    made.plan.no_endpoints_ttl_seconds = ttl_seconds
    return made


def program(
    made: pb.Snapshot | bytes, epoch: int = 5, revision: int = 1, nonce: int = 1
) -> pb.Program:
    """A program as it travels."""
    data = made if isinstance(made, bytes) else made.SerializeToString()
    return pb.Program(
        nonce=nonce,
        version=pb.Version(epoch=epoch, revision=revision),
        sha256=hashlib.sha256(data).digest(),
        snapshot=data,
    )


class Puppet(rpc.ControlServicer):
    """A gRPC server with the operator's contract and none of its sense."""

    def __init__(self, port: int = 0) -> None:
        self.received: Queue[pb.FromPicker] = Queue()
        self.streams = 0
        self._outgoing: Queue[pb.FromOperator | None] = Queue()
        self._server = grpc.server(
            ThreadPoolExecutor(8),
            options=[("grpc.so_reuseport", 0), ("grpc.max_send_message_length", -1)],
        )
        rpc.add_ControlServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self._server.start()

    def Connect(self, messages, context) -> Iterator[pb.FromOperator]:  # noqa: N802
        self.streams += 1
        outgoing = self._outgoing = Queue()
        context.add_callback(lambda: outgoing.put(None))
        threading.Thread(target=self._read, args=(messages,), daemon=True).start()
        yield pb.FromOperator(ping=pb.Ping())
        yield from iter(outgoing.get, None)

    def _read(self, messages) -> None:
        with suppress(grpc.RpcError):
            for message in messages:
                self.received.put(message)

    def send(self, **fields) -> None:
        """Send on the newest stream."""
        self._outgoing.put(pb.FromOperator(**fields))

    def end(self) -> None:
        """End the newest stream in order."""
        self._outgoing.put(None)

    def next(self, *kinds: str, seconds: float = WAIT_SECONDS):
        """The next message of one of these kinds."""
        while True:
            message = self.received.get(timeout=seconds)
            kind = message.WhichOneof("message")
            if kind in kinds:
                return getattr(message, kind)

    def answer(self, sent: pb.Program) -> pb.Ack | pb.Nack:
        """Send a program and return what the EPP says to it."""
        self.send(program=sent)
        answer = self.next("ack", "nack")
        assert answer.nonce == sent.nonce
        return answer

    def stop(self) -> None:
        self._server.stop(0).wait()


class Peer:
    """A gRPC client with an EPP's contract and none of its sense."""

    def __init__(
        self,
        port: int,
        credentials: grpc.ChannelCredentials | None = None,
        *,
        token: str | None = None,
        server_name: str = "",
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
        if server_name:
            options.append(("grpc.ssl_target_name_override", server_name))
        address = f"127.0.0.1:{port}"
        self._channel = (
            grpc.insecure_channel(address, options)
            if credentials is None
            else grpc.secure_channel(address, credentials, options)
        )
        bearer = (("authorization", f"Bearer {token}"),) if token is not None else ()
        self._outgoing: Queue[bytes | None] = Queue()
        self.call = self._channel.stream_stream(CONNECT)(
            iter(self._outgoing.get, None), metadata=(*bearer, *metadata), timeout=600
        )

    def send(self, **fields) -> None:
        self.send_bytes(pb.FromPicker(**fields).SerializeToString())

    def send_bytes(self, data: bytes) -> None:
        self._outgoing.put(data)

    def hello(self, **fields) -> Peer:
        """Say hello as an EPP of the pool; the fields replace what it usually says."""
        usual = {"protocol": 1, "pool": POOL, "pod_uid": "uid-0", "pod_name": "epp-0"}
        self.send(hello=pb.Hello(**{"pod_namespace": "default", **usual, **fields}))
        return self

    def next(self, *kinds: str):
        """The next message of one of these kinds; raises RpcError once the stream is over."""
        while True:
            message = pb.FromOperator.FromString(next(self.call))
            kind = message.WhichOneof("message")
            if kind in kinds:
                return getattr(message, kind)

    def program(self) -> pb.Program:
        return self.next("program")

    def ack(self, sent: pb.Program) -> None:
        self.send(ack=pb.Ack(nonce=sent.nonce, version=sent.version, sha256=sent.sha256))

    def ended(self) -> tuple[grpc.StatusCode, str]:
        """Wait for the end of the stream and return its status."""
        with suppress(grpc.RpcError):
            for _ in self.call:
                pass
        return self.call.code(), self.call.details()

    def close(self) -> None:
        self._outgoing.put(None)
        self._channel.close()


__all__ = ["Empty", "Peer", "Puppet", "program", "snapshot"]
