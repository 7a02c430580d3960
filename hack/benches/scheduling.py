"""What learned slots are worth: the same loads through four ways of deciding, in virtual time.

`direct` sends each request at once to the server with the fewest unanswered ones, `round_robin` in
turn. `manual` is forebay with the best fixed limit of a search: the one with the lowest 99th
percentile of Critical's time to first token among those that end within 1 % of the first to end.
`adaptive` is forebay without a setting. Engines are models (forebay_sim.stepping) with the figures
of public hardware (forebay_sim.hardware); the flow controller is the real one.

Each load is drawn several times, `--runs`, and figures are means over them, since a 99th percentile
of some hundred requests is a matter of luck; a trace is what it is and is replayed once.

With `--plot` each scenario also becomes a picture: how long Critical waits for its first token by
time of arrival, and the limits that are learned.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from forebay_replay.figures import figures
from forebay_replay.replay import Replay
from forebay_replay.routing import Direct, Queued, Routing
from forebay_replay.scenarios import CHAT, Scenario, plan, scenarios
from forebay_sim.report import percentile

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

POLICIES = ("direct", "round_robin", "manual", "adaptive")
SHOWN = (
    "critical_ttft_p50_ms",
    "critical_ttft_p99_ms",
    "wall_seconds",
    "goodput_rps",
    "mean_server_waiting",
    "batch_occupancy",
    "preemptions",
    "idle_beside_waiting_ms",
    "failed_attempts",
)


SAMPLE_SECONDS = 0.5
BINS = 40
COLOURS = dict(zip(POLICIES, ("#999999", "#56b4e9", "#e69f00", "#0072b2"), strict=True))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a scenario.

    Attributes:
        figures: of it.
        ttft: when each of Critical's requests arrived, and how many seconds later its answer began.
        limits: by time, the limit of each server in the pool, where they are learned.
    """

    figures: dict[str, float]
    ttft: list[tuple[float, float]]
    limits: list[tuple[float, list[int]]]


def run(scenario: Scenario, routing: Routing) -> Outcome:
    """Replay a scenario."""
    replay = Replay(scenario.engines, routing, scenario.arrivals, scenario.measured)
    if scenario.servers is not None:
        replay.resize(scenario.servers)
    scenario.prepare(replay)
    limits: list[tuple[float, list[int]]] = []

    def sample(queued: Queued) -> None:
        state = queued.controller.state(replay.now)
        limits.append((replay.now, [endpoint.limit for endpoint in state.endpoints]))
        replay.at(replay.now + SAMPLE_SECONDS, sample, queued)

    if isinstance(routing, Queued):
        sample(routing)
    replay.run()
    ttft = [
        (answer.arrival.at, answer.ttft_seconds)
        for answer in replay.answers
        if answer.arrival.model == CHAT and not answer.failed
    ]
    return Outcome(figures(replay, CHAT, scenario.slo_seconds), ttft, limits)


def over(drawn: Sequence[Scenario], routing_of: Callable[[int], Routing]) -> Outcome:
    """Replay each drawing of a scenario; figures are means, the rest is of the first.

    Args:
        drawn: the scenario, its load drawn several times.
        routing_of: returns how requests reach so many servers.
    """
    found = [run(scenario, routing_of(len(scenario.engines))) for scenario in drawn]
    means = {
        name: sum(outcome.figures[name] for outcome in found) / len(found)
        for name in found[0].figures
    }
    return Outcome(means, found[0].ttft, found[0].limits)


def best_fixed(drawn: Sequence[Scenario]) -> tuple[int, Outcome]:
    """Return the best fixed limit and what comes of it."""
    found = {
        slots: over(drawn, lambda servers, slots=slots: Queued(servers, plan(slots)))
        for slots in drawn[0].fixed
    }
    wall_seconds = min(each.figures["wall_seconds"] for each in found.values())
    quick = [s for s, each in found.items() if each.figures["wall_seconds"] <= 1.01 * wall_seconds]
    slots = min(quick, key=lambda slots: found[slots].figures["critical_ttft_p99_ms"])
    return slots, found[slots]


def draw(path: Path, name: str, outcomes: Mapping[str, Outcome]) -> None:
    """Write a scenario's picture."""
    # Only a development install has it, and only pictures need it.
    import matplotlib as mpl  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": name}  # small, the same each time

    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    last = max(at for outcome in outcomes.values() for at, _ in outcome.ttft)
    for policy, outcome in outcomes.items():
        bins: list[list[float]] = [[] for _ in range(BINS)]
        for at, seconds in outcome.ttft:
            bins[min(BINS - 1, int(BINS * at / last))].append(seconds)
        points = [
            ((number + 0.5) * last / BINS, percentile(values, 90))
            for number, values in enumerate(bins)
            if values
        ]
        above.plot(*zip(*points, strict=True), color=COLOURS[policy], label=policy)
    above.set_yscale("log")
    above.set_ylabel("Critical, seconds to the\nfirst token (90th percentile)")
    above.set_title(name)
    above.legend(ncols=len(outcomes), fontsize="small")
    learned = [(at, limits) for at, limits in outcomes["adaptive"].limits if at <= last]
    for server in range(max(len(limits) for _, limits in learned)):
        points = [(at, limits[server]) for at, limits in learned if server < len(limits)]
        below.step(*zip(*points, strict=True), where="post", color=COLOURS["adaptive"], alpha=0.6)
    below.set_ylim(bottom=0)
    below.set_ylabel("limits of the servers,\nadaptive")
    below.set_xlabel("seconds; above by time of arrival")
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    """Run the scenarios."""
    parser = argparse.ArgumentParser(prog="hack/bench scheduling", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--only", action="append", help="a scenario's name; all by default")
    parser.add_argument("--data", type=Path, help="folder with the Azure traces of 2023")
    parser.add_argument("--plot", type=Path, help="folder for a picture of each scenario")
    parser.add_argument("--runs", type=int, default=4, help="how often each load is drawn")
    parser.add_argument("--virtual", action="store_true", help="in virtual time, as always")
    arguments = parser.parse_args()
    known = scenarios(arguments.data)
    unknown = set(arguments.only or ()) - known.keys()
    if unknown:
        print(f"--only: {', '.join(unknown)}: not one of {', '.join(known)}", file=sys.stderr)
        return 2
    results: dict[str, float] = {}
    for name in arguments.only or known:
        began = time.monotonic()
        drawn = known[name](arguments.runs)
        slots, manual = best_fixed(drawn)
        found = {
            "direct": over(drawn, lambda servers: Direct(servers, least_request=True)),
            "round_robin": over(drawn, lambda servers: Direct(servers, least_request=False)),
            "manual": manual,
            "adaptive": over(drawn, lambda servers: Queued(servers, plan(None))),
        }
        seconds = time.monotonic() - began
        requests = sum(len(scenario.arrivals) for scenario in drawn)
        print(f"\n{name}: {requests} requests, best limit {slots} ({seconds:.0f} s)")
        print(f"  {'':24}" + "".join(f"{policy:>14}" for policy in POLICIES))
        for figure in SHOWN:
            values = "".join(f"{found[policy].figures[figure]:>14,.2f}" for policy in POLICIES)
            print(f"  {figure:24}{values}", flush=True)
        if arguments.plot:
            draw(arguments.plot / f"{name}.svg", name, found)
        for policy, outcome in found.items():
            for figure, value in outcome.figures.items():
                results[f"{name}.{policy}.{figure}"] = value
        results[f"{name}.manual.limit"] = slots
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
