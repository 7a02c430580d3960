"""Loads whose prompts begin alike, and figures of who chose servers well. Pure."""

from __future__ import annotations

import gzip
from collections import OrderedDict
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING

import msgspec

from forebay_control.plan import DEFAULT_BANDS, FairnessName, Plan, ScorerPlan, SelectionPlan
from forebay_replay.load import BLOCK_TOKENS, Arrival
from forebay_sim.hardware import PRESETS
from forebay_sim.report import percentile

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from forebay_control.plan import ScorerName
    from forebay_replay.replay import Replay

SERVERS = 4
# Blocks as long as those of the traces, and as many tokens in all.
_LARGE = PRESETS["70b-8xh100"]
HARDWARE = replace(
    _LARGE,
    block_size_tokens=BLOCK_TOKENS,
    kv_blocks=10_000,
)
TENANTS = ("north", "south")


class _Row(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


_row = msgspec.json.Decoder(_Row)


def mooncake(path: Path, count: int, speed: float) -> list[Arrival]:
    """Read the first requests of a Mooncake trace (Qin et al., FAST 2025).

    Args:
        path: JSON lines, compressed.
        count: how many requests.
        speed: how many times faster they arrive than in the trace.
    """
    arrivals: list[Arrival] = []
    with gzip.open(path, "rb") as file:
        for number, line in enumerate(file):
            if number == count:
                break
            row = _row.decode(line)
            full = row.input_length // BLOCK_TOKENS
            arrivals.append(
                Arrival(
                    row.timestamp / 1000 / speed,
                    TENANTS[number % len(TENANTS)],
                    max(1, row.input_length),
                    max(1, row.output_length),
                    row.hash_ids[:full],
                )
            )
    return sorted(arrivals)


def system_prompts(count: int, speed: float) -> list[Arrival]:
    """Return requests of 40 applications, popular by rank, with system prompts of 8 blocks."""
    random = Random(3)  # noqa: S311  # a load, not secrets
    applications = range(40)
    weights = [1 / (1 + rank) for rank in applications]
    at = 0.0
    arrivals: list[Arrival] = []
    for number in range(count):
        at += random.expovariate(20 * speed)
        (application,) = random.choices(applications, weights)
        own = random.randrange(1, 4)
        blocks = (*range(8 * application, 8 * application + 8),)
        blocks += tuple(1_000_000 + 4 * number + part for part in range(own))
        tokens = len(blocks) * BLOCK_TOKENS + random.randrange(BLOCK_TOKENS)
        model = TENANTS[number % len(TENANTS)]
        arrivals.append(Arrival(at, model, tokens, random.randrange(20, 200), blocks))
    return arrivals


def sessions(count: int, speed: float) -> list[Arrival]:
    """Return conversations of about six turns, each of which goes on from the one before."""
    random = Random(4)  # noqa: S311  # a load, not secrets
    arrivals: list[Arrival] = []
    number = 0
    start = 0.0
    while len(arrivals) < count:
        start += random.expovariate(2.5 * speed)
        at = start
        blocks: tuple[int, ...] = ()
        for _ in range(random.randrange(1, 12)):
            grown = random.randrange(1, 8)
            blocks += tuple(range(number, number + grown))
            number += grown
            tokens = len(blocks) * BLOCK_TOKENS + random.randrange(BLOCK_TOKENS)
            arrivals.append(Arrival(at, TENANTS[number % 2], tokens, 150, blocks))
            at += random.expovariate(speed / 15)
    return sorted(arrivals)[:count]


def plan(scorers: Iterable[tuple[ScorerName, int]] | None) -> Plan:
    """Return a plan in which two tenants share the tokens; by these scorers, or the default."""
    bands = tuple(
        replace(
            band,
            fairness=FairnessName.WEIGHTED_FAIR_TOKENS,
            ttl_seconds=3600.0,
            max_requests=1_000_000,
            flow_max_requests=1_000_000,
            max_bytes=1 << 40,
            flow_max_bytes=1 << 40,
        )
        for band in DEFAULT_BANDS
    )
    made = Plan(bands=bands)
    limits = replace(made.limits, max_requests=1_000_000, max_bytes=1 << 40)
    made = replace(made, limits=limits)
    if scorers is None:
        return made
    return replace(made, selection=SelectionPlan(tuple(ScorerPlan(*each) for each in scorers)))


def best_hit_ratio(arrivals: Sequence[Arrival], blocks: int) -> float:
    """Return the part of prompt tokens that one cache of so many blocks in all would have had."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for arrival in arrivals:
        found = 0
        for name in arrival.blocks[: (arrival.prompt_tokens - 1) // BLOCK_TOKENS]:
            if name not in cache:
                break
            found += 1
        hits += found
        for name in reversed(arrival.blocks):
            cache.pop(name, None)
            cache[name] = None
        while len(cache) > blocks:
            cache.popitem(last=False)
    return hits * BLOCK_TOKENS / sum(arrival.prompt_tokens for arrival in arrivals)


def figures(replay: Replay) -> dict[str, float]:
    """Return what a run came to: hits as a part of prompt tokens, and times to first token."""
    pages = [server.engine.published for server in replay.servers]
    prompt_tokens = sum(answer.arrival.prompt_tokens for answer in replay.answers)
    ttft_ms = [answer.ttft_seconds * 1e3 for answer in replay.answers]
    return {
        "hit_ratio": round(sum(page.prefix_hits for page in pages) / prompt_tokens, 4),
        "ttft_mean_ms": round(sum(ttft_ms) / len(ttft_ms), 1),
        "ttft_p99_ms": round(percentile(ttft_ms, 99) or 0.0, 1),
        "input_tokens_per_second": round(prompt_tokens / replay.now),
    }
