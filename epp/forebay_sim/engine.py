"""Continuous batching as a model in virtual time: what a vLLM engine does, without the GPU.

Requests wait first come, first served, until a slot of the batch, KV blocks and their LoRA adapter
are free; their prompt is prefilled; then one step after the other gives every request of the batch
one more token. When the KV blocks run out the youngest request is preempted: it loses its blocks,
goes to the front of the queue and is later computed again.

Pure: no clock, no I/O, no randomness. Every entry point takes `now` (seconds on any monotonic
clock), and `next_wakeup` says when to call `advance`. Due events are processed at their own
instants, so a late caller does not slow the engine down. Texts and HTTP do not belong here.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, fields

from forebay_sim.kvcache import Holding, KVCache
from forebay_sim.lora import AdapterSlots

# Sums of step times carry rounding errors; instants this close are the same one.
_SAME_INSTANT_SECONDS = 1e-6


class QueueFullError(Exception):
    """The queue is full; a server answers 429."""


class TooLongError(ValueError):
    """Prompt and answer would not fit the KV cache even alone."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What the simulated hardware and model can do. The defaults: 8 slots, 50 ms, 100 tokens/s.

    Attributes:
        max_num_seqs: slots, the requests running at once.
        prefill_overhead_seconds: time to the first token of a very short prompt.
        prefill_seconds_per_token: added for each prompt token not found in the prefix cache.
        decode_seconds_per_token: duration of a step with one request running.
        full_batch_slowdown: a step with all slots taken lasts this many times longer than with
            one, and in proportion between; 1.0 means no slowdown.
        kv_blocks: size of the KV cache; bounds prompt and answer of the longest request.
        block_size_tokens: tokens per KV block.
        max_waiting: requests that may wait for a slot; more are refused.
        max_loras: LoRA adapters loaded at once.
        lora_load_seconds: time to load one.

    Raises:
        ValueError: a value is out of range; the message names the field.
    """

    max_num_seqs: int = 8
    prefill_overhead_seconds: float = 0.05
    prefill_seconds_per_token: float = 0.00002
    decode_seconds_per_token: float = 0.01
    full_batch_slowdown: float = 1.0
    kv_blocks: int = 8192
    block_size_tokens: int = 16
    max_waiting: int = 1000
    max_loras: int = 1
    lora_load_seconds: float = 0.1

    def __post_init__(self) -> None:
        least = dict.fromkeys(("max_num_seqs", "kv_blocks", "block_size_tokens", "max_loras"), 1.0)
        least["full_batch_slowdown"] = 1.0
        # A step must take time, else virtual time would stand still.
        least["decode_seconds_per_token"] = 1e-5
        for name in (declared.name for declared in fields(self)):
            value = getattr(self, name)
            minimum = least.get(name, 0.0)
            if not minimum <= value < float("inf"):
                raise ValueError(f"{name} must be finite and at least {minimum:g}, not {value}")


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
    """The request had its last token, in the event before, and holds nothing any more."""

    at: float
    request_id: int
    usage: Usage


@dataclass(frozen=True, slots=True)
class Preempted:
    """The request lost its KV blocks and waits again; the tokens produced so far stay valid."""

    at: float
    request_id: int


Event = FirstToken | TokensProduced | Finished | Preempted


@dataclass(slots=True)
class EngineTotals:
    """Counts since the start; the prefix cache's are in tokens, as vLLM counts them."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0


@dataclass(slots=True, eq=False)
class _Sequence:
    request: EngineRequest
    generated: int = 0
    look_at: int = 0  # value of `generated` at which it finishes or needs another block
    ready_at: float = 0.0
    cached_tokens: int = 0
    recomputed: bool = False
    holding: Holding = field(default_factory=lambda: Holding((), 0, 0))


class Engine:
    """One engine. Between calls no sequence waits that could run, except those just preempted."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.totals = EngineTotals()
        self._cache = KVCache(settings.kv_blocks, settings.block_size_tokens)
        self._adapters = AdapterSlots(settings.max_loras, settings.lora_load_seconds)
        self._live: dict[int, _Sequence] = {}  # all of them, by id
        self._waiting: deque[_Sequence] = deque()
        self._running: dict[int, _Sequence] = {}  # oldest first; prefilling and decoding
        self._prefilling: dict[int, _Sequence] = {}
        self._decoding: dict[int, _Sequence] = {}
        self._step_ends_at: float | None = None
        self._events: list[Event] = []

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def kv_used_blocks(self) -> int:
        """KV blocks that requests hold."""
        return self._cache.used

    @property
    def kv_usage(self) -> float:
        """Fraction 0-1 of the KV blocks that requests hold."""
        return self._cache.used / self._cache.total

    def running_adapters(self) -> set[str]:
        """LoRA adapters of running requests."""
        return {s.request.adapter for s in self._running.values() if s.request.adapter}

    def waiting_adapters(self) -> set[str]:
        """LoRA adapters of waiting requests."""
        return {s.request.adapter for s in self._waiting if s.request.adapter}

    def submit(self, request: EngineRequest, now: float) -> None:
        """Take a request in: it runs at once if it can, and waits otherwise.

        Raises:
            QueueFullError: it would have to wait, and no more may.
            TooLongError: it can never fit the KV cache.
            ValueError: its token counts are below 1 or its id is in use.
        """
        if request.prompt_tokens < 1 or request.max_tokens < 1:
            raise ValueError(f"request {request.id}: prompt_tokens and max_tokens must be >= 1")
        if request.id in self._live:
            raise ValueError(f"request {request.id} is already in the engine")
        # The last token is never read again, so it needs no block.
        tokens = request.prompt_tokens + request.max_tokens - 1
        if self._cache.blocks_for(tokens) > self._cache.total:
            room = self._cache.total * self._cache.block_size_tokens
            raise TooLongError(
                f"prompt of {request.prompt_tokens} and answer of {request.max_tokens} tokens"
                f" exceed the KV cache of {room} tokens"
            )
        self._run_until(now)
        sequence = self._live[request.id] = _Sequence(request)
        self._waiting.append(sequence)
        self._admit(now)
        if request.id not in self._running and len(self._waiting) > self.settings.max_waiting:
            self._waiting.remove(sequence)
            del self._live[request.id]
            raise QueueFullError(f"{self.settings.max_waiting} requests are waiting already")

    def abort(self, request_id: int, now: float) -> bool:
        """Drop a request whose client is gone; False when the engine does not hold it."""
        self._run_until(now)
        sequence = self._live.pop(request_id, None)
        if sequence is None:
            return False
        if request_id in self._running:
            self._leave_batch(sequence)
        else:
            self._waiting.remove(sequence)
        self._admit(now)
        return True

    def next_wakeup(self) -> float | None:
        """When `advance` will next have something to say; None when the engine is idle."""
        if self._events:
            return self._events[0].at
        return self._next_step_end()

    def advance(self, now: float) -> list[Event]:
        """Process all that is due by `now`; returns the events since the last call, in order."""
        self._run_until(now)
        events, self._events = self._events, []
        return events

    def _next_step_end(self) -> float | None:
        # While a step runs, prefills become visible at its end: outputs leave an engine together.
        if self._step_ends_at is not None:
            return self._step_ends_at
        return min((s.ready_at for s in self._prefilling.values()), default=None)

    def _run_until(self, now: float) -> None:
        while (at := self._next_step_end()) is not None and at <= now:
            growing = self._end_step(at) + self._end_prefills(at)
            self._begin_step(at, growing)

    def _end_step(self, at: float) -> list[_Sequence]:
        """Give each decoding sequence its token; returns those that need a block to go on."""
        if not self._decoding:
            return []
        self._events.append(TokensProduced(at, tuple(self._decoding)))
        self.totals.generation_tokens += len(self._decoding)
        due = []
        for sequence in self._decoding.values():
            sequence.generated += 1
            if sequence.generated == sequence.look_at:
                due.append(sequence)
        return [s for s in due if not self._finish_if_done(s, at)]

    def _end_prefills(self, at: float) -> list[_Sequence]:
        """Sample a token from each finished prefill; returns those that need a block to go on."""
        growing = []
        ready = [s for s in self._prefilling.values() if s.ready_at <= at + _SAME_INSTANT_SECONDS]
        for sequence in ready:
            request_id = sequence.request.id
            del self._prefilling[request_id]
            self._cache.share(sequence.holding)
            if sequence.generated == 0:
                self.totals.prompt_tokens += sequence.request.prompt_tokens
                self._events.append(FirstToken(at, request_id))
            else:
                self._events.append(TokensProduced(at, (request_id,)))
            self.totals.generation_tokens += 1
            sequence.generated += 1
            if not self._finish_if_done(sequence, at):
                self._decoding[request_id] = sequence
                self._look_later(sequence)
                if sequence.generated >= sequence.look_at:
                    growing.append(sequence)
        return growing

    def _begin_step(self, at: float, growing: list[_Sequence]) -> None:
        preempted = False
        for sequence in growing:
            # An older sequence may have pushed this one out of the batch just before.
            while sequence.request.id in self._decoding and not self._cache.grow(sequence.holding):
                self._preempt_youngest(at)
                preempted = True
            self._look_later(sequence)
        if not preempted:
            # A preempted request would only push out others, or itself again, in this instant.
            self._admit(at)
        self._step_ends_at = at + self._step_seconds() if self._decoding else None

    def _step_seconds(self) -> float:
        settings = self.settings
        others = (len(self._running) - 1) / max(1, settings.max_num_seqs - 1)
        return settings.decode_seconds_per_token * (1 + (settings.full_batch_slowdown - 1) * others)

    def _look_later(self, sequence: _Sequence) -> None:
        room = sequence.holding.blocks * self._cache.block_size_tokens
        full_at = room - sequence.request.prompt_tokens + 1
        sequence.look_at = min(sequence.request.max_tokens, full_at)

    def _finish_if_done(self, sequence: _Sequence, at: float) -> bool:
        request = sequence.request
        if sequence.generated < request.max_tokens:
            return False
        self._leave_batch(sequence)
        del self._live[request.id]
        usage = Usage(request.prompt_tokens, sequence.generated, sequence.cached_tokens)
        self._events.append(Finished(at, request.id, usage))
        return True

    def _preempt_youngest(self, at: float) -> None:
        sequence = next(reversed(self._running.values()))
        self._leave_batch(sequence)
        sequence.recomputed = True
        self._waiting.appendleft(sequence)
        self.totals.preemptions += 1
        self._events.append(Preempted(at, sequence.request.id))

    def _leave_batch(self, sequence: _Sequence) -> None:
        request = sequence.request
        del self._running[request.id]
        self._prefilling.pop(request.id, None)
        self._decoding.pop(request.id, None)
        self._cache.release(sequence.holding)
        self._adapters.release(request.adapter)

    def _admit(self, now: float) -> None:
        """Move waiting requests into the batch while it has free slots.

        One whose adapter cannot be loaded is passed over; the first that lacks KV blocks holds up
        all behind it, so a long prompt is not starved by short ones.
        """
        passed_over: list[_Sequence] = []
        while self._waiting and len(self._running) < self.settings.max_num_seqs:
            sequence = self._waiting.popleft()
            request = sequence.request
            if not self._adapters.has_place_for(request.adapter):
                passed_over.append(sequence)
                continue
            context_tokens = request.prompt_tokens + sequence.generated
            holding = self._cache.allocate(context_tokens, request.block_hashes)
            if holding is None:
                self._waiting.appendleft(sequence)
                break
            self._start_prefill(sequence, holding, context_tokens, now)
        self._waiting.extendleft(reversed(passed_over))

    def _start_prefill(
        self, sequence: _Sequence, holding: Holding, context_tokens: int, now: float
    ) -> None:
        request = sequence.request
        cached_tokens = holding.cached_blocks * self._cache.block_size_tokens
        if not sequence.recomputed:
            sequence.cached_tokens = cached_tokens
            self.totals.prefix_cache_queries += request.prompt_tokens
            self.totals.prefix_cache_hits += cached_tokens
        sequence.holding = holding
        sequence.ready_at = (
            self._adapters.acquire(request.adapter, now)
            + self.settings.prefill_overhead_seconds
            + self.settings.prefill_seconds_per_token * (context_tokens - cached_tokens)
        )
        self._running[request.id] = self._prefilling[request.id] = sequence
