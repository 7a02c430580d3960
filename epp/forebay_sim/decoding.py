"""The requests of a simulated engine that decode, and what their next steps bring. Pure.

All get a token in each step, so their tokens are one number, the step's, and a step costs only what
ends or needs a KV block in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from forebay_sim.kvcache import Holding

if TYPE_CHECKING:
    from forebay_sim.terms import EngineRequest


@dataclass(slots=True, eq=False)
class Sequence:
    """A request in an engine.

    Attributes:
        request: the request.
        number: in the order of arrival.
        queued_at: when the scheduler got it.
        queue_seconds: that it waited for its first step; below 0 until then.
        ready_at: its first token comes no sooner.
        remaining: tokens of the prompt, or of what is computed again, not yet prefilled.
        generated: tokens of the answer, when it entered the decode steps.
        cached_tokens: of the prompt, from the prefix cache.
        entered: the decode step after which it had `generated` tokens; -1: it does not decode.
        residue: of the numbers of the decode steps that need another block.
        aborted: whether its client is gone.
        holding: its KV blocks.
    """

    request: EngineRequest
    number: int
    queued_at: float
    queue_seconds: float = -1.0
    ready_at: float = 0.0
    remaining: int = 0
    generated: int = 0
    cached_tokens: int = 0
    entered: int = -1
    residue: int = 0
    aborted: bool = False
    holding: Holding = field(default_factory=lambda: Holding((), 0, 0))


class DecodeSet:
    """Those that decode.

    Attributes:
        sequences: by the id of their request.
        context_tokens: of all of them, in the KV cache.
    """

    def __init__(self, block_size_tokens: int) -> None:
        self.sequences: dict[int, Sequence] = {}
        self.context_tokens = 0
        self._block_size_tokens = block_size_tokens
        self._step = 0  # decode steps so far
        self._ends: list[tuple[int, int, Sequence, int]] = []  # a heap, by the last decode step
        self._growing: list[dict[int, Sequence]] = [{} for _ in range(block_size_tokens)]

    def add(self, sequence: Sequence) -> None:
        """Let a sequence decode that has at least one token and misses at least one."""
        request = sequence.request
        step = sequence.entered = self._step
        self.sequences[request.id] = sequence
        stored = request.prompt_tokens + sequence.generated - 1
        self.context_tokens += stored
        left = request.max_tokens - sequence.generated
        heappush(self._ends, (step + left, sequence.number, sequence, step))
        room = sequence.holding.blocks * self._block_size_tokens - stored
        sequence.residue = (step + room + 1) % self._block_size_tokens
        self._growing[sequence.residue][request.id] = sequence

    def remove(self, sequence: Sequence) -> None:
        """Take one out, and note what it has generated."""
        request = sequence.request
        sequence.generated += self._step - sequence.entered
        self.context_tokens -= request.prompt_tokens + sequence.generated - 1
        sequence.entered = -1
        del self.sequences[request.id]
        del self._growing[sequence.residue][request.id]

    def growing(self) -> dict[int, Sequence]:
        """Return those that need another block for the next step; it follows removals."""
        return self._growing[(self._step + 1) % self._block_size_tokens]

    def step(self) -> list[Sequence]:
        """Give each a token; return those that have their last one now."""
        self._step += 1
        self.context_tokens += len(self.sequences)
        ended = []
        while self._ends and self._ends[0][0] <= self._step:
            _, _, sequence, entered = heappop(self._ends)
            if sequence.entered == entered:  # else it was removed since
                ended.append(sequence)
        return ended
