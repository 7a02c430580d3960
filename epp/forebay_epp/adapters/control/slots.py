"""Shares of slots over one stream: report demand when it changes, and take what comes.

What shares do belongs in the core, what the messages say in codec/shares.py.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from forebay_control.v1 import control_pb2 as pb
from forebay_epp.codec.shares import Reports

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from forebay_control.shares import Shares
    from forebay_epp.core.holdings import Holdings

REPORT_SECONDS = 0.05  # between two reports of demand
URGENT_SECONDS = 0.01  # where another EPP waits for what this one gives back, or the reverse
ALONE_REPORT_SECONDS = 0.5  # while nothing changes, or no other EPP is there
FROZEN_SECONDS = 10.0  # without the operator, until shares are not believed any more


@dataclass(frozen=True, slots=True)
class Slots:
    """What the EPP holds of the pool's slots, as far as the operator divides them.

    Attributes:
        holdings: what the EPP has and wants. The argument says whether it is for the first report
            of a stream: what it holds grows by shares alone from then on.
        share: puts shares into force, and returns what it holds then.
        relax: has the EPP go by what scrapes show.
        urgent: set when something has changed that the operator should hear at once.
    """

    holdings: Callable[[bool], Awaitable[Holdings]]
    share: Callable[[Shares], Awaitable[Holdings]]
    relax: Callable[[], None]
    urgent: asyncio.Event = field(default_factory=asyncio.Event)


class Sharing:
    """The reports and shares of one stream.

    Args:
        slots: of the EPP.
        send: puts a message into the stream's outbox.
    """

    def __init__(self, slots: Slots, send: Callable[[pb.FromPicker], None]) -> None:
        self._slots = slots
        self._send = send
        self._reports = Reports()
        self._news: deque[pb.Shares] = deque()
        self._said_at = 0.0

    def take(self, message: pb.Shares) -> None:
        """Take shares that have come."""
        self._news.append(message)
        self._slots.urgent.set()

    async def run(self, connected: Callable[[], bool]) -> None:
        """Report until cancelled; nothing before the operator has spoken.

        Raises:
            TimeoutError: the data plane is too busy to take shares.
        """
        urgent = self._slots.urgent
        seconds = REPORT_SECONDS
        first = True
        while True:
            # Not wait_for: until Python 3.12 it swallows a cancellation that crosses the event.
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await urgent.wait()
            if not self._news:
                early = self._said_at + URGENT_SECONDS - time.monotonic()
                if early > 0:
                    await asyncio.sleep(early)
            urgent.clear()
            if self._news:
                while self._news:
                    await self._take(self._news.popleft())
            elif connected():
                with suppress(TimeoutError):  # the next report counts
                    holdings = await self._slots.holdings(first)
                    first = False
                    seconds = REPORT_SECONDS if holdings.shared else ALONE_REPORT_SECONDS
                    late = time.monotonic() - self._said_at >= ALONE_REPORT_SECONDS
                    self._report(holdings, anyway=late)

    async def _take(self, message: pb.Shares) -> None:
        """Put shares into force, and say so at once: until then the operator sends no others."""
        shares = self._reports.take(message)
        if shares is not None:
            self._report(await self._slots.share(shares), anyway=True)

    def _report(self, holdings: Holdings, *, anyway: bool) -> None:
        report = self._reports.report(holdings, anyway=anyway)
        if report is not None:
            self._said_at = time.monotonic()
            self._send(pb.FromPicker(demand=report))
