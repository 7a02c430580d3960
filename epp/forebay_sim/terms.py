"""What goes into a simulated engine and what comes out of it: requests, events, gauges, errors.

Declarations alone; what an engine does with them is in stepping.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class NotReadyError(Exception):
    """The engine is still starting; a server does not accept connections yet."""


class TooLongError(ValueError):
    """Prompt and answer would not fit the KV cache even alone."""


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request: it will produce exactly `max_tokens` tokens.

    Attributes:
        id: unique among the requests the engine holds.
        prompt_tokens: length of the prompt, at least 1.
        max_tokens: length of the answer, at least 1.
        block_hashes: of the prompt's full blocks, each chained over all blocks before it.
        adapter: LoRA adapter it needs; "" is the base model.
        deferred_seconds: until it can be scheduled, because its grammar is compiled, for example.
    """

    id: int
    prompt_tokens: int
    max_tokens: int
    block_hashes: tuple[int, ...] = ()
    adapter: str = ""
    deferred_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request consumed; `cached_tokens` of the prompt came from the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The request's prompt is prefilled and its first token is generated."""

    at: float
    request_id: int


@dataclass(frozen=True, slots=True)
class TokensProduced:
    """Each of these requests has one more token. Not for a request's first one."""

    at: float
    request_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """The request had its last token at this moment and holds nothing any more."""

    at: float
    request_id: int
    usage: Usage


@dataclass(frozen=True, slots=True)
class Preempted:
    """The request lost its KV blocks and waits again; the tokens produced so far stay valid."""

    at: float
    request_id: int


Event = FirstToken | TokensProduced | Finished | Preempted


class Gauges(NamedTuple):
    """What an engine publishes at the end of a step, counted as vLLM counts it.

    Gauges are of that moment, all others are totals since the start.

    Attributes:
        running: requests in the batch.
        waiting: requests that the step left waiting for room in the batch, KV blocks or budget.
        deferred: requests left waiting for something else, such as their grammar or LoRA adapter.
        kv_usage: fraction 0-1 of the KV cache that requests hold.
        steps: steps that produced a token; one that only prefills part of a prompt does not count.
        step_tokens: answer tokens of these steps, and prompt tokens computed, which all count in
            the step that ends the prefill.
        prompt_tokens: of requests whose prefill has ended.
        cached_tokens: that came from the prefix cache, among these.
        generation_tokens: of answers.
        preemptions: requests that lost their KV blocks.
        prefix_queries, prefix_hits: tokens looked up and found in the prefix cache.
        queue_seconds: time that finished requests waited for their first step.
        finished: requests that got their last token.
    """

    running: int = 0
    waiting: int = 0
    deferred: int = 0
    kv_usage: float = 0.0
    steps: int = 0
    step_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    queue_seconds: float = 0.0
    finished: int = 0
