"""What the vllm bench measures with: a server, its clients, EPP and Envoy in front, and a fit.

Not a bench: `hack/bench vllm` is.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import TYPE_CHECKING, Any

import aiohttp
from data_plane import PlanFileEpp, snapshot
from envoy_process import Envoy
from ext_proc_peer import until
from ports import free_port

from forebay_cli import envoy
from forebay_cli.child import dying_with_us
from forebay_replay.load import Arrival
from forebay_sim.hardware import Hardware
from forebay_sim.report import percentile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

HOME = Path(os.environ.get("FOREBAY_VLLM", Path.home() / ".cache/forebay/vllm"))
CHAT, BATCH = "critical", "sheddable"
READY_SECONDS = 400.0
START_SECONDS = 60.0
ANSWER_SECONDS = 120.0
KV_BLOCK_TOKENS = 128
KV_BLOCKS = 160
LONG_PROMPT_TOKENS = 1_500


class Server:
    """A server in a process group of its own, on a port that it keeps."""

    def __init__(self, command: list[str], port: int, log: Path) -> None:
        self.address = f"127.0.0.1:{port}"
        self.url = f"http://{self.address}"
        self._command = command
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def vllm(cls, folder: Path, slots: int) -> Server:
        """A vLLM with a batch of so many and a small KV cache."""
        port = free_port()
        command = [
            *(str(HOME / "venv/bin/vllm"), "serve", str(HOME / "model")),
            *("--load-format", "dummy", "--enforce-eager", "--max-model-len", "4096"),
            *("--max-num-seqs", str(slots), "--max-num-batched-tokens", "2048"),
            *("--block-size", str(KV_BLOCK_TOKENS), "--num-gpu-blocks-override", str(KV_BLOCKS)),
            *("--served-model-name", CHAT, BATCH, "--port", str(port), "--host", "127.0.0.1"),
        ]
        return cls(command, port, folder / f"vllm-{slots}.log")

    @classmethod
    def simulated(cls, folder: Path, hardware: Hardware) -> Server:
        """The simulator on the same hardware."""
        port = free_port()
        milliseconds = {
            "prefill-time-per-token-ms": hardware.token_seconds,
            "inter-token-latency-ms": hardware.overhead_seconds + hardware.weights_seconds,
            "context-token-ms": hardware.context_token_seconds,
            "time-to-first-token-ms": hardware.first_token_seconds,
        }
        command = [
            *(sys.executable, "-P", "-m", "forebay_sim", f"--port={port}"),
            *(f"--max-num-seqs={hardware.max_num_seqs}", f"--kv-blocks={hardware.kv_blocks}"),
            f"--max-num-batched-tokens={hardware.max_num_batched_tokens}",
            f"--block-size={hardware.block_size_tokens}",
            *(f"--{name}={1000 * seconds:.6f}" for name, seconds in milliseconds.items()),
        ]
        return cls(command, port, folder / "simulator.log")

    def start(self) -> None:
        """Start it; `ready` waits for it."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        if "forebay_sim" in self._command:
            environment = dict(os.environ)
        environment |= {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "OMP_NUM_THREADS": "1",
        }
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                dying_with_us(*self._command),
                stdout=log,
                stderr=log,
                env=environment,
                cwd=self._log.parent,
                start_new_session=True,
            )

    async def ready(self) -> None:
        """Wait until it answers.

        Raises:
            SystemExit: it has ended or takes too long.
        """
        deadline = time.monotonic() + READY_SECONDS
        async with aiohttp.ClientSession() as session:
            while time.monotonic() < deadline:
                if self._process is None or self._process.poll() is not None:
                    break
                with suppress(aiohttp.ClientError, TimeoutError):
                    async with session.get(f"{self.url}/health") as answer:
                        if answer.status == 200:
                            return
                await asyncio.sleep(0.5)
        raise SystemExit(f"{self._command[0]} did not start:\n{self._log.read_text()[-2000:]}")

    def kill(self) -> None:
        """End it and its children at once."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    async def counters(self) -> dict[str, float]:
        """Sums of its metrics by name, without labels; empty while it is away."""
        found: dict[str, float] = {}
        text = ""
        with suppress(aiohttp.ClientError):
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"{self.url}/metrics") as page,
            ):
                text = await page.text()
        for line in text.splitlines():
            if line.startswith("vllm:"):
                name = re.split(r"[{ ]", line, maxsplit=1)[0].removeprefix("vllm:")
                found[name] = found.get(name, 0.0) + float(line.rpartition(" ")[2])
        return found


@dataclass(slots=True)
class Seen:
    """What a client saw of one request; times are seconds after the start of its load."""

    arrival: Arrival
    status: int = 0
    first_at: float = 0.0
    ended_at: float = 0.0


@dataclass(slots=True)
class Run:
    """A load that has been answered.

    Attributes:
        seen: its requests.
        waited: mean seconds that a request waited inside the server.
        preemptions: by the server.
        steps: of the server.
    """

    seen: list[Seen]
    waited: float = 0.0
    preemptions: float = 0.0
    steps: float = 0.0

    def figures(self) -> dict[str, float]:
        """Sum it up."""
        good = [s for s in self.seen if s.status == 200]
        ttft = [1e3 * (s.first_at - s.arrival.at) for s in good if s.arrival.model == CHAT]
        return {
            "wall_seconds": max((s.ended_at for s in good), default=0.0),
            "critical_ttft_p50_ms": percentile(ttft, 50) or 0.0,
            "critical_ttft_p99_ms": percentile(ttft, 99) or 0.0,
            "mean_wait_inside_ms": 1e3 * self.waited,
            "preemptions": self.preemptions,
            "failed": float(len(self.seen) - len(good)),
        }


class Clients:
    """Send requests, each with a prompt of its own."""

    def __init__(self, session: aiohttp.ClientSession, seed: int) -> None:
        self._session = session
        self._random = Random(seed)  # prompts, not secrets

    async def ask(self, url: str, arrival: Arrival, **more: Any) -> Seen:
        """Send one request now; times in the result are monotonic."""
        tokens = [self._random.randrange(10, 500) for _ in range(arrival.prompt_tokens)]
        body = {
            "model": arrival.model,
            "prompt": tokens,
            "max_tokens": arrival.answer_tokens,
            "min_tokens": arrival.answer_tokens,
            "ignore_eos": True,
            "stream": True,
        } | more
        seen = Seen(arrival)
        try:
            async with self._session.post(f"{url}/v1/completions", json=body) as answer:
                seen.status = answer.status
                async for _ in answer.content.iter_any():
                    seen.first_at = seen.first_at or time.monotonic()
        except (aiohttp.ClientError, TimeoutError):
            seen.status = 0
        seen.ended_at = time.monotonic()
        return seen

    async def load(self, url: str, arrivals: Sequence[Arrival], server: Server) -> Run:
        """Send a load at its times."""
        before = await server.counters()
        start = time.monotonic()

        async def one(arrival: Arrival) -> Seen:
            await asyncio.sleep(start + arrival.at - time.monotonic())
            return await self.ask(url, arrival)

        seen = await asyncio.gather(*(one(arrival) for arrival in arrivals))
        for each in seen:
            each.first_at -= start
            each.ended_at -= start
        after = await server.counters()

        def grown(name: str) -> float:
            return max(0.0, after.get(name, 0.0) - before.get(name, 0.0))

        waited = grown("request_queue_time_seconds_sum")
        count = grown("request_queue_time_seconds_count")
        steps = grown("iteration_tokens_total_count")
        return Run(seen, waited / max(1.0, count), grown("num_preemptions_total"), steps)


@contextmanager
def fronts(folder: Path, server: Server, slots: int) -> Iterator[dict[str, tuple[str, Any]]]:
    """By policy, where its clients send requests, and its EPP."""
    found: dict[str, tuple[str, Any]] = {}
    running: list[Any] = []
    try:
        plain = Envoy(folder, 1, _without_epp(server.address))
        running.append(plain)
        found["direct"] = (f"http://127.0.0.1:{plain.http}", None)
        for policy, fixed in (("manual", slots), ("adaptive", 0)):
            own = folder / f"{policy}-{slots}"
            own.mkdir()
            epp = PlanFileEpp(own, snapshot([server.address], slots=fixed, ttl_seconds=300))
            running.append(epp)
            until(lambda epp=epp: epp.page("/debug/queues") is not None, START_SECONDS)
            front = Envoy(own, epp.grpc)
            running.append(front)
            found[policy] = (f"http://127.0.0.1:{front.http}", epp)
        yield found
    finally:
        for process in reversed(running):
            process.stop()


def _without_epp(address: str) -> Callable[[dict[str, Any]], None]:
    """Return what makes a bootstrap that of an Envoy which sends everything to one server."""

    def edit(bootstrap: dict[str, Any]) -> None:
        plain = envoy.direct(envoy.Ports(1, 1, 1), (address,))["static_resources"]
        listener = bootstrap["static_resources"]["listeners"][0]
        plain["listeners"][0]["address"] = listener["address"]
        bootstrap["static_resources"] = plain

    return edit


async def prompt_token_seconds(clients: Clients, server: Server) -> float:
    """Measure what a token of a prompt costs."""

    async def answered(tokens: int) -> float:
        before = time.monotonic()
        await clients.ask(server.url, Arrival(0.0, BATCH, tokens, 1))
        return time.monotonic() - before

    await answered(LONG_PROMPT_TOKENS)
    long = median([await answered(LONG_PROMPT_TOKENS) for _ in range(5)])
    short = median([await answered(16) for _ in range(5)])
    return max(0.0, long - short) / (LONG_PROMPT_TOKENS - 16)


def fit(run: Run, slots: int, token_seconds: float) -> Hardware:
    """Find what a step costs from a load that was sent directly, by the server's own count."""
    prompt_tokens = sum(seen.arrival.prompt_tokens for seen in run.seen)
    busy_seconds = max(seen.ended_at for seen in run.seen) - prompt_tokens * token_seconds
    return Hardware(
        max_num_seqs=slots,
        max_num_batched_tokens=2048,
        overhead_seconds=max(0.001, busy_seconds / max(1.0, run.steps)),
        weights_seconds=0.0,
        token_seconds=token_seconds,
        kv_blocks=KV_BLOCKS,
        block_size_tokens=KV_BLOCK_TOKENS,
    )
