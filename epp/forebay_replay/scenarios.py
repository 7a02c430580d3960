"""The stories that `hack/bench scheduling` tells: a load, and the servers under it. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING

from forebay_control.plan import (
    BandPlan,
    LimitsPlan,
    ModelPlan,
    Plan,
    SaturationMode,
    SaturationPlan,
)
from forebay_replay.load import Arrival, lengths, poisson, together, trace
from forebay_sim.hardware import PRESETS, Hardware

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from forebay_replay.replay import Replay

CHAT, SUMMARY, BATCH = "chat", "summary", "batch"
MODELS = {CHAT: "Critical", SUMMARY: "Standard", BATCH: "Sheddable"}
SLO_SECONDS = {CHAT: 1.0, SUMMARY: 10.0}
UNBOUNDED = 1_000_000
UNBOUNDED_BYTES = 1 << 40


@dataclass(frozen=True, slots=True)
class Scenario:
    """One story.

    Attributes:
        name: of the scenario.
        engines: the servers.
        arrivals: the load.
        measured: from when to when the servers are saturated.
        fixed: the limits among which the best fixed one is searched.
        slo_seconds: how long an answer of a model may take to begin.
        prepare: makes happen what goes wrong on the way.
    """

    name: str
    engines: Sequence[Hardware]
    arrivals: Sequence[Arrival]
    measured: tuple[float, float]
    fixed: Sequence[int]
    slo_seconds: Mapping[str, float] = field(default_factory=lambda: SLO_SECONDS)
    prepare: Callable[[Replay], None] = lambda _: None


def plan(slots: int | None) -> Plan:
    """Return the queues of a replay, with so many slots for each server; None: learned."""
    saturation = (
        SaturationPlan()
        if slots is None
        else SaturationPlan(SaturationMode.CONCURRENCY, max_concurrency=slots)
    )
    return Plan(
        bands=tuple(
            BandPlan(
                name,
                priority,
                ttl_seconds=3600.0,
                max_requests=UNBOUNDED,
                max_bytes=UNBOUNDED_BYTES,
                flow_max_requests=UNBOUNDED,
                flow_max_bytes=UNBOUNDED_BYTES,
            )
            for name, priority in (("Critical", 100), ("Standard", 0), ("Sheddable", -100))
        ),
        models=tuple(ModelPlan(name, band) for name, band in MODELS.items()),
        limits=LimitsPlan(max_requests=UNBOUNDED, max_bytes=UNBOUNDED_BYTES),
        saturation=saturation,
    )
