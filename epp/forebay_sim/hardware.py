"""What an engine runs on and how long its steps take, with figures for known combinations. Pure."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

LEAST_STEP_SECONDS = 1e-5


@dataclass(frozen=True, slots=True)
class Hardware:
    """The settings of an engine and the time of its steps.

    A step lasts `overhead_seconds`, plus the longer of reading the weights and computing its
    tokens, plus reading the KV cache of all that decode: the roofline of an accelerator (Williams
    et al., 2009), on which decoding is bound by memory and prefill by arithmetic.

    Attributes:
        max_num_seqs: requests that run at once, at most.
        max_num_batched_tokens: prompt and answer tokens of one step, at most; not less than
            `max_num_seqs`.
        overhead_seconds: of a step, whatever is in it.
        weights_seconds: to read the weights once.
        token_seconds: to compute one token.
        context_token_seconds: to read the KV cache of one token of context.
        first_token_seconds: from joining the batch to the first token, at least; costs others
            nothing.
        kv_blocks: size of the KV cache; bounds prompt and answer of the longest request.
        block_size_tokens: tokens in a block of it.
        max_loras: LoRA adapters loaded at once.
        lora_load_seconds: to load one.
        startup_seconds: from the start until requests are taken.

    Raises:
        ValueError: a value is out of range; the message names the field.
    """

    max_num_seqs: int = 8
    max_num_batched_tokens: int = 2048
    overhead_seconds: float = 0.002
    weights_seconds: float = 0.008
    token_seconds: float = 0.00002
    context_token_seconds: float = 0.0
    first_token_seconds: float = 0.0
    kv_blocks: int = 8192
    block_size_tokens: int = 16
    max_loras: int = 1
    lora_load_seconds: float = 0.1
    startup_seconds: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0.0 if field.name.endswith("seconds") else 1
            if not least <= value < float("inf"):
                raise ValueError(f"{field.name} must be finite and at least {least:g}, is {value}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens must be at least max_num_seqs ({self.max_num_seqs}),"
                f" is {self.max_num_batched_tokens}"
            )
        # Without it virtual time would stand still.
        if self.overhead_seconds + self.weights_seconds < LEAST_STEP_SECONDS:
            raise ValueError(
                f"overhead_seconds and weights_seconds must make {LEAST_STEP_SECONDS:g} together"
            )


# "plain" has round figures, for demos and tests: 8 requests at once, 50 ms to the first token, then
# 100 tokens/s however many run.
#
# The others follow from public figures, not from measurements of the combination.
# - Memory bandwidth and dense BF16 arithmetic: NVIDIA's data sheets (H100 SXM: 80 GB, 3.35 TB/s,
#   989 TFLOPS; L4: 24 GB, 300 GB/s, 121 TFLOPS). Of these 80 % and 50 % are reached, and 40 % of
#   the arithmetic where 8 GPUs exchange their results.
# - Layers and heads: the model cards of Llama 3.1. 8B has 16 GB of weights and 131 kB of KV cache a
#   token (32 layers, 8 KV heads of 128, BF16), 70B has 140 GB and 328 kB (80 layers). A token takes
#   two operations for each weight.
# - KV cache: what 90 % of memory leaves beside weights and activations.
# - Token budgets: vLLM's defaults for an API server on these GPUs.
PRESETS: dict[str, Hardware] = {
    "plain": Hardware(overhead_seconds=0.0, weights_seconds=0.01, first_token_seconds=0.05),
    "8b-h100": Hardware(
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        overhead_seconds=0.002,
        weights_seconds=16e9 / (0.8 * 3.35e12),
        token_seconds=2 * 8e9 / (0.5 * 989e12),
        context_token_seconds=131e3 / (0.8 * 3.35e12),
        kv_blocks=25_000,
    ),
    "70b-8xh100": Hardware(
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        overhead_seconds=0.005,
        weights_seconds=140e9 / (8 * 0.8 * 3.35e12),
        token_seconds=2 * 70e9 / (8 * 0.4 * 989e12),
        context_token_seconds=328e3 / (8 * 0.8 * 3.35e12),
        kv_blocks=80_000,
    ),
    "8b-l4": Hardware(
        max_num_seqs=256,
        max_num_batched_tokens=2048,
        overhead_seconds=0.002,
        weights_seconds=16e9 / (0.8 * 300e9),
        token_seconds=2 * 8e9 / (0.5 * 121e12),
        context_token_seconds=131e3 / (0.8 * 300e9),
        kv_blocks=1_950,
    ),
}
# As many sequences as vLLM 0.32 runs on such a GPU unless it is told otherwise.
PRESETS["8b-h100-1024"] = replace(PRESETS["8b-h100"], max_num_seqs=1024)
