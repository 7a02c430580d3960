"""Open streams, and the requests that are still being read from them.

Streams and bytes are bounded, and a request has to arrive in time. Whoever is slow or silent is
refused or ended here, in the order that reading.py tells; requests that are complete belong in
data_plane.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay_epp import reading
from forebay_epp.codec.extproc.events import BodyPart
from forebay_epp.core.terms import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from forebay_epp.codec.extproc.events import Event
    from forebay_epp.exchange import Exchange
    from forebay_epp.observers import Observer
    from forebay_epp.reading import Unread


class Intake:
    """All open streams.

    Args:
        observer: called for everything that happens.
        max_streams: how many may bring a request. One more costs the slowest unread request of the
            connection that has most of them its stream; where there is none it is refused with 429.
        clock: monotonic seconds.
    """

    def __init__(self, observer: Observer, max_streams: int, clock: Callable[[], float]) -> None:
        self._observer = observer
        self._max_streams = max_streams
        self._clock = clock
        self._open: dict[int, Exchange] = {}
        self._reading = reading.Reading()
        self._refused = 0
        self._watching = 0

    def __len__(self) -> int:
        return len(self._open)

    @property
    def _asking(self) -> int:
        """How many streams bring requests and were not refused."""
        return len(self._open) - self._refused - self._watching

    def watch(self, exchange: Exchange) -> None:
        """Take a stream that brings no request, but shows an answer."""
        self._open[exchange.id] = exchange
        self._watching += exchange.watches is not None

    def ask(self, exchange: Exchange, peer: str) -> None:
        """Take a stream of the connection `peer`, which is to bring a request."""
        full = self._asking >= self._max_streams and not self._give_up_stream()
        exchange.unread = self._reading.open(exchange.id, peer, self._clock())
        self._open[exchange.id] = exchange
        if full:
            self._observer.stream_refused()
            self._refuse(
                exchange,
                Outcome.REJECTED_QUEUE_FULL,
                f"{self._max_streams} requests are open at this endpoint picker",
            )

    def read(
        self, exchange: Exchange, unread: Unread, event: Event | None, max_bytes: int
    ) -> Event | None:
        """Account for a message of a request that was not yet complete when it came.

        Return the event that says how the reading has ended; None while it goes on.
        """
        if not unread.begun:
            self._reading.begin(unread, self._clock())
        if isinstance(event, BodyPart):
            self._reading.grow(unread, event.size_bytes)
        elif event is not None or exchange.ended:
            self.end(exchange)
            return event
        while self._reading.size_bytes > max_bytes:
            self._give_up_body(exchange)
        return None

    def end(self, exchange: Exchange) -> None:
        """A request is complete, or not wanted any more."""
        if exchange.unread is not None:
            self._reading.end(exchange.unread)
            exchange.unread = None

    def forget(self, exchange: Exchange) -> None:
        """A stream is gone."""
        if self._open.pop(exchange.id, None) is not None:
            self._observer.stream_closed()
            self._refused -= exchange.refused
            self._watching -= exchange.watches is not None
        self.end(exchange)

    def time_out(self, now: float) -> None:
        """End streams that say nothing, and refuse requests that do not come to an end."""
        while (unread := self._reading.silent(now)) is not None:
            exchange = self._open[unread.exchange_id]
            self.end(exchange)
            exchange.stream.fail(f"no request within {reading.SILENT_STREAM_SECONDS:.0f} s")
            exchange.on_output()
        while (unread := self._reading.late(now)) is not None:
            exchange = self._open[unread.exchange_id]
            self._refuse(
                exchange,
                Outcome.REJECTED_INCOMPLETE,
                f"the request body did not arrive within {reading.READ_REQUEST_SECONDS:.0f} s",
            )
            exchange.on_output()

    # --- inside

    def _refuse(self, exchange: Exchange, outcome: Outcome, message: str) -> None:
        self.end(exchange)
        # Its proxy may be slow to close it, or frozen; that must not keep others out.
        exchange.refused = True
        self._refused += 1
        retry_after = 1 if outcome is Outcome.REJECTED_QUEUE_FULL else None
        exchange.stream.refuse(outcome, message, retry_after)
        self._observer.answered(exchange.id, outcome, self._clock())

    def _give_up_body(self, current: Exchange) -> None:
        """Refuse the slowest body of the connection whose unfinished bodies are largest."""
        slowest = self._open[self._reading.slowest(self._clock()).exchange_id]
        self._refuse(
            slowest,
            Outcome.REJECTED_QUEUE_FULL,
            "too many request bodies are being read, and this one was the slowest",
        )
        if slowest is not current:
            slowest.on_output()

    def _give_up_stream(self) -> bool:
        """Refuse the oldest unread request of the connection that has most; False if none has."""
        unread = self._reading.oldest()
        if unread is None:
            return False
        oldest = self._open[unread.exchange_id]
        self._refuse(
            oldest,
            Outcome.REJECTED_QUEUE_FULL,
            f"{self._max_streams} requests are open, and this one was slow to arrive",
        )
        oldest.on_output()
        return True
