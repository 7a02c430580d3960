"""The stories that `hack/bench scheduling` tells: a load, and the servers under it. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
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
        prepare: arranges what happens on the way.
        servers: how many are in the pool at the start; None: all.
    """

    name: str
    engines: Sequence[Hardware]
    arrivals: Sequence[Arrival]
    measured: tuple[float, float]
    fixed: Sequence[int]
    slo_seconds: Mapping[str, float] = field(default_factory=lambda: SLO_SECONDS)
    prepare: Callable[[Replay], None] = lambda _: None
    servers: int | None = None


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


def mixed(
    rate: float, seconds: float, seed: int, answer: float = 1.0, start: float = 0.0
) -> list[Arrival]:
    """Return chat, summaries and batch jobs, 1:3:6, with answers of 100, 100 and 200 tokens."""
    random = Random(seed)  # noqa: S311  # a load, not a secret
    return together(
        poisson(CHAT, 0.1 * rate, seconds, lengths(200, 100 * answer), random, start),
        poisson(SUMMARY, 0.3 * rate, seconds, lengths(500, 100 * answer), random, start),
        poisson(BATCH, 0.6 * rate, seconds, lengths(500, 200 * answer), random, start),
    )


SMALL = Hardware(max_num_seqs=8)
H100 = PRESETS["8b-h100"]


def uniform(run: int) -> Scenario:
    """Four servers of 8 slots from a cold start at twice what they can do.

    Each of these takes the number of the drawing: another one draws other arrivals.
    """
    arrivals = mixed(36, 60, 100 * run + 1)
    return Scenario("uniform", [SMALL] * 4, arrivals, (10.0, 60.0), (7, 8, 9, 10))


def large(run: int) -> Scenario:
    """Four 8B models on an H100 each at twice what they can do."""
    arrivals = mixed(300, 30, 100 * run + 2)
    return Scenario("large", [H100] * 4, arrivals, (10.0, 30.0), (224, 256, 264, 288))


def heterogeneous(run: int) -> Scenario:
    """Batches of 8, 32, 256 and 1,024: no fixed limit fits all."""
    engines = [replace(H100, max_num_seqs=n, kv_blocks=60_000) for n in (8, 32, 256, 1024)]
    arrivals = mixed(190, 30, 100 * run + 3)
    return Scenario("heterogeneous", engines, arrivals, (15.0, 30.0), (8, 32, 128, 256, 1024))


def bursty(data: Path) -> Scenario:
    """Azure's code trace, 13 tokens an answer, in its own bursts, 40 times as fast."""
    arrivals = trace(data / "azure_2023_code.csv", 8000, 40.0, _every_tenth)
    return Scenario("bursty", [H100] * 4, arrivals, (5.0, 40.0), (32, 64, 128, 256))


def conversation(data: Path) -> Scenario:
    """Azure's conversation trace, twice what the servers can do."""
    arrivals = trace(data / "azure_2023_conv.csv", 12000, 60.0, _every_tenth)
    return Scenario("conversation", [H100] * 2, arrivals, (10.0, 35.0), (224, 256, 264, 288))


def _every_tenth(number: int) -> str:
    return (CHAT, SUMMARY, SUMMARY, SUMMARY, BATCH, BATCH, BATCH, BATCH, BATCH, BATCH)[number % 10]


def long_prompts(run: int) -> Scenario:
    """Chat with 2 % of prompts of 60,000 tokens, which keep prefill 40 % busy."""
    random = Random(100 * run + 5)  # noqa: S311  # a load, not a secret
    arrivals = together(
        poisson(CHAT, 12, 120, lengths(300, 150), random),
        poisson(BATCH, 0.25, 120, lengths(60_000, 50, 0.1), random),
    )
    engines = [replace(H100, kv_blocks=40_000)]
    return Scenario("long-prompts", engines, arrivals, (10.0, 120.0), (32, 64, 128, 256))


def kv_bound(run: int) -> Scenario:
    """8B on an L4, whose KV cache is full long before its batch."""
    random = Random(100 * run + 6)  # noqa: S311  # a load, not a secret
    arrivals = together(
        poisson(CHAT, 0.8, 120, lengths(400, 150), random),
        poisson(BATCH, 2.4, 120, lengths(1200, 400), random),
    )
    engines = [PRESETS["8b-l4"]] * 2
    return Scenario("kv-bound", engines, arrivals, (20.0, 120.0), (8, 12, 16, 20, 24))


def slow_server(run: int) -> Scenario:
    """One of four takes three times as long for everything."""
    slow = replace(SMALL, overhead_seconds=0.006, weights_seconds=0.024, token_seconds=0.00006)
    arrivals = mixed(30, 60, 100 * run + 7)
    return Scenario("slow-server", [SMALL] * 3 + [slow], arrivals, (10.0, 60.0), (7, 8, 9, 10))


def overload(run: int) -> Scenario:
    """Three times what four small servers can do."""
    arrivals = mixed(54, 40, 100 * run + 8)
    return Scenario("overload", [SMALL] * 4, arrivals, (10.0, 40.0), (7, 8, 9, 10))


def interactive(run: int) -> Scenario:
    """Chat at a third of what the servers can do, beside more batch than they can."""
    random = Random(100 * run + 9)  # noqa: S311  # a load, not a secret
    arrivals = together(
        poisson(CHAT, 6, 60, lengths(200, 100), random),
        poisson(BATCH, 18, 60, lengths(500, 200), random),
    )
    return Scenario("interactive", [SMALL] * 4, arrivals, (10.0, 60.0), (7, 8, 9, 10))


def interactive_alone(run: int) -> Scenario:
    """The same chat without the batch."""
    random = Random(100 * run + 9)  # noqa: S311  # a load, not a secret
    arrivals = list(poisson(CHAT, 6, 60, lengths(200, 100), random))
    return Scenario("interactive-alone", [SMALL] * 4, arrivals, (10.0, 60.0), (8,))


def scale(run: int) -> Scenario:
    """Two servers, four from second 20 on, two again from second 40 on."""

    def prepare(replay: Replay) -> None:
        replay.at(20.0, replay.resize, 4)
        replay.at(40.0, replay.resize, 2)

    arrivals = mixed(24, 60, 100 * run + 10)
    return Scenario(
        "scale", [SMALL] * 4, arrivals, (22.0, 40.0), (7, 8, 9, 10), prepare=prepare, servers=2
    )


def restart(run: int) -> Scenario:
    """One after another the four servers are killed, and are back, empty, 6 seconds later."""

    def prepare(replay: Replay) -> None:
        for server in range(4):
            replay.at(12.0 + 12.0 * server, replay.restart, server, 6.0)

    random = Random(100 * run + 11)  # noqa: S311  # a load, not a secret
    arrivals = together(
        poisson(CHAT, 6, 60, lengths(200, 100), random),
        poisson(BATCH, 18, 60, lengths(500, 200), random),
    )
    return Scenario("restart", [SMALL] * 4, arrivals, (12.0, 60.0), (7, 8, 9, 10), prepare=prepare)


def scenarios(data: Path | None) -> dict[str, Callable[[int], list[Scenario]]]:
    """Return by name what draws each of them so many times.

    Those that replay a trace are there only where it can be read, and are drawn once.
    """
    drawn: dict[str, Callable[[int], Scenario]] = {
        "uniform": uniform,
        "large": large,
        "heterogeneous": heterogeneous,
        "long-prompts": long_prompts,
        "kv-bound": kv_bound,
        "slow-server": slow_server,
        "overload": overload,
        "interactive": interactive,
        "interactive-alone": interactive_alone,
        "scale": scale,
        "restart": restart,
    }
    found: dict[str, Callable[[int], list[Scenario]]] = {
        name: partial(_draw, draw) for name, draw in drawn.items()
    }
    if data is not None:
        found["bursty"] = lambda _: [bursty(data)]
        found["conversation"] = lambda _: [conversation(data)]
    return found


def _draw(draw: Callable[[int], Scenario], runs: int) -> list[Scenario]:
    return [draw(run) for run in range(runs)]
