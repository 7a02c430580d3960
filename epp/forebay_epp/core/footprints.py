"""Predicts how many tokens a request brings, from what earlier ones of its flow came to.

Which endpoint has room for them does not belong here (tracked.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay_epp.core.terms import PREFIX_BLOCK_BYTES

if TYPE_CHECKING:
    from forebay_epp.core.terms import Request, Usage

SMOOTHING = 0.05
ASSUMED_BYTES_PER_TOKEN = 4.0
ASSUMED_ANSWER_TOKENS = 256.0
ANSWER_PART = 0.75  # of a batch at all stages half of the answers are there; more is for its spread
ASSUMPTION_SAMPLES = 4  # so many answers weigh as much as the assumption


class _Flow:
    """What is known of a flow.

    Attributes:
        samples: answers so far, and those that the assumptions weigh.
        bytes_per_token: of prompts.
        answer_tokens: of an answer, beginning with an assumption.
        seen_tokens: of the answers that there were.
    """

    __slots__ = ("answer_tokens", "bytes_per_token", "samples", "seen_tokens")

    def __init__(self) -> None:
        self.samples = ASSUMPTION_SAMPLES
        self.bytes_per_token = ASSUMED_BYTES_PER_TOKEN
        self.answer_tokens = ASSUMED_ANSWER_TOKENS
        self.seen_tokens = 0.0

    def learn(self, size_bytes: int, usage: Usage) -> None:
        """Take one more answer into the means."""
        self.samples += 1
        part = max(SMOOTHING, 1.0 / self.samples)
        bytes_per_token = size_bytes / usage.prompt_tokens
        self.bytes_per_token += part * (bytes_per_token - self.bytes_per_token)
        self.answer_tokens += part * (usage.completion_tokens - self.answer_tokens)
        part = max(SMOOTHING, 1.0 / (self.samples - ASSUMPTION_SAMPLES))
        self.seen_tokens += part * (usage.completion_tokens - self.seen_tokens)


class Footprints:
    """Learns, for each flow, bytes per prompt token and tokens per answer.

    A flow without answers is taken for text, four bytes a token. Means are enough, because what
    counts is the sum over a batch. There are as many flows as the plan names.

    Room must not run out, so before anything is known an answer is taken for long. What a flow is
    charged must be even, so there an answer is taken for what answers were: those of the flow, or
    without any of all flows, or without any for none.
    """

    def __init__(self) -> None:
        self._flows: dict[str, _Flow] = {}
        self._all = _Flow()
        self._unknown = _Flow()

    def learn(self, request: Request, usage: Usage) -> None:
        """Take note of what a request has come to; one without a body or tokens says nothing."""
        if request.size_bytes <= 0 or usage.prompt_tokens <= 0 or usage.completion_tokens <= 0:
            return
        flow = self._flows.get(request.flow)
        if flow is None:
            flow = self._flows[request.flow] = _Flow()
        flow.learn(request.size_bytes, usage)
        self._all.learn(request.size_bytes, usage)
        self._unknown.seen_tokens = self._all.seen_tokens

    def expect(self, request: Request) -> None:
        """Write on a request the tokens to expect of it.

        Those of KV cache are on average over its time in a batch.
        """
        flow = self._flows.get(request.flow) or self._unknown
        prompt_tokens = request.size_bytes / flow.bytes_per_token
        request.prompt_tokens = max(1, int(prompt_tokens))  # so that no dispatch is free
        if request.prefix:
            request.block_tokens = PREFIX_BLOCK_BYTES / flow.bytes_per_token
        request.answer_tokens = int(flow.seen_tokens)
        request.kv_tokens = int(prompt_tokens + ANSWER_PART * flow.answer_tokens)
