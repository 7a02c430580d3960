"""Admits a control stream: reads its Hello and has the EPP's pod authenticated by trust.py.

Until then nothing that arrives is trusted and little of it is kept. Silent streams are few: at the
limit the oldest is closed for the next.
"""

from __future__ import annotations

import asyncio
import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError

from forebay_control.channel import PROTOCOL
from forebay_control.v1 import control_pb2 as pb
from forebay_operator.channel.session import MAX_NAME

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    Authorize = Callable[[pb.Hello, "Caller"], Awaitable[str]]

HELLO_SECONDS = 10.0
MAX_SILENT_STREAMS = 250
HASH_BYTES = 32
MAX_FEATURES = 64


class RefusedError(Exception):
    """An EPP that may not connect; `reason` is a metric label, the text is for its log."""

    def __init__(self, code: grpc.StatusCode, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Caller:
    """The peer that opened a stream, as far as the connection shows.

    Attributes:
        metadata: of the call, by key.
        auth: what TLS has verified, as in grpc's auth_context.
        address: IP address; empty for a peer that has none.
    """

    metadata: Mapping[str, Any]
    auth: Mapping[str, Any]
    address: str


class Admission:
    """Reads Hellos.

    Args:
        authorize: says which pod a Hello comes from (its uid), or raises RefusedError.
    """

    def __init__(self, authorize: Authorize) -> None:
        self._authorize = authorize
        self._silent: dict[asyncio.Timeout, None] = {}

    async def hello(self, context: grpc.aio.ServicerContext[Any, Any]) -> pb.Hello:
        """Read the first message.

        Raises:
            RefusedError: it did not come, or is not a Hello.
        """
        try:
            async with asyncio.timeout(HELLO_SECONDS) as deadline:
                self._take_place(deadline)
                try:
                    first = await context.read()
                finally:
                    self._silent.pop(deadline, None)
        except TimeoutError:
            raise RefusedError(
                grpc.StatusCode.DEADLINE_EXCEEDED, "silent", "no Hello came in time"
            ) from None
        except DecodeError:
            raise not_a_message() from None
        if not isinstance(first, pb.FromPicker) or first.WhichOneof("message") != "hello":
            raise RefusedError(
                grpc.StatusCode.INVALID_ARGUMENT, "protocol", "the first message must be Hello"
            )
        problem = _problem(first.hello)
        if problem:
            raise RefusedError(grpc.StatusCode.FAILED_PRECONDITION, "protocol", problem)
        return first.hello

    async def pod_uid(self, hello: pb.Hello, context: grpc.aio.ServicerContext[Any, Any]) -> str:
        """Return the uid of the pod that a Hello comes from.

        Raises:
            RefusedError: it is not that of one of the pool's EPPs.
        """
        metadata = dict(context.invocation_metadata() or ())
        caller = Caller(metadata, context.auth_context(), address_of(context.peer()))
        return await self._authorize(hello, caller)

    def _take_place(self, deadline: asyncio.Timeout) -> None:
        """Register a silent stream; at the limit, close the one that has been silent longest."""
        if len(self._silent) >= MAX_SILENT_STREAMS:
            oldest = next(iter(self._silent))
            del self._silent[oldest]
            if not oldest.expired():
                oldest.reschedule(0)
        self._silent[deadline] = None


def address_of(peer: str) -> str:
    """Return the IP address in grpc's name of a peer, such as `ipv6:%5B::1%5D:50000`.

    IPv4 that is written as IPv6 is returned as IPv4.
    """
    host = unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return ""
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def not_a_message() -> RefusedError:
    """Return the refusal of bytes that are no message."""
    text = "this is not a message of the control channel"
    return RefusedError(grpc.StatusCode.INVALID_ARGUMENT, "protocol", text)


def _problem(hello: pb.Hello) -> str:
    """Return what is wrong with a Hello, if anything."""
    if hello.protocol != PROTOCOL:
        return (
            f"protocol {hello.protocol} is not supported, only {PROTOCOL}: "
            "run EPPs and operator of neighbouring releases"
        )
    for name in ("pool", "pod_namespace", "pod_name", "pod_uid", "boot_id", "build"):
        if len(getattr(hello, name)) > MAX_NAME:
            return f"hello.{name} has more than {MAX_NAME} characters"
    if len(hello.features) > MAX_FEATURES:
        return f"hello.features has more than {MAX_FEATURES} entries"
    if hello.HasField("applied") and len(hello.applied.sha256) != HASH_BYTES:
        return f"hello.applied.sha256 must have {HASH_BYTES} bytes"
    return ""
