"""One request's whole life in the flow controller, in pairs that differ in one thing.

With 100 and with 100,000 others queued; with 20,000 queued that have one subset hint between them
and 5,000 different ones, all of which allow both servers; with 64 and with 1,000 endpoints that
have free slots, so that nothing is queued; with 64 endpoints rated by Load alone, by all scorers,
and by all scorers for prompts of 8 blocks of which 6 begin like those of every tenth request; and
with 100,000 queued in 10 flows that take turns, and in 1,000 flows, tenants inside models, that
share tokens. Life: submit, the poll that finds no slot or dispatches, the completion of another
request, the poll that dispatches the next one. CPU time of this process, the median of several
rounds of each, taken in turn. And the memory of a queued request of the last.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
import tracemalloc
from collections import deque
from dataclasses import replace
from pathlib import Path

from forebay_control.plan import (
    DEFAULT_BANDS,
    FairnessName,
    InnerPlan,
    LimitsPlan,
    ModelPlan,
    Plan,
    SaturationMode,
    SaturationPlan,
    ScorerName,
    ScorerPlan,
    SelectionPlan,
)
from forebay_epp.core.controller import FlowController
from forebay_epp.core.terms import PREFIX_BLOCK_BYTES, Endpoint, Request, Usage, Verdict

FEW, MANY = 100, 100_000
ENDPOINTS, SLOTS, MODELS = 4, 8, 10
HINTED, HINTS = 20_000, 5_000
LIVES, ROUNDS = 10_000, 7
SMALL_POOL, LARGE_POOL = 64, 1000
FREE = SLOTS * SMALL_POOL * 7 // 10
LOAD_ALONE = SelectionPlan((ScorerPlan(ScorerName.LOAD),))
ALL_SCORERS = SelectionPlan(tuple(ScorerPlan(name) for name in ScorerName))
TENANTS = 100  # of each model
USAGES = [Usage(250, tokens) for tokens in (20, 90, 400, 1000)]


class Pool:
    """A controller with so many requests queued, and so many different subset hints.

    Fewer than 0 queued: so many slots are free. With tenants, tokens are shared by models, and
    inside each by so many tenants.
    """

    def __init__(
        self,
        queued: int,
        hints: int = 0,
        endpoints: int = ENDPOINTS,
        tenants: int = 0,
        selection: SelectionPlan | None = None,
        *,
        prefixes: bool = False,
    ) -> None:
        """Fill slots and queue."""
        self._hints = hints
        self._tenants = tenants
        self._prefixes = prefixes
        fair = FairnessName.TOKEN_FAIR if tenants else FairnessName.ROUND_ROBIN
        plan = Plan(
            bands=tuple(
                replace(
                    band,
                    fairness=fair,
                    inner=InnerPlan(fair) if tenants else None,
                    ttl_seconds=3600,
                    max_requests=10 * MANY,
                    flow_max_requests=10 * MANY,
                )
                for band in DEFAULT_BANDS
            ),
            models=tuple(ModelPlan(f"model-{n}", "Standard") for n in range(MODELS)),
            limits=LimitsPlan(max_requests=10 * MANY),
            saturation=SaturationPlan(SaturationMode.CONCURRENCY, SLOTS),
            selection=selection or LOAD_ALONE,
        )
        self._controller = FlowController(plan, random.Random(1))  # not a secret
        addresses = [f"10.0.{n >> 8}.{n & 255}:8000" for n in range(endpoints)]
        self._controller.set_endpoints(map(Endpoint, addresses), 0.0)
        self._now = 0.0
        self._next_id = 0
        self._in_flight: deque[int] = deque()
        for _ in range(queued + endpoints * SLOTS):
            self._submit()
        self._poll()

    def _submit(self) -> None:
        model = f"model-{self._next_id % MODELS}"
        request = Request(self._next_id, model, 1000, self._hint())
        if self._prefixes:
            number = self._next_id
            request.size_bytes = 8 * PREFIX_BLOCK_BYTES
            topic = number % 10
            request.prefix = (*range(8 * topic, 8 * topic + 6), -2 * number - 1, -2 * number)
        if self._tenants:
            request.tenant = f"tenant-{self._next_id // MODELS % self._tenants}"
        self._controller.submit(request, self._now)
        self._next_id += 1

    def _hint(self) -> frozenset[str] | None:
        """Return a new hint, as each request brings its own."""
        if not self._hints:
            return None
        number = self._next_id % self._hints
        return frozenset({"10.0.0.0:8000", "10.0.0.1:8000", f"10.9.{number >> 8}.{number & 255}:1"})

    def _poll(self) -> None:
        for decision in self._controller.poll(self._now):
            self._in_flight.append(decision.request_id)

    def lives(self) -> float:
        """Run `LIVES` lives and return the microseconds of one."""
        started = time.process_time()
        for _ in range(LIVES):
            self._now += 0.001
            self._submit()
            self._poll()
            ended = self._in_flight.popleft()
            usage = USAGES[ended % len(USAGES)] if self._tenants else None
            self._controller.complete(ended, usage, self._now, Verdict.GOOD)
            self._poll()
        return (time.process_time() - started) / LIVES * 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    tenants = Pool(MANY, tenants=TENANTS)
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    pools = [
        *(Pool(FEW), Pool(MANY)),
        *(Pool(HINTED, 1, endpoints=2), Pool(HINTED, HINTS, endpoints=2)),
        *(Pool(-SLOTS * count * 7 // 10, endpoints=count) for count in (SMALL_POOL, LARGE_POOL)),
        tenants,
        *(
            Pool(*(-FREE, 0, SMALL_POOL), selection=ALL_SCORERS, prefixes=prefixes)
            for prefixes in (False, True)
        ),
    ]
    rounds = [[pool.lives() for pool in pools] for _ in range(ROUNDS)]
    figures = {
        "life_us_100_queued": round(statistics.median(row[0] for row in rounds), 3),
        "life_us_100k_queued": round(statistics.median(row[1] for row in rounds), 3),
        "life_ratio": round(statistics.median(row[1] / row[0] for row in rounds), 3),
        "life_us_1_hint": round(statistics.median(row[2] for row in rounds), 3),
        "life_us_5k_hints": round(statistics.median(row[3] for row in rounds), 3),
        "hints_ratio": round(statistics.median(row[3] / row[2] for row in rounds), 3),
        "life_us_64_endpoints": round(statistics.median(row[4] for row in rounds), 3),
        "life_us_1k_endpoints": round(statistics.median(row[5] for row in rounds), 3),
        "life_us_token_fair": round(statistics.median(row[6] for row in rounds), 3),
        "token_fair_ratio": round(statistics.median(row[6] / row[1] for row in rounds), 3),
        "life_us_all_scorers": round(statistics.median(row[7] for row in rounds), 3),
        "all_scorers_ratio": round(statistics.median(row[7] / row[4] for row in rounds), 3),
        "life_us_prefixes": round(statistics.median(row[8] for row in rounds), 3),
        "prefixes_ratio": round(statistics.median(row[8] / row[4] for row in rounds), 3),
        "bytes_a_queued_request": round(held / MANY),
        "endpoints_ratio": round(statistics.median(row[5] / row[4] for row in rounds), 3),
    }
    for name, value in figures.items():
        print(f"{name:24}{value:10.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"bench": "core", "figures": figures}) + "\n")


if __name__ == "__main__":
    main()
