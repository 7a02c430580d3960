"""What an EPP reports to its operator: what waits now, and what was decided since the start.

When it is sent does not belong here (adapters/control).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from forebay_control.v1 import control_pb2 as pb
from forebay_epp.core.terms import Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping

    from forebay_epp.core.terms import ControllerState


class Shadow(Protocol):
    """What a plan that only observes would have done, as traffic.py counts it."""

    @property
    def outcomes(self) -> Mapping[tuple[str, str, Outcome], int]:
        """Requests by (band, model label, outcome)."""

    @property
    def waited(self) -> Mapping[tuple[str, str], float]:
        """Seconds by (band, model label)."""

    @property
    def overtaken(self) -> Mapping[tuple[str, str], int]:
        """Requests by (band, model label)."""


def stats(
    state: ControllerState,
    outcomes: Mapping[tuple[str, str, Outcome], int],
    shadow: Shadow | None = None,
) -> pb.Stats:
    """Return the report.

    Args:
        state: what waits now.
        outcomes: requests since the start by (band, model label, outcome).
        shadow: what a plan that only observes would have done; None counts as nothing.
    """
    decided = _by_band(outcomes)
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
        mode=state.mode,
        shadow=_shadow(state.shadow, shadow),
    )


def _shadow(state: ControllerState | None, counts: Shadow | None) -> list[pb.ShadowStats]:
    if state is None or counts is None:
        return []
    decided = _by_band(counts.outcomes)
    waited, overtaken = _sums(counts.waited), _sums(counts.overtaken)
    return [
        pb.ShadowStats(
            band=band.band,
            requests=band.requests,
            overtaken=int(overtaken.get(band.band, 0)),
            waited_seconds=waited.get(band.band, 0.0),
            **decided.get(band.band, {}),
        )
        for band in state.bands
    ]


def _by_band(outcomes: Mapping[tuple[str, str, Outcome], int]) -> dict[str, dict[str, int]]:
    """Sum requests over models, by band and kind of outcome."""
    decided: dict[str, dict[str, int]] = {}
    for (band, _, outcome), count in list(outcomes.items()):
        kind = "dispatched" if outcome is Outcome.DISPATCHED else "evicted"
        if outcome.value.startswith("Rejected"):
            kind = "rejected"
        elif outcome is Outcome.ANSWERED:
            continue
        sums = decided.setdefault(band, {})
        sums[kind] = sums.get(kind, 0) + count
    return decided


def _sums(counts: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """Sum over models, by band."""
    sums: dict[str, float] = {}
    for (band, _), count in list(counts.items()):
        sums[band] = sums.get(band, 0.0) + count
    return sums
