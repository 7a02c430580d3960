"""What is asked for: requests with their classes, lengths and arrival times. Pure."""

from __future__ import annotations

import csv
import heapq
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path
    from random import Random


BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True, order=True)
class Arrival:
    """One request.

    Attributes:
        at: seconds after the start.
        model: the InferenceModel that it names.
        prompt_tokens: length of the prompt.
        answer_tokens: length of the answer.
        blocks: names of the full blocks of `BLOCK_TOKENS` of its prompt, which also say what comes
            before; empty where no two prompts begin alike.
        adapter: LoRA adapter that it needs; "" for the base model.
    """

    at: float
    model: str
    prompt_tokens: int
    answer_tokens: int
    blocks: tuple[int, ...] = ()
    adapter: str = ""


def lengths(
    prompt: float, answer: float, spread: float = 0.5
) -> Callable[[Random], tuple[int, int]]:
    """Return a source of prompt and answer lengths in tokens.

    Args:
        prompt: mean length of a prompt.
        answer: mean length of an answer.
        spread: each is evenly distributed within this part of its mean.
    """

    def draw(random: Random) -> tuple[int, int]:
        low, high = 1 - spread, 1 + spread
        return (
            max(1, round(prompt * random.uniform(low, high))),
            max(1, round(answer * random.uniform(low, high))),
        )

    return draw


def poisson(
    model: str,
    rate: float,
    seconds: float,
    draw: Callable[[Random], tuple[int, int]],
    random: Random,
    start: float = 0.0,
) -> Iterator[Arrival]:
    """Yield requests of a model at random, `rate` a second, from `start` for `seconds`."""
    at = start
    while (at := at + random.expovariate(rate)) < start + seconds:
        yield Arrival(at, model, *draw(random))


def together(*streams: Iterable[Arrival]) -> list[Arrival]:
    """Return several loads as one, in order of time."""
    return list(heapq.merge(*streams))


def trace(path: Path, count: int, speed: float, model_of: Callable[[int], str]) -> list[Arrival]:
    """Read the first requests of an Azure LLM inference trace (Azure Public Dataset, 2023).

    Args:
        path: CSV with the columns TIMESTAMP, ContextTokens, GeneratedTokens.
        count: how many requests.
        speed: how many times faster they arrive than in the trace; burstiness stays.
        model_of: the model of the request of this number.
    """
    arrivals: list[Arrival] = []
    first: datetime | None = None
    with path.open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file)):
            if number == count:
                break
            when = datetime.fromisoformat(row["TIMESTAMP"][:26])
            first = first or when
            arrivals.append(
                Arrival(
                    (when - first).total_seconds() / speed,
                    model_of(number),
                    max(1, int(row["ContextTokens"])),
                    max(1, int(row["GeneratedTokens"])),
                )
            )
    return sorted(arrivals)
