"""What learned slots are worth: the same loads through four ways of deciding, in virtual time.

`direct` sends each request at once to the server with the fewest unanswered ones, `round_robin` in
turn. `manual` is forebay with the best fixed limit of a search: the one with the lowest 99th
percentile of Critical's time to first token among those that end within 1 % of the first to end.
`adaptive` is forebay without a setting. Engines are models (forebay_sim.stepping) with the figures
of public hardware (forebay_sim.hardware); the flow controller is the real one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from forebay_replay.figures import figures
from forebay_replay.replay import Replay
from forebay_replay.routing import Direct, Queued, Routing
from forebay_replay.scenarios import CHAT, Scenario, plan, scenarios

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
)


def run(scenario: Scenario, routing: Routing) -> dict[str, float]:
    """Return the figures of a scenario."""
    replay = Replay(scenario.engines, routing, scenario.arrivals, scenario.measured)
    if scenario.servers is not None:
        replay.resize(scenario.servers)
    scenario.prepare(replay)
    replay.run()
    return figures(replay, CHAT, scenario.slo_seconds)


def best_fixed(scenario: Scenario) -> tuple[int, dict[str, float]]:
    """Return the best fixed limit and what comes of it."""
    servers = len(scenario.engines)
    found = {slots: run(scenario, Queued(servers, plan(slots))) for slots in scenario.fixed}
    wall_seconds = min(each["wall_seconds"] for each in found.values())
    quick = {s: each for s, each in found.items() if each["wall_seconds"] <= 1.01 * wall_seconds}
    slots = min(quick, key=lambda slots: quick[slots]["critical_ttft_p99_ms"])
    return slots, quick[slots]


def main() -> int:
    """Run the scenarios."""
    parser = argparse.ArgumentParser(prog="hack/bench scheduling", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--only", action="append", help="a scenario's name; all by default")
    parser.add_argument("--data", type=Path, help="folder with the Azure traces of 2023")
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
        scenario = known[name]()
        servers = len(scenario.engines)
        slots, manual = best_fixed(scenario)
        found = {
            "direct": run(scenario, Direct(servers, least_request=True)),
            "round_robin": run(scenario, Direct(servers, least_request=False)),
            "manual": manual,
            "adaptive": run(scenario, Queued(servers, plan(None))),
        }
        seconds = time.monotonic() - began
        print(f"\n{name}: {len(scenario.arrivals)} requests, best limit {slots} ({seconds:.0f} s)")
        print(f"  {'':24}" + "".join(f"{policy:>14}" for policy in POLICIES))
        for figure in SHOWN:
            values = "".join(f"{found[policy][figure]:>14,.2f}" for policy in POLICIES)
            print(f"  {figure:24}{values}", flush=True)
        for policy, values_by_name in found.items():
            for figure, value in values_by_name.items():
                results[f"{name}.{policy}.{figure}"] = value
        results[f"{name}.manual.limit"] = slots
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
