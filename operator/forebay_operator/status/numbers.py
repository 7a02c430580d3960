"""The live numbers of a pool in `.status`, quantised. Pure.

A status is written again only when something has changed that a person would care about; exact
values are the EPPs' metrics.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from forebay_control.plan import Mode
from forebay_operator.status.observed import EPPState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forebay_control.v1 import control_pb2 as pb
    from forebay_operator.status.observed import EPP, Attachment

MAX_BANDS = 64  # the schema's


def of_pool(attachment: Attachment) -> dict[str, Any]:
    """Add up what the pool's EPPs report.

    A band that few report gives way where there are more than the schema takes.
    """
    found = reports(attachment.epps or ())
    bands: dict[str, dict[str, Any]] = {}
    for report in found:
        for band in report.bands:
            sums = bands.setdefault(
                band.band,
                {
                    "band": band.band,
                    "requests": 0,
                    "bytes": 0,
                    "oldestSeconds": 0.0,
                    "dispatched": 0,
                    "rejected": 0,
                    "evicted": 0,
                },
            )
            for name in ("requests", "bytes", "dispatched", "rejected", "evicted"):
                sums[name] += getattr(band, name)
            sums["oldestSeconds"] = max(sums["oldestSeconds"], band.oldest_seconds)
    named = Counter(band.band for report in found for band in report.bands)
    kept = sorted(bands, key=lambda name: (-named[name], name))[:MAX_BANDS]
    for sums in bands.values():
        for name in ("requests", "bytes", "dispatched", "rejected", "evicted"):
            sums[name] = quantised(sums[name])
        sums["oldestSeconds"] = quantised(round(sums["oldestSeconds"]))
    saturation = max((report.saturation for report in found), default=0.0)
    pool = {
        "name": attachment.pool,
        "saturation": f"{min(round(saturation * 20) / 20, 99.0):.2f}",
        "endpoints": attachment.endpoints,
        "queues": [bands[name] for name in sorted(kept)],
    }
    if found:
        observing = all(report.mode == Mode.OBSERVE for report in found)
        pool["mode"] = str(Mode.OBSERVE if observing else Mode.ENFORCE)
    if shadow := _shadow(found):
        pool["shadow"] = shadow
    return pool


def _shadow(found: Sequence[pb.Stats]) -> list[dict[str, Any]]:
    """Add up what EPPs in mode Observe would have done in the bands that most of them name."""
    names = ("requests", "dispatched", "rejected", "evicted", "overtaken")
    bands: dict[str, Counter[str]] = {}
    waited: Counter[str] = Counter()
    named = Counter(band.band for report in found for band in report.shadow)
    for report in found:
        for band in report.shadow:
            sums = bands.setdefault(band.band, Counter(dict.fromkeys(names, 0)))
            sums.update({name: getattr(band, name) for name in names})
            waited[band.band] += round(1000 * band.waited_seconds)
    kept = sorted(bands, key=lambda name: (-named[name], name))[:MAX_BANDS]
    return [
        {
            "band": name,
            **{key: quantised(bands[name][key]) for key in names},
            "meanWaitMilliseconds": quantised(waited[name] // max(1, bands[name]["dispatched"])),
        }
        for name in sorted(kept)
    ]


def reports(epps: Sequence[EPP]) -> list[pb.Stats]:
    """Return the EPPs' reports; the last one of an EPP that cannot be reached is out of date."""
    return [epp.stats for epp in epps if epp.stats is not None and epp.state is not EPPState.STALE]


def quantised(value: int) -> int:
    """Keep two digits: 7, 42, 130, 5,300."""
    step = 1
    while value // step >= 100:
        step *= 10
    return value // step * step
