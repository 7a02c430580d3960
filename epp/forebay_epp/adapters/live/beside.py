"""What the live page shows of a plan that is computed beside the traffic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay_epp.core.terms import Outcome
from forebay_epp.traffic import printable

if TYPE_CHECKING:
    from forebay_epp.core.terms import ControllerState
    from forebay_epp.traffic import ShadowCounts

MAX_ROWS = 24  # of bands and models


def would_do(state: ControllerState, counts: ShadowCounts) -> dict[str, object] | None:
    """Return what it would do, by band and model, those first that would wait longest in sum.

    None where no plan is computed beside the traffic.
    """
    if state.shadow is None:
        return None
    sent: dict[tuple[str, str], int] = {}
    refused: dict[tuple[str, str], int] = {}
    for (band, model, outcome), count in list(counts.outcomes.items()):
        sums = sent if outcome is Outcome.DISPATCHED else refused
        sums[band, model] = sums.get((band, model), 0) + count
    waited, overtaken = dict(counts.waited), dict(counts.overtaken)
    keys = sorted(sent.keys() | refused.keys(), key=lambda key: (-waited.get(key, 0.0), key))
    return {
        "bands": [
            {"band": printable(band.band), "requests": band.requests}
            for band in sorted(state.shadow.bands, key=lambda band: -band.priority)
        ],
        "rows": [
            {
                "band": printable(key[0]),
                "model": printable(key[1]),
                "sent": sent.get(key, 0),
                "refused": refused.get(key, 0),
                "overtaken": overtaken.get(key, 0),
                "mean_wait_seconds": waited.get(key, 0.0) / sent[key] if key in sent else None,
            }
            for key in keys[:MAX_ROWS]
        ],
        "other_rows": max(0, len(keys) - MAX_ROWS),
    }
