"""The simulated server's /metrics page, under vLLM's names and labels.

Pure text; what the numbers are is the engine's business.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forebay_sim.engine import Engine

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


class MetricsPage:
    """Renders the page.

    Args:
        engine: whose state is shown.
        model: the label model_name.
        loras: whether LoRA is enabled; only then its series exists.
        old_names: use the KV cache's name of before the end of 2025.
    """

    def __init__(self, engine: Engine, model: str, *, loras: bool, old_names: bool) -> None:
        self._engine = engine
        self._loras = loras
        self._labels = f'engine="0",model_name="{_escape(model)}"'
        self._kv_name = "vllm:gpu_cache_usage_perc" if old_names else "vllm:kv_cache_usage_perc"
        self.first_token = Histogram()
        self.end_to_end = Histogram()
        self.finished = {"stop": 0, "length": 0, "abort": 0}

    def render(self, running: int, waiting: int, kv_usage: float) -> str:
        """Return the page with these loads, which are the engine's unless a test lies."""
        engine, labels, settings = self._engine, self._labels, self._engine.settings
        totals = engine.totals
        gauges = {
            "vllm:num_requests_running": float(running),
            "vllm:num_requests_waiting": float(waiting),
            self._kv_name: kv_usage,
        }
        counters = {
            "vllm:prompt_tokens_total": totals.prompt_tokens,
            "vllm:generation_tokens_total": totals.generation_tokens,
            "vllm:num_preemptions_total": totals.preemptions,
            "vllm:prefix_cache_queries_total": totals.prefix_cache_queries,
            "vllm:prefix_cache_hits_total": totals.prefix_cache_hits,
        }
        lines = []
        for kind, series in (("gauge", gauges), ("counter", counters)):
            for name, value in series.items():
                lines += [f"# TYPE {name} {kind}", f"{name}{{{labels}}} {value}"]
        lines.append("# TYPE vllm:request_success_total counter")
        lines += [
            f'vllm:request_success_total{{{labels},finished_reason="{reason}"}} {count}'
            for reason, count in self.finished.items()
        ]
        lines += [
            "# TYPE vllm:cache_config_info gauge",
            (
                f'vllm:cache_config_info{{engine="0",block_size="{settings.block_size_tokens}",'
                f'num_gpu_blocks="{settings.kv_blocks}"}} 1.0'
            ),
        ]
        if self._loras:
            running_adapters = ",".join(sorted(engine.running_adapters()))
            waiting_adapters = ",".join(sorted(engine.waiting_adapters()))
            lines += [
                "# TYPE vllm:lora_requests_info gauge",
                (
                    f'vllm:lora_requests_info{{max_lora="{settings.max_loras}",'
                    f'running_lora_adapters="{running_adapters}",'
                    f'waiting_lora_adapters="{waiting_adapters}"}} {time.time()}'
                ),
            ]
        lines += self.first_token.lines("vllm:time_to_first_token_seconds", labels)
        lines += self.end_to_end.lines("vllm:e2e_request_latency_seconds", labels)
        return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
