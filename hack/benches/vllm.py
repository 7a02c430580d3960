"""forebay in front of a real vLLM, and what the simulator says of the same load.

Needs `hack/vllm`; takes about 12 minutes. One vLLM on CPU with a tiny model, the real EPP and the
real Envoy; clients are in this process. `direct` goes through an Envoy without EPP, `manual` has a
limit set by hand, `adaptive` learns it. Rounds alternate between the policies and ratios are of one
round each, because the speed of a machine that others use changes; what is printed is the median
over rounds. The simulator gets the figures of a fit to `direct`'s runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import median
from typing import TYPE_CHECKING, Any

import aiohttp
from vllm_server import (
    ANSWER_SECONDS,
    BATCH,
    CHAT,
    HOME,
    LONG_PROMPT_TOKENS,
    Clients,
    Run,
    Seen,
    Server,
    fit,
    fronts,
    prompt_token_seconds,
)

from forebay_replay.load import Arrival, lengths, poisson, together
from forebay_replay.replay import Replay
from forebay_replay.routing import Direct, Queued
from forebay_replay.scenarios import BATCH as REPLAY_BATCH
from forebay_replay.scenarios import CHAT as REPLAY_CHAT
from forebay_replay.scenarios import plan as replay_plan

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from forebay_sim.hardware import Hardware

POLICIES = ("direct", "manual", "adaptive")
SLOTS, MANY_SLOTS, KV_SLOTS = 8, 64, 40
ANSWER_TOKENS = 60
LONG_PROMPTS, SMALL_REQUESTS = 6, 32
GRAMMAR_PROPERTIES = 3_000
RESTART_AT = 3.0
LIMIT_SECONDS = 0.05  # between looks at a limit

Fronts = dict[str, tuple[str, Any]]
Figures = dict[str, dict[str, float]]


def turns(round_number: int) -> tuple[str, ...]:
    """Return the policies in the order of a round."""
    first = round_number % len(POLICIES)
    return POLICIES[first:] + POLICIES[:first]


def mean(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the median of each figure over rounds."""
    return {name: median(run[name] for run in runs) for name in runs[0]}


def mixed(rate: float, seconds: float, seed: int, answer: float = ANSWER_TOKENS) -> list[Arrival]:
    """Return a load of one part chat, nine parts batch."""
    random = Random(seed)  # a load, not a secret
    return together(
        poisson(CHAT, 0.1 * rate, seconds, lengths(60, answer), random),
        poisson(BATCH, 0.9 * rate, seconds, lengths(120, answer), random),
    )


async def rounds(number: int, run: Callable[[str, int], Awaitable[Run]]) -> Figures:
    """Have each policy run so many times, in turn; return the median of each figure.

    Those of `manual` and `adaptive` have the ratio of their last answer to `direct`'s of the round.
    """
    found: dict[str, list[dict[str, float]]] = {policy: [] for policy in POLICIES}
    for each in range(number):
        for policy in turns(each):
            found[policy].append((await run(policy, each)).figures())
        direct_seconds = found["direct"][-1]["wall_seconds"]
        for policy in POLICIES:
            last = found[policy][-1]
            last["last_answer_ratio"] = last["wall_seconds"] / max(1e-9, direct_seconds)
        ratios = ", ".join(f"{p} {found[p][-1]['last_answer_ratio']:.2f}" for p in POLICIES)
        print(
            f"  round {each + 1}, last answer: direct {direct_seconds:.1f} s; {ratios}", flush=True
        )
    return {policy: mean(runs) for policy, runs in found.items()}


def replayed(hardware: Hardware, arrivals: Sequence[Arrival], slots: int) -> Figures:
    """Return the figures of the same load in virtual time."""
    names = {CHAT: REPLAY_CHAT, BATCH: REPLAY_BATCH}
    load = [replace(arrival, model=names[arrival.model]) for arrival in arrivals]
    found: Figures = {}
    for policy in POLICIES:
        fixed = slots if policy == "manual" else None
        routing = Direct(1, least_request=True) if policy == "direct" else None
        replay = Replay([hardware], routing or Queued(1, replay_plan(fixed)), load)
        replay.run()
        seen = [
            Seen(arrival, 200, answer.first_at, answer.ended_at)
            for arrival, answer in zip(arrivals, replay.answers, strict=True)
        ]
        found[policy] = Run(seen, 0.0, replay.servers[0].engine.preemptions).figures()
    return found


def show(name: str, found: Figures) -> None:
    """Print a story's figures."""
    print(f"\n{name}")
    print(f"  {'':24}" + "".join(f"{policy:>12}" for policy in found))
    for figure in next(iter(found.values())):
        values = "".join(f"{figures.get(figure, 0.0):>12,.2f}" for figures in found.values())
        print(f"  {figure:24}{values}", flush=True)


def compared(real: Figures, virtual: Figures) -> Figures:
    """Return the ratio of figures of two ways to run the same load."""
    return {
        policy: {
            figure: virtual[policy][figure] / max(1e-9, real[policy][figure])
            for figure in ("wall_seconds", "critical_ttft_p50_ms", "critical_ttft_p99_ms")
        }
        for policy in real
    }


async def overload(clients: Clients, folder: Path, server: Server) -> dict[str, Figures]:
    """Twice what the server can do, against it and against the simulator, and in virtual time."""
    token_seconds = await prompt_token_seconds(clients, server)
    full = [Arrival(0.0, BATCH, 120, ANSWER_TOKENS) for _ in range(SLOTS * 4)]
    fits: list[Hardware] = []

    async def run(policy: str, _: int) -> Run:
        found = await clients.load(reached[policy][0], arrivals, server)
        if policy == "direct":
            fits.append(fit(found, SLOTS, token_seconds))
        return found

    with fronts(folder, server, SLOTS) as reached:
        before = time.monotonic()
        await clients.load(reached["direct"][0], full, server)
        rate = 2 * len(full) / (time.monotonic() - before)
        arrivals = mixed(rate, 6.0, 1)
        print(f"overload: {len(arrivals)} requests in 6 s, {rate:.1f} a second")
        real = await rounds(3, run)
    hardware = sorted(fits, key=lambda one: one.overhead_seconds)[len(fits) // 2]
    print(f"fitted to direct's runs: {hardware}", flush=True)
    virtual = replayed(hardware, arrivals, SLOTS)
    server.kill()
    server = Server.simulated(folder, hardware)
    server.start()
    try:
        await server.ready()
        below = folder / "simulated"
        below.mkdir()
        with fronts(below, server, SLOTS) as reached:
            simulated = await rounds(1, run)
    finally:
        server.kill()
    return {
        "overload": real,
        "overload in virtual time": virtual,
        "overload in virtual time / real vLLM": compared(real, virtual),
        "overload in virtual time / simulator in real time": compared(simulated, virtual),
    }


async def bursts(clients: Clients, folder: Path, server: Server) -> dict[str, Figures]:
    """Six long prompts in the midst of a full batch of 64, then small requests."""
    lowest: list[int] = []
    limits: dict[str, list[int]] = {policy: [] for policy in POLICIES}

    async def watch(epp: Any) -> None:
        while True:
            state = await asyncio.to_thread(epp.state)
            limits["seen"].append(state["endpoints"][0]["limit"])
            await asyncio.sleep(LIMIT_SECONDS)

    async def run(policy: str, _: int) -> Run:
        url, epp = reached[policy]
        full = [Arrival(0.0, BATCH, 16, ANSWER_TOKENS) for _ in range(MANY_SLOTS * 3 // 2)]
        await clients.load(url, full, server)
        limits["seen"] = []
        watching = asyncio.create_task(watch(epp)) if epp is not None else None
        long = [Arrival(0.5, BATCH, LONG_PROMPT_TOKENS, 16) for _ in range(LONG_PROMPTS)]
        small = [Arrival(0.7, CHAT, 16, ANSWER_TOKENS) for _ in range(SMALL_REQUESTS)]
        found = await clients.load(url, [*full[:MANY_SLOTS], *long, *small], server)
        if watching is not None:
            watching.cancel()
            if policy == "adaptive":
                lowest.append(min(limits["seen"]))
                print(f"  limits seen: {sorted(set(limits['seen']))}")
        return found

    with fronts(folder, server, MANY_SLOTS) as reached:
        found = await rounds(2, run)
    found["adaptive"]["lowest_limit"] = min(lowest)
    return {"prefill bursts": found}


async def pressure(clients: Clients, folder: Path, server: Server) -> dict[str, Figures]:
    """Requests that all fit the batch; at their end 40 of 64 fit the KV cache."""
    token_seconds = await prompt_token_seconds(clients, server)
    fits: list[Hardware] = []
    arrivals = [Arrival(0.002 * n, BATCH if n % 4 else CHAT, 300, 200) for n in range(MANY_SLOTS)]

    async def run(policy: str, _: int) -> Run:
        found = await clients.load(reached[policy][0], arrivals, server)
        if policy == "direct":
            fits.append(fit(found, MANY_SLOTS, token_seconds))
        return found

    with fronts(folder, server, KV_SLOTS) as reached:
        real = await rounds(2, run)
    hardware = fits[-1]
    virtual = replayed(hardware, arrivals, KV_SLOTS)
    return {
        "KV pressure": real,
        "KV pressure in virtual time": virtual,
        "KV pressure in virtual time / real vLLM": compared(real, virtual),
    }


async def grammar(clients: Clients, folder: Path, server: Server) -> dict[str, Figures]:
    """One request with a large JSON schema, then small ones; all through a server that is idle."""
    number = 0

    async def run(policy: str, _: int) -> Run:
        nonlocal number
        number += 1
        properties = {f"field_{number}_{n}": {"type": "string"} for n in range(GRAMMAR_PROPERTIES)}
        schema = {"type": "object", "properties": properties, "required": list(properties)}
        url = reached[policy][0]
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        compiling = asyncio.create_task(
            clients.ask(url, Arrival(0.0, BATCH, 16, 16), response_format=wanted)
        )
        await asyncio.sleep(0.5)
        small = [Arrival(0.05 * n, CHAT, 16, 30) for n in range(SMALL_REQUESTS)]
        found = await clients.load(url, small, server)
        answered = await compiling
        if answered.status != 200:
            print(f"  the request with a grammar got status {answered.status} ({policy})")
        return found

    with fronts(folder, server, SLOTS) as reached:
        return {"grammar": await rounds(2, run)}


async def restart(clients: Clients, folder: Path, server: Server) -> dict[str, Figures]:
    """The server is killed under load and started again at once; how long that takes is its own."""
    arrivals = mixed(6.0, 20.0, 2)

    async def again() -> float:
        await asyncio.sleep(RESTART_AT)
        server.kill()
        server.start()
        began = time.monotonic()
        await server.ready()
        return time.monotonic() - began

    async def run(policy: str, _: int) -> Run:
        restarting = asyncio.create_task(again())
        try:
            found = await clients.load(reached[policy][0], arrivals, server)
        finally:
            away_seconds = await restarting
        print(f"  {policy}: the server was away for {away_seconds:.0f} s")
        return found

    with fronts(folder, server, SLOTS) as reached:
        return {"restart": await rounds(1, run)}


STORIES = {
    "bursts": (MANY_SLOTS, bursts),
    "pressure": (MANY_SLOTS, pressure),
    "grammar": (SLOTS, grammar),
    "restart": (SLOTS, restart),
    "overload": (SLOTS, overload),
}


async def tell(names: Sequence[str], folder: Path) -> dict[str, Figures]:
    """Run stories; those of one size of batch share a server."""
    results: dict[str, Figures] = {}
    timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        for slots in (MANY_SLOTS, SLOTS):
            chosen = [name for name in names if STORIES[name][0] == slots]
            if not chosen:
                continue
            server = Server.vllm(folder, slots)
            server.start()
            try:
                await server.ready()
                clients = Clients(session, slots)
                for name in chosen:
                    own = folder / name
                    own.mkdir()
                    for title, found in (await STORIES[name][1](clients, own, server)).items():
                        show(title, found)
                        results[title] = found
            finally:
                server.kill()
    return results


def main() -> int:
    """Run the stories."""
    parser = argparse.ArgumentParser(prog="hack/bench vllm", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--only", action="append", choices=STORIES, help="a story; all by default")
    arguments = parser.parse_args()
    if not (HOME / "venv/bin/vllm").exists():
        print("no vLLM here: run hack/vllm first (6 GB)", file=sys.stderr)
        return 2
    names = [name for name in STORIES if name in (arguments.only or STORIES)]
    with tempfile.TemporaryDirectory(prefix="forebay-") as name:
        results = asyncio.run(tell(names, Path(name)))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
