"""Demand and shares as messages. What comes from an EPP is bounded here."""

from __future__ import annotations

from forebay_control.shares import BandDemand, Demand, FlowDemand, Held, Shares
from forebay_control.v1 import control_pb2 as pb

MAX_BANDS = 64
MAX_FLOWS = 65
MAX_LEVELS = 2
MAX_SLOTS = 1 << 20


def demand(message: pb.Demand) -> Demand:
    """Return an EPP's report."""
    return Demand(
        message.number,
        message.seen,
        message.shared,
        message.full,
        {band.band: _band(band) for band in message.bands[:MAX_BANDS]},
        {
            held.address: Held(
                min(held.slots, MAX_SLOTS),
                min(held.running, MAX_SLOTS),
                min(held.limit, MAX_SLOTS),
                min(held.inside, MAX_SLOTS),
            )
            for held in message.endpoints
        },
    )


def _band(band: pb.BandDemand) -> BandDemand:
    return BandDemand(
        band.priority,
        min(band.reserved_percent, 100),
        min(band.max_saturation_percent, 100),
        {
            tuple(flow.path[:MAX_LEVELS]): FlowDemand(
                min(flow.waiting, MAX_SLOTS),
                min(flow.running, MAX_SLOTS),
                tuple(max(1, weight) for weight in flow.weights[:MAX_LEVELS]),
            )
            for flow in band.flows[:MAX_FLOWS]
        },
    )


def shares(answer: Shares) -> pb.Shares:
    """Return the message to an EPP."""
    return pb.Shares(
        number=answer.number,
        alone=answer.total is None,
        total=answer.total or 0,
        full=answer.full,
        epps=answer.epps,
        rank=answer.rank,
        shares=[
            *(pb.Share(address=address, slots=n) for address, n in answer.slots.items()),
            *(
                pb.Share(address=address, slots=n, at_most=True)
                for address, n in answer.most.items()
            ),
        ],
    )
