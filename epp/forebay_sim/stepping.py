"""Continuous batching step by step, in virtual time: a model of vLLM's V1 scheduler.

A step has a budget of tokens. Each request that decodes takes one; prompts take the rest in chunks,
those that have begun first, then waiting ones in order, as long as the batch and the KV cache have
room. So requests wait although the batch has room, and a long prompt slows all others. When KV
blocks run out the youngest request is preempted and computed again later. Gauges are published at
the end of a step: they stand still during a long one, and for as long as the engine idles.

A step costs what changes in it, not what runs: the tokens of all that decode are counted as one.
Pure: no clock, no I/O, no randomness. Texts and HTTP do not belong here, nor how long a step takes
(hardware.py).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from forebay_sim.engine import Finished, FirstToken, Preempted, TooLongError, Usage
from forebay_sim.kvcache import Holding, KVCache

if TYPE_CHECKING:
    from forebay_sim.engine import EngineRequest
    from forebay_sim.hardware import Hardware

Event = FirstToken | Finished | Preempted


@dataclass(frozen=True, slots=True)
class Gauges:
    """What the metrics page says.

    Attributes:
        running: requests in the batch.
        waiting: requests that wait for room.
        deferred: requests that wait for something else, such as their grammar.
        kv_usage: fraction 0-1 of the KV cache in use.
        steps: since the start.
        step_tokens: that these have processed; a prompt counts in the step that ends its prefill,
            as vLLM has it.
        prompt_tokens: of requests whose prompt is done.
        generation_tokens: of answers.
        preemptions: since the start.
    """

    running: int = 0
    waiting: int = 0
    deferred: int = 0
    kv_usage: float = 0.0
    steps: int = 0
    step_tokens: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0


@dataclass(slots=True, eq=False)
class _Sequence:
    request: EngineRequest
    number: int
    remaining: int = 0  # tokens of the prompt, or of what is computed again, not yet prefilled
    generated: int = 0
    cached_tokens: int = 0
    entered: int = -1  # decode step after which it has `generated` tokens; -1: does not decode
    residue: int = 0  # of the decode steps that need another block
    computed_before: bool = False
    holding: Holding = field(default_factory=lambda: Holding((), 0, 0))


class StepEngine:
    """One engine."""

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware
        self.published = Gauges()
        self._cache = KVCache(hardware.kv_blocks, hardware.block_size_tokens)
        self._live: dict[int, _Sequence] = {}
        self._waiting: deque[_Sequence] = deque()
        self._deferred: list[tuple[float, int, _Sequence]] = []
        self._running: dict[int, _Sequence] = {}  # oldest first
        self._prefilling: dict[int, _Sequence] = {}  # likewise
        self._decoding = 0
        self._context_tokens = 0  # of all that decode
        self._ticks = 0  # decode steps so far
        self._ends: list[tuple[int, int, _Sequence, int]] = []
        self._growing: list[dict[int, _Sequence]] = [{} for _ in range(hardware.block_size_tokens)]
        self._chunks: list[tuple[_Sequence, int]] = []
        self._step_decodes = 0
        self._step_ends_at: float | None = None
        self._events: list[Event] = []
        self._number = 0
        self._steps = self._step_tokens = 0
        self._prompt_tokens = self._generation_tokens = self._preemptions = 0

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that wait for room in the batch."""
        return len(self._waiting)

    @property
    def preemptions(self) -> int:
        """Since the start."""
        return self._preemptions

    @property
    def kv_used_blocks(self) -> int:
        """KV blocks that requests hold."""
        return self._cache.used

    def submit(self, request: EngineRequest, now: float) -> None:
        """Take a request in.

        Raises:
            TooLongError: it can never fit the KV cache.
            ValueError: its id is in use.
        """
        if request.id in self._live:
            raise ValueError(f"request {request.id} is already in the engine")
        tokens = request.prompt_tokens + request.max_tokens - 1
        if self._cache.blocks_for(tokens) > self._cache.total:
            raise TooLongError(f"{tokens} tokens exceed the KV cache")
        self._run_until(now)
        self._number += 1
        sequence = self._live[request.id] = _Sequence(request, self._number)
        if request.deferred_seconds:
            ready_at = now + request.deferred_seconds
            heappush(self._deferred, (ready_at, sequence.number, sequence))
        else:
            self._waiting.append(sequence)
        if self._step_ends_at is None:
            self._begin_step(now)

    def abort(self, request_id: int, now: float) -> bool:
        """Drop a request whose client is gone; False when the engine does not hold it."""
        self._run_until(now)
        sequence = self._live.pop(request_id, None)
        if sequence is None:
            return False
        if request_id in self._running:
            self._leave(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        else:
            self._deferred = [entry for entry in self._deferred if entry[2] is not sequence]
        return True

    def next_wakeup(self) -> float | None:
        """When `advance` will next have something to say; None when the engine is idle."""
        if self._events:
            return self._events[0].at
        if self._step_ends_at is not None:
            return self._step_ends_at
        return self._deferred[0][0] if self._deferred else None

    def advance(self, now: float) -> list[Event]:
        """Process all that is due by `now`; return the events since the last call, in order."""
        self._run_until(now)
        events, self._events = self._events, []
        return events

    def _run_until(self, now: float) -> None:
        while True:
            at = self._step_ends_at
            if at is None:
                if not self._deferred or self._deferred[0][0] > now:
                    return
                self._begin_step(self._deferred[0][0])
                if self._step_ends_at is None:
                    return
            elif at <= now:
                self._end_step(at)
                self._begin_step(at)
            else:
                return

    # --- a step

    def _begin_step(self, at: float) -> None:
        while self._deferred and self._deferred[0][0] <= at:
            self._waiting.append(heappop(self._deferred)[2])
        self._step_ends_at = None
        if not self._running and not self._waiting:
            return
        hardware = self.hardware
        preempted = self._grow(at)
        budget = hardware.max_num_batched_tokens - self._decoding
        self._chunks = chunks = []
        for sequence in self._prefilling.values():
            if budget <= 0:
                break
            chunk = min(budget, sequence.remaining)
            chunks.append((sequence, chunk))
            budget -= chunk
        if not preempted:
            while self._waiting and budget > 0 and len(self._running) < hardware.max_num_seqs:
                admitted = self._admit()
                if admitted is None:
                    break
                chunk = min(budget, admitted.remaining)
                chunks.append((admitted, chunk))
                budget -= chunk
        self._step_decodes = self._decoding
        tokens = hardware.max_num_batched_tokens - budget
        if not tokens:  # all that runs was preempted, and nothing fits beside what is left
            return
        self._step_ends_at = (
            at
            + hardware.overhead_seconds
            + max(hardware.weights_seconds, tokens * hardware.token_seconds)
            + self._context_tokens * hardware.context_token_seconds
        )

    def _end_step(self, at: float) -> None:
        self._steps += 1
        if self._step_decodes:
            self._ticks += 1
            self._context_tokens += self._decoding
            self._generation_tokens += self._decoding
            self._step_tokens += self._decoding
            ends = self._ends
            while ends and ends[0][0] <= self._ticks:
                _, _, sequence, entered = heappop(ends)
                if sequence.entered == entered and sequence.request.id in self._running:
                    self._finish(sequence, at)
        for sequence, chunk in self._chunks:
            request = sequence.request
            if self._prefilling.get(request.id) is not sequence:
                continue  # aborted or preempted
            sequence.remaining -= chunk
            if sequence.remaining:
                continue
            del self._prefilling[request.id]
            self._cache.share(sequence.holding)
            sequence.generated += 1
            self._generation_tokens += 1
            if not sequence.computed_before:
                self._prompt_tokens += request.prompt_tokens
                self._step_tokens += request.prompt_tokens
                self._events.append(FirstToken(at, request.id))
            if sequence.generated >= request.max_tokens:
                self._finish(sequence, at)
            else:
                self._decode(sequence)
        self._chunks = []
        self._publish()

    def _publish(self) -> None:
        self.published = Gauges(
            len(self._running),
            len(self._waiting),
            len(self._deferred),
            self._cache.used / self._cache.total,
            self._steps,
            self._step_tokens,
            self._prompt_tokens,
            self._generation_tokens,
            self._preemptions,
        )

    def _admit(self) -> _Sequence | None:
        """Let the first waiting request into the batch, or none where it lacks KV blocks."""
        sequence = self._waiting[0]
        request = sequence.request
        tokens = request.prompt_tokens + sequence.generated
        holding = self._cache.allocate(tokens, request.block_hashes)
        if holding is None:
            return None
        self._waiting.popleft()
        cached_tokens = holding.cached_blocks * self.hardware.block_size_tokens
        if not sequence.computed_before:
            sequence.cached_tokens = cached_tokens
        sequence.holding = holding
        sequence.remaining = tokens - cached_tokens
        self._running[request.id] = self._prefilling[request.id] = sequence
        return sequence

    # --- decoding: all at once

    def _decode(self, sequence: _Sequence) -> None:
        sequence.entered = self._ticks
        self._decoding += 1
        stored = sequence.request.prompt_tokens + sequence.generated - 1
        self._context_tokens += stored
        left = sequence.request.max_tokens - sequence.generated
        heappush(self._ends, (self._ticks + left, sequence.number, sequence, self._ticks))
        room = sequence.holding.blocks * self.hardware.block_size_tokens - stored
        sequence.residue = (self._ticks + room + 1) % self.hardware.block_size_tokens
        self._growing[sequence.residue][sequence.request.id] = sequence

    def _grow(self, at: float) -> bool:
        """Give another block to each request that needs one; True if a request was preempted."""
        if not self._decoding:
            return False
        growing = self._growing[(self._ticks + 1) % self.hardware.block_size_tokens]
        preempted = False
        while not self._cache.take(len(growing)):
            self._preempt(at)
            preempted = True
        for sequence in growing.values():
            sequence.holding.private += 1
        return preempted

    def _preempt(self, at: float) -> None:
        sequence = next(reversed(self._running.values()))
        self._leave(sequence)
        sequence.computed_before = True
        self._waiting.appendleft(sequence)
        self._preemptions += 1
        self._events.append(Preempted(at, sequence.request.id))

    def _finish(self, sequence: _Sequence, at: float) -> None:
        request = sequence.request
        self._leave(sequence)
        del self._live[request.id]
        usage = Usage(request.prompt_tokens, request.max_tokens, sequence.cached_tokens)
        self._events.append(Finished(at, request.id, usage))

    def _leave(self, sequence: _Sequence) -> None:
        request_id = sequence.request.id
        del self._running[request_id]
        self._prefilling.pop(request_id, None)
        if sequence.entered >= 0:
            sequence.generated += self._ticks - sequence.entered
            self._decoding -= 1
            self._context_tokens -= sequence.request.prompt_tokens + sequence.generated - 1
            sequence.entered = -1
            del self._growing[sequence.residue][request_id]
        self._cache.release(sequence.holding)
