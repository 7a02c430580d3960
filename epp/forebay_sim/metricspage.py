"""The simulated server's metrics page: vLLM's, or the load as other model servers publish it.

Pure text. Where the numbers come from (stepping.py) does not belong here.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forebay_sim.stepping import StepEngine

# Where an engine publishes.
# "vllm-2025" is vLLM before the end of 2025, "other" a server that only a policy can describe.
ENGINES = {
    "vllm": "/metrics",
    "vllm-2025": "/metrics",
    "sglang": "/metrics",
    "trtllm": "/prometheus/metrics",
    "triton": "/metrics",
    "tgi": "/metrics",
    "other": "/stats",
}
# Its gauges of running, waiting, KV usage, KV blocks and tokens in each block. SGLang says the last
# two in labels of one gauge.
_GAUGES = {
    "sglang": (
        'sglang:num_running_reqs{{{labels},engine_type="unified",pp_rank="0",tp_rank="0"}}',
        'sglang:num_queue_reqs{{{labels},engine_type="unified",pp_rank="0",tp_rank="0"}}',
        'sglang:token_usage{{{labels},engine_type="unified",pp_rank="0",tp_rank="0"}}',
        'sglang:cache_config_info{{num_pages="{blocks}",page_size="{block_tokens}"}}',
    ),
    "trtllm": (
        "trtllm_num_requests_running{{{labels}}}",
        "trtllm_num_requests_waiting{{{labels}}}",
        "trtllm_kv_cache_utilization{{{labels}}}",
        "trtllm_kv_cache_max_blocks{{{labels}}}",
        "trtllm_kv_cache_tokens_per_block{{{labels}}}",
    ),
    "triton": (
        'nv_trt_llm_request_metrics{{model="tensorrt_llm",request_type="scheduled",version="1"}}',
        'nv_trt_llm_request_metrics{{model="tensorrt_llm",request_type="waiting",version="1"}}',
        'nv_trt_llm_kv_cache_block_metrics{{kv_cache_block_type="fraction",model="tensorrt_llm",version="1"}}',
        'nv_trt_llm_kv_cache_block_metrics{{kv_cache_block_type="max",model="tensorrt_llm",version="1"}}',
        'nv_trt_llm_kv_cache_block_metrics{{kv_cache_block_type="tokens_per",model="tensorrt_llm",version="1"}}',
    ),
    "tgi": ("tgi_batch_current_size", "tgi_queue_size"),
    "other": ('requests{{state="running"}}', 'requests{{state="waiting"}}', "cache_usage"),
}

SECONDS_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Histogram:
    """Counts of seconds by upper bound."""

    def __init__(self) -> None:
        self._counts = [0] * (len(SECONDS_BUCKETS) + 1)
        self._total = 0.0

    def add(self, seconds: float) -> None:
        """Count a value."""
        self._counts[bisect_left(SECONDS_BUCKETS, seconds)] += 1
        self._total += seconds

    def lines(self, name: str, labels: str) -> list[str]:
        """Return the series' lines."""
        bounds = [*map(str, SECONDS_BUCKETS), "+Inf"]
        sums = list(accumulate(self._counts))
        return [
            f"# TYPE {name} histogram",
            *(
                f'{name}_bucket{{{labels},le="{bound}"}} {count}'
                for bound, count in zip(bounds, sums, strict=True)
            ),
            f"{name}_sum{{{labels}}} {self._total}",
            f"{name}_count{{{labels}}} {sums[-1]}",
        ]


@dataclass(frozen=True, slots=True)
class Load:
    """What a page says of a server's load.

    Attributes:
        running: requests in the batch.
        waiting: requests that wait to join it.
        kv: fraction 0-1 of the KV cache in use.
        deferred: requests that wait for something else, such as their grammar.
    """

    running: int = 0
    waiting: int = 0
    kv: float = 0.0
    deferred: int = 0


class MetricsPage:
    """Renders the page.

    Args:
        engine: whose state is shown.
        model: the label model_name.
        loras: whether LoRA is enabled; only then its series exists.
        kind: one of `ENGINES`.
    """

    def __init__(self, engine: StepEngine, model: str, *, loras: bool, kind: str = "vllm") -> None:
        self._engine = engine
        self._loras = loras
        self._labels = f'engine="0",model_name="{_escape(model)}"'
        self._kind = kind
        self.first_token = Histogram()
        self.end_to_end = Histogram()
        self.finished = {"stop": 0, "length": 0, "abort": 0}

    def render(self, load: Load) -> str:
        """Return the page with this load, which is the engine's unless a test lies."""
        if self._kind.startswith("vllm"):
            return self._vllm(load)
        lines = []
        hardware = self._engine.hardware
        blocks, block_tokens = hardware.kv_blocks, hardware.block_size_tokens
        values = (load.running, load.waiting + load.deferred, load.kv, blocks, block_tokens)
        for gauge, value in zip(_GAUGES[self._kind], values, strict=False):
            series = gauge.format(labels=self._labels, blocks=blocks, block_tokens=block_tokens)
            lines += [f"# TYPE {series.partition('{')[0]} gauge", f"{series} {float(value)}"]
        return "\n".join(lines) + "\n"

    def _vllm(self, load: Load) -> str:
        labels, said = self._labels, self._engine.published
        old = self._kind == "vllm-2025"
        gauges = {
            "vllm:num_requests_running": float(load.running),
            "vllm:num_requests_waiting": float(load.waiting + load.deferred),
            "vllm:gpu_cache_usage_perc" if old else "vllm:kv_cache_usage_perc": load.kv,
        }
        counters = {
            "vllm:prompt_tokens_total": said.prompt_tokens,
            "vllm:prompt_tokens_cached_total": said.cached_tokens,
            "vllm:generation_tokens_total": said.generation_tokens,
            "vllm:num_preemptions_total": said.preemptions,
            "vllm:prefix_cache_queries_total": said.prefix_queries,
            "vllm:prefix_cache_hits_total": said.prefix_hits,
        }
        histograms = {
            "vllm:iteration_tokens_total": (said.step_tokens, said.steps),
            "vllm:request_queue_time_seconds": (said.queue_seconds, said.finished),
        }
        lines = []
        for kind, series in (("gauge", gauges), ("counter", counters)):
            for name, value in series.items():
                lines += [f"# TYPE {name} {kind}", f"{name}{{{labels}}} {value}"]
        for name, (total, count) in histograms.items():  # without their buckets
            lines += [
                f"# TYPE {name} histogram",
                f"{name}_count{{{labels}}} {float(count)}",
                f"{name}_sum{{{labels}}} {float(total)}",
            ]
        if not old:
            name = "vllm:num_requests_waiting_by_reason"
            lines += [
                f"# TYPE {name} gauge",
                f'{name}{{{labels},reason="capacity"}} {float(load.waiting)}',
                f'{name}{{{labels},reason="deferred"}} {float(load.deferred)}',
            ]
        lines.append("# TYPE vllm:request_success_total counter")
        lines += [
            f'vllm:request_success_total{{{labels},finished_reason="{reason}"}} {count}'
            for reason, count in self.finished.items()
        ]
        lines += self._config()
        lines += self.first_token.lines("vllm:time_to_first_token_seconds", labels)
        lines += self.end_to_end.lines("vllm:e2e_request_latency_seconds", labels)
        return "\n".join(lines) + "\n"

    def _config(self) -> list[str]:
        """Return the series that have what they say in their labels."""
        engine, hardware = self._engine, self._engine.hardware
        lines = [
            "# TYPE vllm:cache_config_info gauge",
            (
                f'vllm:cache_config_info{{engine="0",block_size="{hardware.block_size_tokens}",'
                f'num_gpu_blocks="{hardware.kv_blocks}"}} 1.0'
            ),
        ]
        if self._loras:
            running_adapters = ",".join(sorted(engine.running_adapters()))
            waiting_adapters = ",".join(sorted(engine.waiting_adapters()))
            lines += [
                "# TYPE vllm:lora_requests_info gauge",
                (
                    f'vllm:lora_requests_info{{max_lora="{hardware.max_loras}",'
                    f'running_lora_adapters="{running_adapters}",'
                    f'waiting_lora_adapters="{waiting_adapters}"}} {time.time()}'
                ),
            ]
        return lines


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
