"""`python -m forebay_sim`: one simulated vLLM server."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from dataclasses import replace

from forebay_sim.hardware import PRESETS, Hardware
from forebay_sim.metricspage import ENGINES
from forebay_sim.server import GRAMMAR_SECONDS_PER_KILOBYTE, ServerSettings, serve


def _names(values: list[str]) -> tuple[str, ...]:
    return tuple(name for value in values for name in value.split(",") if name)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="forebay_sim", description="A simulated vLLM server.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000, help="0 picks one")
    add("--model", action="append", default=[], help="name served; all names by default")
    add("--lora", action="append", default=[], help="LoRA adapter that can be loaded")
    add("--metrics", choices=ENGINES, default="vllm", help="whose metrics page it has")
    add("--max-waiting", type=int, default=100_000, help="requests waiting inside; beyond: 429")
    add(
        "--grammar-ms-per-kilobyte",
        type=float,
        default=GRAMMAR_SECONDS_PER_KILOBYTE * 1e3,
        help="how long a request with a JSON schema is deferred",
    )
    add("--preset", choices=PRESETS, default="plain", help="what the options below change")
    add("--max-num-seqs", type=int)
    add("--max-num-batched-tokens", type=int, help="tokens of a step")
    add("--time-to-first-token-ms", type=float, help="at least, once in the batch")
    add("--prefill-time-per-token-ms", type=float)
    add("--inter-token-latency-ms", type=float, help="a step that prefills nothing")
    add("--context-token-ms", type=float, help="added to a step per token of context that it reads")
    add("--kv-blocks", type=int)
    add("--block-size", type=int)
    add("--max-loras", type=int)
    add("--startup-seconds", type=float, help="until it answers, also after a restart")
    return parser.parse_args()


def _hardware(given: argparse.Namespace) -> Hardware:
    milliseconds = {
        "first_token_seconds": given.time_to_first_token_ms,
        "token_seconds": given.prefill_time_per_token_ms,
        "weights_seconds": given.inter_token_latency_ms,
        "context_token_seconds": given.context_token_ms,
    }
    changes = {
        "max_num_seqs": given.max_num_seqs,
        "max_num_batched_tokens": given.max_num_batched_tokens,
        "overhead_seconds": None if given.inter_token_latency_ms is None else 0.0,
        "kv_blocks": given.kv_blocks,
        "block_size_tokens": given.block_size,
        "max_loras": given.max_loras,
        "startup_seconds": given.startup_seconds,
        **{name: None if value is None else value / 1e3 for name, value in milliseconds.items()},
    }
    given_changes = {name: value for name, value in changes.items() if value is not None}
    return replace(PRESETS[given.preset], **given_changes)


async def _run(settings: ServerSettings, host: str, port: int) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    runner, bound = await serve(settings, host, port)
    sys.stdout.write(f"listening on {host}:{bound}\n")
    sys.stdout.flush()
    await stopping.wait()
    await runner.cleanup()


def main() -> int:
    """Serve until SIGTERM or SIGINT."""
    given = _arguments()
    try:
        settings = ServerSettings(
            _names(given.model) or ("*",),
            _names(given.lora),
            _hardware(given),
            given.metrics,
            given.max_waiting,
            given.grammar_ms_per_kilobyte / 1e3,
        )
        asyncio.run(_run(settings, given.host, given.port))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"forebay_sim: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
