"""What an engine runs on and how long its steps take, with figures for known combinations. Pure."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Hardware:
    """The settings of an engine and the time of its steps.

    A step lasts `overhead_seconds`, plus the longer of reading the weights and computing its
    tokens, plus reading the KV cache of all that decode: the roofline of an accelerator (Williams
    et al., 2009), on which decoding is bound by memory and prefill by arithmetic.

    Attributes:
        max_num_seqs: requests that run at once, at most.
        max_num_batched_tokens: prompt and answer tokens of one step, at most.
        overhead_seconds: of a step, whatever is in it.
        weights_seconds: to read the weights once.
        token_seconds: to compute one token.
        context_token_seconds: to read the KV cache of one token of context.
        kv_blocks: size of the KV cache.
        block_size_tokens: tokens in a block of it.

    Raises:
        ValueError: a value is out of range; the message names the field.
    """

    max_num_seqs: int = 8
    max_num_batched_tokens: int = 2048
    overhead_seconds: float = 0.002
    weights_seconds: float = 0.008
    token_seconds: float = 0.00002
    context_token_seconds: float = 0.0
    kv_blocks: int = 8192
    block_size_tokens: int = 16

    def __post_init__(self) -> None:
        """Check the ranges."""
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0.0 if field.name.endswith("seconds") else 1
            if not least <= value < float("inf"):
                raise ValueError(f"{field.name} must be finite and at least {least:g}, is {value}")
        if self.overhead_seconds + self.weights_seconds <= 0:
            raise ValueError("overhead_seconds or weights_seconds must be above 0: steps take time")


# Memory bandwidth and dense BF16 arithmetic from NVIDIA's data sheets (H100 SXM: 3.35 TB/s, 989
# TFLOPS; L4: 300 GB/s, 121 TFLOPS), at 80 % and 50 % of them, and 40 % where 8 GPUs work together.
# Layers and heads from the model cards of Llama 3.1: 8B has 16 GB of weights and 131 kB of KV cache
# a token (32 layers, 8 KV heads of 128, BF16), 70B has 140 GB and 328 kB (80 layers). A token takes
# two operations for each weight. The KV cache has what 90 % of memory leaves beside the weights and
# activations. Token budgets are vLLM's defaults for these GPUs.
PRESETS: dict[str, Hardware] = {
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
