"""What an EPP says of its demand, and the shares it hears: numbers and differences of one stream.

When reports are sent does not belong here (adapters/control.py), nor what shares do (core).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay_control.shares import Shares
from forebay_control.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from forebay_control.shares import BandDemand, Held
    from forebay_epp.core.holdings import Holdings

MAX_EPPS = 10_000


class Reports:
    """The reports of one stream, which name only what has changed since the one before."""

    def __init__(self) -> None:
        self._number = 0
        self._seen = 0
        self._answered = 0
        self._said: Holdings | None = None

    def report(self, holdings: Holdings, *, anyway: bool = False) -> pb.Demand | None:
        """Return what to send; None where nothing has changed, unless it is wanted `anyway`."""
        said = self._said
        if not anyway and holdings == said and self._answered == self._seen:
            return None
        before = said.endpoints if said else {}
        changed = {
            address: held
            for address, held in holdings.endpoints.items()
            if before.get(address) != held
        }
        gone = before.keys() - holdings.endpoints.keys()
        self._number += 1
        self._said, self._answered = holdings, self._seen
        return pb.Demand(
            number=self._number,
            seen=self._seen,
            shared=holdings.shared,
            full=said is None,
            bands=[_band(name, band) for name, band in holdings.bands.items()],
            endpoints=[
                *(_held(address, held) for address, held in changed.items()),
                *(pb.HeldSlots(address=address) for address in gone),
            ],
        )

    def take(self, message: pb.Shares) -> Shares | None:
        """Return the shares to put into force; None for some that later ones have replaced."""
        if message.number <= self._seen:
            return None
        self._seen = message.number
        epps = min(MAX_EPPS, max(1, message.epps))
        return Shares(
            message.number,
            None if message.alone else message.total,
            {share.address: share.slots for share in message.shares if not share.at_most},
            message.full,
            epps,
            min(message.rank, epps - 1),
            {share.address: share.slots for share in message.shares if share.at_most},
        )


def _band(name: str, band: BandDemand) -> pb.BandDemand:
    return pb.BandDemand(
        band=name,
        priority=band.priority,
        reserved_percent=band.reserved_percent,
        max_saturation_percent=band.max_saturation_percent,
        flows=[
            pb.FlowDemand(
                path=path, weights=flow.weights, waiting=flow.waiting, running=flow.running
            )
            for path, flow in band.flows.items()
        ],
    )


def _held(address: str, held: Held) -> pb.HeldSlots:
    return pb.HeldSlots(
        address=address,
        slots=held.slots,
        running=held.running,
        limit=held.limit,
        inside=held.inside,
    )
