"""What an answer costs the EPP by its length, and whether it outlives the EPP: three ways.

`read`: the answer passes through the EPP. `observe`: a second filter shows its end. `none`: the
proxy shows headers and trailers only. Each has an Envoy and an EPP, and all take turns with the
same streams. CPU is that of the EPP's threads, from /proc, less that of as many idle seconds,
measured right before and after. All traffic is on loopback. `hack/bench answers --only kills` and
the like measure a part.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from through_envoy import BODY, PROMPT_BYTES, Lane, free_port, snapshot, start_streaming

from forebay_cli import envoy

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

LENGTHS = (50, 500, 2000)
BATCHES = {50: 40, 500: 8, 2000: 4}  # so that each takes some seconds
MODES: dict[str, dict[str, Any]] = {
    "read": {},
    "observe": {"responses": envoy.OBSERVE},
    "none": {"response_body_mode": "NONE"},
}
ROUNDS = 3
STREAMS, TOKEN_SECONDS = 40, 0.002
IDLE_SECONDS = 5.0
KILLS = 20
SLOTS_FREED, SLOT_CLIENTS = 400, 8
PACES = (50, 100, 200, 400, 800)  # streams at once, each of 50 tokens/s
PACE_SECONDS, PACE_TOKENS = 0.02, 150
SMOOTH = 1.5  # a p99 gap between tokens of so many times the direct one is still smooth
END = b"0\r\n\r\n"


def head(length: int) -> bytes:
    """Return a request for an answer of so many tokens."""
    body = BODY % ("x" * PROMPT_BYTES)
    return (
        f"POST /v1/chat/completions?chunks={length} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        f"content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
        f"{len(body):x}\r\n{body}\r\n0\r\n\r\n"
    ).encode()


async def whole(port: int, length: int) -> bool:
    """Ask for one answer; return whether it came to its end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    try:
        writer.write(head(length))
        answer = await reader.readuntil(END)
    except (asyncio.IncompleteReadError, ConnectionError):
        return False
    finally:
        writer.close()
    return b"[DONE]" in answer


async def wholes(port: int, length: int, count: int) -> int:
    """Ask for several at once; return how many came to their end."""
    return sum(await asyncio.gather(*(whole(port, length) for _ in range(count))))


class Bench:
    """A lane for each mode, and the figures of several rounds."""

    def __init__(self, folder: Path) -> None:
        self.rounds: dict[str, list[float]] = {}
        self._folder = folder
        self.server = free_port()
        self._backend = start_streaming(self.server, PACE_TOKENS, TOKEN_SECONDS)
        self._lanes: list[Lane] = []
        self.lanes = {mode: self.lane(mode, self.server) for mode in MODES}

    def lane(self, mode: str, server: int, slots: int = 100_000) -> Lane:
        """Start an Envoy of this mode and an EPP."""
        folder = self._folder / f"{mode}-{len(self._lanes)}"
        folder.mkdir()
        lane = Lane(folder, **MODES[mode])
        self._lanes.append(lane)
        lane.server = server
        lane.start_epp(snapshot(f"127.0.0.1:{server}", slots=slots))
        return lane

    def stop(self) -> None:
        """End every process."""
        for lane in self._lanes:
            lane.stop()
        self._backend.kill()

    def add(self, name: str, value: float) -> None:
        """Add a figure of one round."""
        self.rounds.setdefault(name, []).append(value)

    def cpu(self) -> None:
        """Measure the CPU per answer of each length."""
        for length in LENGTHS:
            for mode, lane in self.lanes.items():
                idle = _idle(lane)
                before, began = lane.cpu(), time.monotonic()
                count, done = BATCHES[length] * STREAMS, 0
                for _ in range(BATCHES[length]):
                    done += asyncio.run(wholes(lane.http, length, STREAMS))
                used, seconds = lane.cpu() - before, time.monotonic() - began
                if done != count:
                    raise SystemExit(f"{mode}: {count - done} answers of {count} broke off")
                used -= (idle + _idle(lane)) / 2 * seconds
                self.add(f"{mode}.cpu_ms_{length}", used * 1e3 / count)
                if length == LENGTHS[-1]:
                    rate = count * length / seconds
                    self.add(f"{mode}.tokens_per_s", rate)
                    self.add(f"{mode}.core_share_20k_tokens", used / seconds * 20_000 / rate)

    def kills(self, tries: int) -> None:
        """Kill each mode's EPP in the middle of an answer, so many times."""
        for mode, lane in self.lanes.items():
            cut = 0
            for _ in range(tries):
                cut += asyncio.run(_cut(lane))
                lane.epp.wait()
                lane.start_epp(snapshot(f"127.0.0.1:{self.server}"))
            self.add(f"{mode}.cut_by_kill", cut)
            self.add(f"{mode}.killed", tries)

    def slots(self) -> None:
        """Measure the time from the end of an answer to the next request, with one slot."""
        for mode in ("read", "observe"):
            server = OneSlot()
            gaps = asyncio.run(server.measure(lambda port, mode=mode: self.lane(mode, port, 1)))
            self.add(f"{mode}.slot_free_p50_ms", statistics.median(gaps) * 1e3)
            self.add(f"{mode}.slot_free_p99_ms", statistics.quantiles(gaps, n=100)[-1] * 1e3)

    def pace(self) -> None:
        """Measure the gaps between tokens and their latency, at rising rates, against direct."""
        smooth = dict.fromkeys(MODES, 0.0)
        slowed: set[str] = set()
        for streams in PACES:
            direct = asyncio.run(_paced(self.server, streams))
            for mode, lane in self.lanes.items():
                seen = asyncio.run(_paced(lane.http, streams))
                if streams == PACES[0]:
                    self.add(f"{mode}.token_latency_ms", (seen.latency - direct.latency) * 1e3)
                if seen.gap > SMOOTH * direct.gap:
                    slowed.add(mode)
                if mode not in slowed:
                    smooth[mode] = seen.tokens_per_s
                print(
                    f"{streams:4} streams {mode:8} {seen.tokens_per_s:8.0f} tokens/s, p99 gap "
                    f"{seen.gap * 1e3:6.1f} ms, direct {direct.gap * 1e3:6.1f}",
                    flush=True,
                )
        for mode, rate in smooth.items():
            self.add(f"{mode}.smooth_tokens_per_s", rate)


def _idle(lane: Lane) -> float:
    """Return the cores that an EPP takes while nothing comes."""
    before = lane.cpu()
    time.sleep(IDLE_SECONDS)
    return (lane.cpu() - before) / IDLE_SECONDS


async def _cut(lane: Lane) -> int:
    """Kill the EPP in the middle of an answer; return whether it was cut."""
    asking = asyncio.create_task(whole(lane.http, 500))
    await asyncio.sleep(0.4)
    lane.epp.kill()
    return not await asking


class OneSlot:
    """A server in this process that notes when its slot is free and when the next request comes."""

    def __init__(self) -> None:
        self._ended = 0.0
        self._gaps: list[float] = []
        self._enough = asyncio.Event()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await reader.readuntil(END)
                if self._ended:
                    self._gaps.append(time.monotonic() - self._ended)
                    if len(self._gaps) == SLOTS_FREED:
                        self._enough.set()
                await asyncio.sleep(TOKEN_SECONDS)
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n")
                await asyncio.sleep(TOKEN_SECONDS)
                writer.write(b"{}")
                self._ended = time.monotonic()
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            writer.close()

    async def measure(self, start: Callable[[int], Lane]) -> list[float]:
        """Serve clients that never wait, through a lane; return the gaps in seconds."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        lane = await asyncio.to_thread(start, server.sockets[0].getsockname()[1])
        self._gaps.clear()
        clients = [asyncio.create_task(self._ask(lane.http)) for _ in range(SLOT_CLIENTS)]
        await self._enough.wait()
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        server.close()
        return self._gaps[SLOT_CLIENTS:SLOTS_FREED]

    async def _ask(self, port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        request = head(1).replace(b"connection: close\r\n", b"")
        while True:
            writer.write(request)
            await reader.readuntil(b"{}")


class Paced:
    """What clients saw of streams of a fixed pace, in seconds."""

    def __init__(self, gaps: list[float], latencies: list[float], seconds: float) -> None:
        self.gap = statistics.quantiles(gaps, n=100)[-1]
        self.latency = statistics.median(latencies)
        self.tokens_per_s = len(latencies) / seconds


async def _paced(port: int, streams: int) -> Paced:
    gaps: list[float] = []
    latencies: list[float] = []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
        writer.write(head(PACE_TOKENS).replace(b"chunks=", b"pace=%g&chunks=" % PACE_SECONDS))
        last = 0.0
        while True:
            line = await reader.readline()
            if b"[DONE]" in line or not line:
                break
            _, mark, sent = line.partition(b'"sent":')
            if mark:
                now = time.monotonic()
                latencies.append(now - float(sent.partition(b"}")[0]))
                if last:
                    gaps.append(now - last)
                last = now
        writer.close()

    began = time.monotonic()
    await asyncio.gather(*(client() for _ in range(streams)))
    return Paced(gaps, latencies, time.monotonic() - began)


def run(rounds: int, kills: int, only: str | None) -> dict[str, float]:
    """Measure, and return the medians of the rounds."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        parts = {"cpu": bench.cpu, "slots": bench.slots, "pace": bench.pace}
        try:
            for _ in range(rounds):
                for name, part in parts.items():
                    if only in (None, name):
                        part()
            if only in (None, "kills"):
                bench.kills(kills)
        finally:
            bench.stop()
    figures = {name: statistics.median(values) for name, values in bench.rounds.items()}
    for mode in MODES if only in (None, "cpu") else ():
        figures[f"{mode}.cpu_2000_by_50"] = (
            figures[f"{mode}.cpu_ms_2000"] / figures[f"{mode}.cpu_ms_50"]
        )
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="hack/bench answers", description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--only", choices=("cpu", "slots", "pace", "kills"))
    arguments = parser.parse_args()

    figures = run(arguments.rounds, arguments.kills, arguments.only)
    for name, value in sorted(figures.items()):
        print(f"{name:32}{value:12.3f}")
    if arguments.json:
        rounded = {name: round(value, 4) for name, value in figures.items()}
        arguments.json.write_text(json.dumps({"bench": "answers", "figures": rounded}) + "\n")


if __name__ == "__main__":
    main()
