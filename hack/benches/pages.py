"""Reading a model server's page of metrics, against prometheus_client's parser.

A page as vLLM's, 300 kB, which an EPP reads several times a second from every server. CPU time of
this process, the median of several rounds of each, taken in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from forebay_epp.codec.metricstext import parse_page

PAGE_BYTES = 300_000
ROUNDS, READS = 7, 50
LABELS = 'engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"'


def page(size_bytes: int = PAGE_BYTES) -> bytes:
    """Return a page with the gauges that matter among histograms that do not."""
    lines = [
        f"vllm:{name}{{{LABELS}}} {value}"
        for name, value in (
            ("num_requests_running", 3.0),
            ("num_requests_waiting", 1.0),
            ("kv_cache_usage_perc", 0.25),
        )
    ]
    number = 0
    while sum(map(len, lines)) + len(lines) < size_bytes:
        for _ in range(100):
            family, bound = f"vllm:request_time_{number // 60}_seconds", number % 60 * 0.05
            lines.append(f'{family}_bucket{{le="{bound:.2f}",{LABELS}}} {number * 7}.0')
            number += 1
    return ("\n".join(lines) + "\n").encode()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    data = page()
    ours, theirs = [], []
    for _ in range(ROUNDS):
        started = time.process_time()
        for _ in range(READS):
            parse_page(data)
        ours.append((time.process_time() - started) / READS * 1e6)
        started = time.process_time()
        list(text_string_to_metric_families(data.decode()))
        theirs.append((time.process_time() - started) * 1e6)
    figures = {
        "parse_page_us": round(statistics.median(ours), 1),
        "prometheus_client_us": round(statistics.median(theirs), 1),
        "ratio": round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 5),
    }
    for name, value in figures.items():
        print(f"{name:24}{value:12.5g}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"bench": "pages", "figures": figures}) + "\n")


if __name__ == "__main__":
    main()
