"""Continuous batching step by step, in virtual time: a model of vLLM's V1 scheduler.

A step has a budget of tokens. Each request that decodes takes one; prompts take the rest in chunks,
those that have begun first, then waiting ones in order, as long as the batch and the KV cache have
room. So requests wait although the batch has room, and a long prompt slows all others. When KV
blocks run out the youngest request is preempted: it goes to the front of the queue and is computed
again. What arrives or is aborted during a step counts from its end.

Gauges are published at the end of a step, as the scheduler left them: they stand still during a
long one and while the engine idles. An abort is carried out after that, so that where all requests
are aborted together the gauges go on showing them until the next step.

A step costs what changes in it, not what runs: the tokens of all that decode are counted as one.
Pure: no clock, no I/O, no randomness. Texts and HTTP do not belong here, nor how long a step takes
(hardware.py).
"""

from __future__ import annotations

import math
from collections import deque
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from forebay_sim.decoding import DecodeSet, Sequence
from forebay_sim.kvcache import KVCache
from forebay_sim.lora import AdapterSlots
from forebay_sim.terms import (
    Finished,
    FirstToken,
    Gauges,
    NotReadyError,
    Preempted,
    TokensProduced,
    TooLongError,
    Usage,
)

if TYPE_CHECKING:
    from forebay_sim.hardware import Hardware
    from forebay_sim.terms import EngineRequest, Event

# Sums of step times carry rounding errors; moments this close are the same one.
_SAME_MOMENT_SECONDS = 1e-6


class StepEngine:
    """One engine. It begins empty; one that restarts is a new one.

    Args:
        hardware: what it runs on.
        started_at: when it was started; it takes requests `hardware.startup_seconds` later.
        show_tokens: whether `advance` returns `TokensProduced`. They make a step cost as much as
            requests run.

    Attributes:
        published: what the metrics page shows.
        ready_at: when it takes requests.
        scheduled_tokens: tokens of the step that runs.
        preemptions: since the start.
    """

    def __init__(
        self, hardware: Hardware, started_at: float = -math.inf, *, show_tokens: bool = False
    ) -> None:
        self.hardware = hardware
        self.published = Gauges()
        self.ready_at = started_at + hardware.startup_seconds
        self.scheduled_tokens = 0
        self.preemptions = 0
        self._show_tokens = show_tokens
        self._cache = KVCache(hardware.kv_blocks, hardware.block_size_tokens)
        self._adapters = AdapterSlots(hardware.max_loras, hardware.lora_load_seconds)
        self._live: dict[int, Sequence] = {}
        self._waiting: deque[Sequence] = deque()
        self._deferred: list[tuple[float, int, Sequence]] = []  # a heap, by when it is ready
        self._running: dict[int, Sequence] = {}  # oldest first
        self._prefilling: dict[int, Sequence] = {}  # likewise
        self._decoding = DecodeSet(hardware.block_size_tokens)
        self._aborted: list[Sequence] = []  # during this step
        self._chunks: list[tuple[Sequence, int]] = []
        self._step_decodes = False
        self._step_ends_at: float | None = None
        self._left_waiting = self._left_deferred = 0
        self._events: list[Event] = []
        self._number = 0
        self._steps = self._step_tokens = 0
        self._prompt_tokens = self._cached_tokens = self._generation_tokens = 0
        self._prefix_queries = self._prefix_hits = 0
        self._queue_seconds = 0.0
        self._finished = 0

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that wait for room in the batch, or for the end of the step."""
        return len(self._waiting)

    @property
    def deferred(self) -> int:
        """Requests that cannot be scheduled yet."""
        return len(self._deferred)

    @property
    def kv_used_blocks(self) -> int:
        """KV blocks that requests hold."""
        return self._cache.used

    def running_adapters(self) -> set[str]:
        """LoRA adapters of running requests."""
        return {s.request.adapter for s in self._running.values() if s.request.adapter}

    def waiting_adapters(self) -> set[str]:
        """LoRA adapters of waiting requests."""
        return {s.request.adapter for s in self._waiting if s.request.adapter}

    def submit(self, request: EngineRequest, now: float) -> None:
        """Take a request in; it is scheduled when the step ends that runs now.

        Raises:
            NotReadyError: the engine is still starting.
            TooLongError: it can never fit the KV cache.
            ValueError: its token counts are below 1 or its id is in use.
        """
        if now < self.ready_at:
            raise NotReadyError(f"the engine is ready in {self.ready_at - now:.1f} s")
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
        self._number += 1
        idle = self._step_ends_at is None
        queued_at = now if self._step_ends_at is None else self._step_ends_at
        sequence = self._live[request.id] = Sequence(request, self._number, queued_at)
        if request.deferred_seconds > 0:
            ready_at = now + request.deferred_seconds
            heappush(self._deferred, (ready_at, sequence.number, sequence))
            if idle:
                self._publish_idle()
        else:
            self._waiting.append(sequence)
            if idle:
                self._begin_step(now)

    def abort(self, request_id: int, now: float) -> bool:
        """Drop a request whose client is gone; False when the engine does not hold it."""
        self._run_until(now)
        sequence = self._live.pop(request_id, None)
        if sequence is None:
            return False
        sequence.aborted = True
        if self._step_ends_at is None:
            self._drop(sequence)
            self._publish_idle()
        else:
            self._aborted.append(sequence)
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
            elif at <= now:
                self._end_step(at)
                self._begin_step(at)
            else:
                return

    # --- a step

    def _begin_step(self, at: float) -> None:
        while self._deferred and self._deferred[0][0] <= at:
            self._waiting.append(heappop(self._deferred)[2])
        if not self._running and not self._waiting:
            self._step_ends_at = None
            self.scheduled_tokens = 0
            return
        hardware = self.hardware
        preempted = self._grow(at)
        self._left_deferred = 0
        budget = hardware.max_num_batched_tokens - len(self._decoding.sequences)
        self._chunks = chunks = []
        for sequence in self._prefilling.values():
            chunk = min(budget, sequence.remaining)
            chunks.append((sequence, chunk))
            budget -= chunk
        # A preempted request would only push out others, or itself again, at this moment.
        if not preempted and self._waiting:
            budget = self._admit(at, budget)
        self._left_waiting = len(self._waiting) - self._left_deferred
        self._step_decodes = bool(self._decoding.sequences)
        self.scheduled_tokens = tokens = hardware.max_num_batched_tokens - budget
        self._step_ends_at = (
            at
            + hardware.overhead_seconds
            + max(hardware.weights_seconds, tokens * hardware.token_seconds)
            + self._decoding.context_tokens * hardware.context_token_seconds
        )

    def _admit(self, at: float, budget: int) -> int:
        """Let waiting requests into the batch; return what is left of the budget.

        One whose adapter cannot be loaded is passed over; the first that lacks KV blocks holds up
        all behind it, so that short prompts do not starve a long one.
        """
        hardware = self.hardware
        passed_over: list[Sequence] = []
        while self._waiting and budget > 0 and len(self._running) < hardware.max_num_seqs:
            sequence = self._waiting[0]
            request = sequence.request
            if not self._adapters.has_place_for(request.adapter):
                passed_over.append(self._waiting.popleft())
                continue
            tokens = request.prompt_tokens + sequence.generated
            holding = self._cache.allocate(tokens, request.block_hashes)
            if holding is None:
                break
            self._waiting.popleft()
            cached_tokens = holding.cached_blocks * hardware.block_size_tokens
            if sequence.queue_seconds < 0:
                sequence.queue_seconds = max(0.0, at - sequence.queued_at)
                sequence.cached_tokens = cached_tokens
                self._prefix_queries += request.prompt_tokens
                self._prefix_hits += cached_tokens
            sequence.holding = holding
            sequence.remaining = tokens - cached_tokens
            sequence.ready_at = (
                self._adapters.acquire(request.adapter, at)
                + hardware.first_token_seconds
                - _SAME_MOMENT_SECONDS
            )
            self._running[request.id] = self._prefilling[request.id] = sequence
            chunk = min(budget, sequence.remaining)
            self._chunks.append((sequence, chunk))
            budget -= chunk
        self._waiting.extendleft(reversed(passed_over))
        self._left_deferred = len(passed_over)
        return budget

    def _end_step(self, at: float) -> None:
        produced = self._end_decodes(at) if self._step_decodes else 0
        computed = 0
        for sequence, chunk in self._chunks:
            sequence.remaining -= chunk
            if sequence.remaining or at < sequence.ready_at:
                continue
            produced += 1
            computed += self._end_prefill(sequence, at)
        if produced:
            self._steps += 1
            self._step_tokens += produced + computed
            self._generation_tokens += produced
        self._publish()
        if self._aborted:
            for sequence in self._aborted:
                self._drop(sequence)
            self._aborted = []

    def _end_decodes(self, at: float) -> int:
        """Give each request that decodes a token; return how many."""
        decoding = self._decoding
        produced = len(decoding.sequences)
        ended = decoding.step()
        if self._show_tokens:
            ids = tuple(i for i, s in decoding.sequences.items() if not s.aborted)
            if ids:
                self._events.append(TokensProduced(at, ids))
        for sequence in ended:
            self._finish(sequence, at)
        return produced

    def _end_prefill(self, sequence: Sequence, at: float) -> int:
        """Sample the token after a prompt; return the prompt tokens that now count as computed."""
        request = sequence.request
        del self._prefilling[request.id]
        self._cache.share(sequence.holding)
        sequence.generated += 1
        computed = 0
        if sequence.generated == 1:
            computed = request.prompt_tokens - sequence.cached_tokens
            self._prompt_tokens += request.prompt_tokens
            self._cached_tokens += sequence.cached_tokens
            if not sequence.aborted:
                self._events.append(FirstToken(at, request.id))
        elif self._show_tokens and not sequence.aborted:
            self._events.append(TokensProduced(at, (request.id,)))
        if sequence.generated >= request.max_tokens:
            self._finish(sequence, at)
        else:
            self._decoding.add(sequence)
        return computed

    def _publish(self) -> None:
        self.published = Gauges(
            len(self._running),
            self._left_waiting,
            self._left_deferred + len(self._deferred),
            self._cache.used / self._cache.total,
            self._steps,
            self._step_tokens,
            self._prompt_tokens,
            self._cached_tokens,
            self._generation_tokens,
            self.preemptions,
            self._prefix_queries,
            self._prefix_hits,
            self._queue_seconds,
            self._finished,
        )

    def _publish_idle(self) -> None:
        """Publish while nothing runs and some are deferred: an engine spins on empty steps then."""
        self._left_waiting = self._left_deferred = 0
        self._publish()

    def _grow(self, at: float) -> bool:
        """Give those that need one in this step a block; return whether one was preempted."""
        growing = self._decoding.growing()
        if not growing:
            return False
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
        self._waiting.appendleft(sequence)
        self.preemptions += 1
        self._events.append(Preempted(at, sequence.request.id))

    def _finish(self, sequence: Sequence, at: float) -> None:
        request = sequence.request
        self._leave(sequence)
        if sequence.aborted:
            return
        del self._live[request.id]
        self._queue_seconds += sequence.queue_seconds
        self._finished += 1
        usage = Usage(request.prompt_tokens, request.max_tokens, sequence.cached_tokens)
        self._events.append(Finished(at, request.id, usage))

    def _drop(self, sequence: Sequence) -> None:
        if self._running.get(sequence.request.id) is sequence:
            self._leave(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        else:
            self._deferred = [entry for entry in self._deferred if entry[2] is not sequence]
            heapify(self._deferred)

    def _leave(self, sequence: Sequence) -> None:
        """Take a request out of the batch."""
        request = sequence.request
        del self._running[request.id]
        if sequence.entered >= 0:
            self._decoding.remove(sequence)
        else:
            self._prefilling.pop(request.id, None)
        self._cache.release(sequence.holding)
        self._adapters.release(request.adapter)
