"""The EPP on both transports against a bare grpc.aio servicer, each behind an Envoy of its own.

The bare servicer does nothing; ours does everything: reading, classifying, queueing, dispatching,
counting. They take turns. CPU is that of the EPP's threads, from /proc. With
`--against` the EPP of another checkout takes turns with them. Idle EPPs scrape so many endpoints,
which another process serves. Needs wrk and nginx (Debian: apt-get install wrk nginx-light). All
traffic is on loopback.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pages import page
from scrapes import PAGE_BYTES, SERVER
from through_envoy import (
    BODY,
    PROMPT_BYTES,
    Lane,
    free_port,
    require,
    snapshot,
    start_streaming,
)

CONCURRENCIES = (1, 8, 32, 128, 256)
BODIES_KB, BODIES_CONCURRENCY = (4, 64, 450), 8
ROUNDS = 3
SSE_STREAMS, SSE_CHUNKS, SSE_INTERVAL_SECONDS = 32, 100, 0.01
IDLE_ENDPOINTS, IDLE_WARM_SECONDS, IDLE_SECONDS = (100, 1000), 8.0, 10.0
UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4}
OURS, BARE, AIO, OTHER = "completion_queue", "bare_aio", "aio", "against"

Figures = dict[str, float]


def start_lane(name: str, folder: Path, against: Path | None, server: int = 0) -> Lane:
    """Start what has this name, in front of nginx or of another server."""
    folder.mkdir(parents=True)
    lane = Lane(folder)
    if server:
        lane.server = server
    else:
        lane.start_nginx()
    if name == BARE:
        lane.start_bare()
    else:
        python = Path(sys.executable)
        if name == OTHER and against is not None:
            python = against / ".venv/bin/python"
        transport = "aio" if name == AIO else "completion-queue"
        lane.start_epp(snapshot(f"127.0.0.1:{lane.server}"), transport, python)
    return lane


def load(lane: Lane, folder: Path, concurrency: int, seconds: int, prompt_bytes: int) -> Figures:
    """Ask for short JSON answers."""
    script = folder / "post.lua"
    script.write_text(
        f"wrk.method = 'POST'\nwrk.body = '{BODY % ('x' * prompt_bytes)}'\n"
        "wrk.headers['Content-Type'] = 'application/json'\n"
    )
    command = ["wrk", "-t1", f"-c{concurrency}", f"-d{seconds}s", "--timeout", "20", "--latency"]
    before = lane.cpu()
    output = subprocess.run(
        [*command, "-s", str(script), lane.url], check=True, capture_output=True, text=True
    ).stdout
    cpu = lane.cpu() - before
    if "Non-2xx" in output or "Socket errors" in output:
        raise SystemExit(f"not everything was answered:\n{output}")
    return {
        "rps": _number(r"Requests/sec:\s+([\d.]+)", output),
        "p50_ms": _milliseconds("50%", output),
        "p99_ms": _milliseconds("99%", output),
        "cpu_ms": cpu * 1e3 / _number(r"(\d+) requests in", output),
    }


def stream(lane: Lane, seconds: int) -> Figures:
    """Ask for long streams; return the EPP's CPU per chunk."""
    before = lane.cpu()
    chunks = asyncio.run(_stream(lane.http, seconds))
    return {"chunk_us": (lane.cpu() - before) * 1e6 / chunks}


async def _stream(port: int, seconds: int) -> int:
    body = BODY % ("x" * PROMPT_BYTES)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n{body}"
    ).encode()
    deadline = time.monotonic() + seconds

    async def client() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        events = 0
        while time.monotonic() < deadline:
            writer.write(head)
            answer = await reader.readuntil(b"0\r\n\r\n")
            events += answer.count(b"data: ")
        writer.close()
        return events

    return sum(await asyncio.gather(*(client() for _ in range(SSE_STREAMS))))


def idle(folder: Path, endpoints: int, against: Path | None) -> float:
    """Return how many cores an EPP takes that scrapes so many endpoints and has no request."""
    folder.mkdir(parents=True)
    port = free_port()
    addresses = [f"127.0.{n // 250 + 1}.{n % 250 + 1}:{port}" for n in range(endpoints)]
    (folder / "page").write_bytes(page(PAGE_BYTES))
    lane = Lane(folder)
    try:
        lane.start(sys.executable, "-c", SERVER, folder / "page", port)
        python = Path(sys.executable) if against is None else against / ".venv/bin/python"
        lane.start_epp(snapshot(*addresses, slots=None), python=python, wait=False)
        time.sleep(IDLE_WARM_SECONDS)
        before = lane.cpu()
        time.sleep(IDLE_SECONDS)
        if lane.epp.poll() is not None:
            raise SystemExit(f"the EPP has ended:\n{(folder / 'log').read_text()[-2000:]}")
        return (lane.cpu() - before) / IDLE_SECONDS
    finally:
        lane.stop()


def _number(pattern: str, text: str) -> float:
    match = re.search(pattern, text)
    if match is None:
        raise SystemExit(f"unexpected output of wrk:\n{text}")
    return float(match.group(1))


def _milliseconds(percentile: str, text: str) -> float:
    match = re.search(rf"{percentile}\s+([\d.]+)(us|ms|s|m)", text)
    if match is None:
        raise SystemExit(f"unexpected output of wrk:\n{text}")
    return float(match.group(1)) * UNITS[match.group(2)]


class Measurement:
    """Figures of several things that take turns.

    `cpu_ms_c32` is ours, `bare_aio.cpu_ms_c32` that of another, and `cpu_ms_c32.by_bare_aio` the
    median of the rounds' ratios.
    """

    def __init__(self) -> None:
        self.figures: Figures = {}

    def add(self, suffix: str, rounds: list[dict[str, Figures]]) -> None:
        """Add the medians of some rounds, and print them."""
        for name in rounds[0]:
            prefix = "" if name == OURS else f"{name}."
            found = []
            for unit in rounds[0][name]:
                value = statistics.median(results[name][unit] for results in rounds)
                self.figures[f"{prefix}{unit}{suffix}"] = value
                found.append(f"{unit} {value:9.3f}")
                if name != OURS:
                    ratio = statistics.median(
                        results[OURS][unit] / results[name][unit] for results in rounds
                    )
                    self.figures[f"{unit}{suffix}.by_{name}"] = ratio
                    found[-1] += f" ({ratio:.2f})"
            print(f"{suffix[1:]:6} {name:17} {'  '.join(found)}", flush=True)


def measure(arguments: argparse.Namespace, folder: Path) -> Figures:
    """Run everything."""
    names = [OURS, BARE, AIO] if arguments.against is None else [OURS, OTHER, BARE]
    found = Measurement()

    def take_turns(lanes: dict[str, Lane], suffix: str, *load_with: int) -> None:
        rounds = []
        for number in range(arguments.rounds):
            order = list(lanes.items())[:: -1 if number % 2 else 1]
            results = {name: load(lane, folder, *load_with) for name, lane in order}
            rounds.append({name: results[name] for name in names})
        found.add(suffix, rounds)

    lanes = {name: start_lane(name, folder / name, arguments.against) for name in names}
    try:
        for lane in lanes.values():
            load(lane, folder, BODIES_CONCURRENCY, 1, PROMPT_BYTES)
        for concurrency in CONCURRENCIES:
            take_turns(lanes, f"_c{concurrency}", concurrency, arguments.seconds, PROMPT_BYTES)
        for size in BODIES_KB:
            bytes_ = size * 1024
            take_turns(lanes, f"_{size}kb", BODIES_CONCURRENCY, arguments.seconds, bytes_)
    finally:
        for lane in lanes.values():
            lane.stop()
    server = free_port()
    backend = start_streaming(server, SSE_CHUNKS, SSE_INTERVAL_SECONDS)
    try:
        lanes = {
            name: start_lane(name, folder / f"{name}-sse", arguments.against, server)
            for name in names
        }
        found.add(
            "",
            [
                {name: stream(lane, arguments.seconds) for name, lane in lanes.items()}
                for _ in range(arguments.rounds)
            ],
        )
    finally:
        for lane in lanes.values():
            lane.stop()
        backend.kill()
    for endpoints in IDLE_ENDPOINTS:
        key = f"idle_cores_{endpoints}"
        found.figures[key] = idle(folder / f"idle-{endpoints}", endpoints, None)
        if arguments.against is not None:
            other = idle(folder / f"idle-{endpoints}-other", endpoints, arguments.against)
            found.figures[f"{OTHER}.{key}"] = other
    return found.figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="hack/bench transport", description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=int, default=4, help="of each single run")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--against", type=Path, help="another checkout, with its .venv")
    arguments = parser.parse_args()
    require("wrk", "nginx")
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(arguments, Path(folder))
    for name, value in figures.items():
        print(f"{name:40}{value:12.3f}")
    if arguments.json:
        rounded = {name: round(value, 4) for name, value in figures.items()}
        arguments.json.write_text(json.dumps({"bench": "transport", "figures": rounded}) + "\n")


if __name__ == "__main__":
    main()
