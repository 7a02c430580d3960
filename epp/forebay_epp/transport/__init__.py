"""gRPC servers that carry exchanges: two ways to move the same bytes, and what both need.

A transport owns the data-plane thread. What the bytes mean is codec/'s, what follows is loop's.
"""

from __future__ import annotations

from typing import Protocol

PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"


class Transport(Protocol):
    """A bound ext_proc server that serves until it is stopped."""

    @property
    def port(self) -> int:
        """The bound port."""

    def serve(self) -> None:
        """Serve on the calling thread, which becomes the data-plane thread, until `stop`."""

    def stop(self) -> None:
        """End serving and cancel what is still open; called on the data-plane thread."""
