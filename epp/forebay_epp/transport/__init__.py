"""gRPC servers that carry exchanges: two ways to move the same bytes, and what both need.

A transport owns the data-plane thread. What the bytes mean is decided in codec/, what follows from
it in data_plane.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"

_UNLIMITED = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class Connections:
    """How long a proxy's connection lives.

    Attributes:
        max_message_bytes: larger messages are refused by grpc.
        keepalive_seconds: a connection that has been silent for this long gets a ping.
        keepalive_timeout_seconds: one that does not answer it in this time is closed, which
            ends its streams and frees their slots.
        max_age_seconds: after this, give or take a tenth, the proxy is asked for a new connection,
            so that requests reach EPPs that were added. Streams that are open stay as long
            as they like.
        min_ping_seconds: a proxy that pings more often than this, while nothing is sent to it, is
            cut.
    """

    max_message_bytes: int = 64 << 20
    keepalive_seconds: float = 20.0
    keepalive_timeout_seconds: float = 20.0
    max_age_seconds: float = 300.0
    min_ping_seconds: float = 1.0

    def options(self) -> tuple[tuple[str, int], ...]:
        """Return grpc's options of a server; both transports have the same."""
        return (
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_concurrent_streams", _UNLIMITED),
            # The core drops streams at random when 1,000 are not yet accepted, which a burst
            # reaches; the data plane has a cap that answers.
            ("grpc.server.max_pending_requests", _UNLIMITED),
            ("grpc.server.max_pending_requests_hard_limit", _UNLIMITED),
            ("grpc.keepalive_time_ms", _milliseconds(self.keepalive_seconds)),
            ("grpc.keepalive_timeout_ms", _milliseconds(self.keepalive_timeout_seconds)),
            # The core also pings to measure bandwidth. While such a ping is out no keepalive ping
            # is sent, and by default it waits 60 s for its answer.
            ("grpc.http2.ping_timeout_ms", _milliseconds(self.keepalive_timeout_seconds)),
            # Without this a ping on a connection without streams counts as too early for 2 hours.
            ("grpc.keepalive_permit_without_calls", 1),
            # While nothing is sent the core forgives two pings that come sooner than this, by
            # default 5 minutes; the third is answered with GOAWAY (too_many_pings).
            (
                "grpc.http2.min_ping_interval_without_data_ms",
                _milliseconds(self.min_ping_seconds),
            ),
            ("grpc.max_connection_age_ms", _milliseconds(self.max_age_seconds)),
            ("grpc.max_connection_age_grace_ms", _UNLIMITED),
        )


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)


class Transport(Protocol):
    """A bound ext_proc server that serves until it is stopped."""

    @property
    def port(self) -> int:
        """The bound port."""

    def serve(self) -> None:
        """Serve on the calling thread, which becomes the data-plane thread, until `stop`."""

    def stop(self) -> None:
        """End serving and cancel what is still open; called on the data-plane thread."""
