"""`python -m forebay_sim`: one simulated vLLM server."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys

from forebay_sim.engine import EngineSettings
from forebay_sim.metricspage import ENGINES
from forebay_sim.server import ServerSettings, serve


def _names(values: list[str]) -> tuple[str, ...]:
    return tuple(name for value in values for name in value.split(",") if name)


def _arguments() -> argparse.Namespace:
    defaults = EngineSettings()
    parser = argparse.ArgumentParser(
        prog="forebay_sim", description="A simulated vLLM server.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000, help="0 picks one")
    add("--model", action="append", default=[], help="name served; all names by default")
    add("--lora", action="append", default=[], help="LoRA adapter that can be loaded")
    add("--max-num-seqs", type=int, default=defaults.max_num_seqs)
    add("--time-to-first-token-ms", type=float, default=defaults.prefill_overhead_seconds * 1e3)
    add("--prefill-time-per-token-ms", type=float, default=defaults.prefill_seconds_per_token * 1e3)
    add("--inter-token-latency-ms", type=float, default=defaults.decode_seconds_per_token * 1e3)
    add("--time-factor-under-load", type=float, default=defaults.full_batch_slowdown)
    add("--kv-blocks", type=int, default=defaults.kv_blocks)
    add("--block-size", type=int, default=defaults.block_size_tokens)
    add("--max-waiting", type=int, default=100_000, help="requests waiting inside; beyond: 429")
    add("--max-loras", type=int, default=defaults.max_loras)
    add("--metrics", choices=ENGINES, default="vllm", help="whose metrics page it has")
    return parser.parse_args()


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
        engine = EngineSettings(
            max_num_seqs=given.max_num_seqs,
            prefill_overhead_seconds=given.time_to_first_token_ms / 1e3,
            prefill_seconds_per_token=given.prefill_time_per_token_ms / 1e3,
            decode_seconds_per_token=given.inter_token_latency_ms / 1e3,
            full_batch_slowdown=given.time_factor_under_load,
            kv_blocks=given.kv_blocks,
            block_size_tokens=given.block_size,
            max_waiting=given.max_waiting,
            max_loras=given.max_loras,
        )
        settings = ServerSettings(
            _names(given.model) or ("*",), _names(given.lora), engine, given.metrics
        )
        asyncio.run(_run(settings, given.host, given.port))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"forebay_sim: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
