"""What an EPP reports to its operator: what waits now, and what was decided since the start.

When it is sent does not belong here (adapters/control).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay_control.v1 import control_pb2 as pb
from forebay_epp.core.terms import Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping

    from forebay_epp.core.terms import ControllerState


def stats(state: ControllerState, outcomes: Mapping[tuple[str, str, Outcome], int]) -> pb.Stats:
    """Return the report.

    Args:
        state: what waits now.
        outcomes: requests since the start by (band, model label, outcome).
    """
    decided: dict[str, dict[str, int]] = {}
    for (band, _, outcome), count in outcomes.items():
        kind = "dispatched" if outcome is Outcome.DISPATCHED else "evicted"
        if outcome.value.startswith("Rejected"):
            kind = "rejected"
        elif outcome is Outcome.ANSWERED:
            continue
        sums = decided.setdefault(band, {})
        sums[kind] = sums.get(kind, 0) + count
    return pb.Stats(
        saturation=state.saturation,
        endpoints=len(state.endpoints),
        endpoints_out=sum(endpoint.out for endpoint in state.endpoints),
        in_flight=state.in_flight,
        bands=[
            pb.BandStats(
                band=band.band,
                requests=band.requests,
                bytes=band.size_bytes,
                oldest_seconds=band.oldest_seconds,
                **decided.get(band.band, {}),
            )
            for band in state.bands
        ],
    )
