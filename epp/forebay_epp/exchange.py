"""One ext_proc stream and its request.

Moving its bytes belongs in transport/, acting on its events in data_plane.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from forebay_epp.codec.extproc.events import Event
    from forebay_epp.codec.extproc.stream import ExtProcStream
    from forebay_epp.core.terms import Request
    from forebay_epp.reading import Unread


class Owner(Protocol):
    """The data plane, as an exchange knows it."""

    def read(self, exchange: Exchange, unread: Unread, event: Event | None) -> None:
        """Take a message of a request that was not complete when it came."""

    def handle(self, exchange: Exchange, event: Event) -> None:
        """Take an event."""

    def stop_reading(self, exchange: Exchange) -> None:
        """Note that the request will not be completed."""

    def forget(self, exchange: Exchange) -> None:
        """Note that the stream is gone."""


class Exchange:
    """One ext_proc stream and its request.

    The transport calls `receive`, `half_close` and `close`, then sends what `outbox` holds and, if
    `ended`, closes its side. `on_output` tells it that there is something to send although nothing
    has arrived. `close` is owed exactly once, whatever happened before.

    Attributes:
        outbox: messages to send, in order; the transport takes them out.
        unread: the request as long as it is not complete; None where there is to be none.
        request: what was submitted.
        refused: refused while it was read; it does not count as open any more.
        watches: the exchange whose answer this stream shows.
        headers_at: when the headers of an answer came of which nothing else is shown.
    """

    __slots__ = (
        *("_owner", "id", "on_output"),
        *("headers_at", "outbox", "refused", "request", "stream", "unread", "watches"),
    )

    def __init__(
        self,
        owner: Owner,
        exchange_id: int,
        stream: ExtProcStream,
        on_output: Callable[[], None],
    ) -> None:
        self._owner = owner
        self.id = exchange_id
        self.on_output = on_output
        self.stream = stream
        self.outbox = self.stream.outbox
        self.unread: Unread | None = None
        self.request: Request | None = None
        self.refused = False
        self.watches: Exchange | None = None
        self.headers_at = 0.0

    @property
    def ended(self) -> bool:
        """Whether the stream is to be closed once the outbox is sent."""
        return self.stream.ended

    @property
    def failure(self) -> str | None:
        """The text of the error status to close with, or None for OK."""
        return self.stream.failure

    @property
    def lockstep(self) -> bool:
        """Whether nothing will be sent before the next message has come."""
        return self.stream.lockstep

    def receive(self, data: bytes) -> None:
        """Take a message."""
        event = self.stream.receive(data)
        if self.unread is not None:
            self._owner.read(self, self.unread, event)
        elif event is not None:
            self._owner.handle(self, event)

    def half_close(self) -> None:
        """The peer will send nothing more."""
        event = self.stream.half_close()
        if self.ended:
            self._owner.stop_reading(self)
        if event is not None:
            self._owner.handle(self, event)

    def close(self) -> None:
        """The stream is gone."""
        event = self.stream.reset()
        self._owner.forget(self)
        if event is not None:
            self._owner.handle(self, event)
