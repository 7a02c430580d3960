"""What it is worth to choose servers well: the same loads under several choices, in virtual time.

`random` sends each request at once to a server at random, as a proxy without an endpoint picker
may. `load`, `prefix` and `all` are forebay with the scorer Load alone, with PrefixCache alone and
with the default. `oracle` is the hit ratio of a single cache as large as those of all servers
together, which no choice can exceed by much. Engines are models of 70B on 8 H100
(forebay_sim.hardware) with a KV cache of 5 million tokens, which takes host memory; the flow
controller is the real one. The knee is the highest arrival rate, found to a tenth, at which the
mean time to first token is at most 2 s. Tenants of equal weight send in turn.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from forebay_control.plan import ScorerName
from forebay_replay.affinity import (
    HARDWARE,
    SERVERS,
    best_hit_ratio,
    figures,
    mooncake,
    plan,
    sessions,
    system_prompts,
)
from forebay_replay.replay import Replay
from forebay_replay.routing import AtRandom, Queued

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from forebay_replay.load import Arrival
    from forebay_replay.routing import Routing

POLICIES: dict[str, Callable[[], Routing]] = {
    "random": lambda: AtRandom(SERVERS),
    "load": lambda: Queued(SERVERS, plan([(ScorerName.LOAD, 1)])),
    "prefix": lambda: Queued(SERVERS, plan([(ScorerName.PREFIX_CACHE, 1)])),
    "all": lambda: Queued(SERVERS, plan(None)),
}
KNEE_TTFT_MS = 2000.0
STEP = 1.1


def scenarios(data: Path | None, count: int) -> dict[str, Callable[[float], list[Arrival]]]:
    """Return the loads by name, as functions of the speed of arrival."""
    found: dict[str, Callable[[float], list[Arrival]]] = {
        "system-prompts": partial(system_prompts, count),
        "sessions": partial(sessions, count),
    }
    if data is not None:
        for name in ("conversation", "synthetic"):
            path = data / f"mooncake_{name}.jsonl.gz"
            found[name] = partial(mooncake, path, count)
    return found


def run(routing: Routing, arrivals: Sequence[Arrival]) -> dict[str, float]:
    """Return the figures of a load under a policy."""
    replay = Replay([HARDWARE] * SERVERS, routing, arrivals)
    replay.run()
    return figures(replay)


def knee(policy: Callable[[], Routing], load: Callable[[float], list[Arrival]]) -> float:
    """Return the input tokens a second that arrive at the knee."""

    def holds(power: int) -> bool:
        return run(policy(), load(STEP**power))["ttft_mean_ms"] <= KNEE_TTFT_MS

    low, high = -16, 24
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    arrivals = load(STEP**low)
    return round(sum(a.prompt_tokens for a in arrivals) / arrivals[-1].at)


def main() -> int:
    """Run the scenarios."""
    parser = argparse.ArgumentParser(prog="hack/bench selection", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--only", action="append", help="a scenario's name; all by default")
    parser.add_argument("--data", type=Path, help="folder with the Mooncake traces")
    parser.add_argument("--requests", type=int, default=4000, help="of each load, at most")
    parser.add_argument("--speed", type=float, default=1.5, help="of arrivals, but at the knee")
    parser.add_argument("--no-knee", action="store_true", help="leave the search for it out")
    arguments = parser.parse_args()
    known = scenarios(arguments.data, arguments.requests)
    unknown = set(arguments.only or ()) - known.keys()
    if unknown:
        print(f"--only: {', '.join(unknown)}: not one of {', '.join(known)}", file=sys.stderr)
        return 2
    results: dict[str, float] = {}
    for name in arguments.only or known:
        began = time.monotonic()
        load = known[name]
        arrivals = load(arguments.speed)
        found = {policy: run(make(), arrivals) for policy, make in POLICIES.items()}
        if not arguments.no_knee:
            for policy, make in POLICIES.items():
                found[policy]["input_tokens_per_second_at_knee"] = knee(make, load)
        oracle = best_hit_ratio(arrivals, SERVERS * HARDWARE.kv_blocks)
        results[f"{name}.oracle.hit_ratio"] = round(oracle, 4)
        seconds = time.monotonic() - began
        print(f"\n{name}: {len(arrivals)} requests, oracle {oracle:.4f} ({seconds:.0f} s)")
        print(f"  {'':32}" + "".join(f"{policy:>12}" for policy in POLICIES))
        for figure in found["all"]:
            values = "".join(f"{found[policy][figure]:>12,.4g}" for policy in POLICIES)
            print(f"  {figure:32}{values}", flush=True)
            for policy in POLICIES:
                results[f"{name}.{policy}.{figure}"] = found[policy][figure]
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
