"""10,000 requests queued at once through one Envoy: memory, answers, and cancellation of all.

One round lets the model server answer them, one has every client hang up. Model server and clients
are in this process, on loopback; the EPP and Envoy are real.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from through_envoy import snapshot

from forebay_cli import envoy
from forebay_cli.child import dying_with_us

REQUESTS, SLOTS = 10_000, 32
BODY = json.dumps({"model": "chat", "prompt": "x" * 1000}).encode()
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
CONNECTING_AT_ONCE = 500


def _free_ports(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class Bench:
    """Endpoint picker, Envoy, and a model server that answers when it is let."""

    def __init__(self, folder: Path) -> None:
        """Choose ports."""
        self._folder = folder
        self._grpc, self._health, self._metrics, self._http, self._admin = _free_ports(5)
        self._open = asyncio.Event()
        self._processes: list[subprocess.Popen[bytes]] = []

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                await reader.readuntil(b"0\r\n\r\n")
                await self._open.wait()
                writer.write(ANSWER)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            writer.close()

    async def start(self) -> None:
        """Start everything and wait until a request passes."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20)
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        plan = self._folder / "plan.json"
        plan.write_text(json.dumps(snapshot(address, slots=SLOTS)))
        config = self._folder / "envoy.json"
        ports = envoy.Ports(self._http, self._grpc, self._admin)
        config.write_text(json.dumps(envoy.bootstrap(ports, secure=False)))
        epp = [
            *(sys.executable, "-m", "forebay_epp", "--plan-file", plan),
            *("--secure-serving=false", "--bind-address", "127.0.0.1", "--verbosity", 0),
            *("--grpc-port", self._grpc, "--grpc-health-port", self._health),
            *("--metrics-port", self._metrics),
        ]
        proxy = [
            *(Path(sys.executable).with_name("envoy"), "-c", config, "-l", "off"),
            *("--use-dynamic-base-id", "--concurrency", 1),
        ]
        for command in (epp, proxy):
            parts = [str(part) for part in command]
            self._start(parts)
        self._open.set()
        for _ in range(200):
            if await self._status() == "200":
                return
            await asyncio.sleep(0.1)
        raise SystemExit("EPP and Envoy do not serve")

    def _start(self, command: list[str]) -> None:
        process = subprocess.Popen(dying_with_us(*command), stderr=subprocess.DEVNULL)
        self._processes.append(process)

    def stop(self) -> None:
        """End the processes."""
        for process in reversed(self._processes):
            process.kill()
            process.wait()

    async def _status(self) -> str:
        try:
            reader, writer = await self._send()
            status = await _answer(reader)
            writer.close()
        except OSError:
            return ""
        return status

    async def _send(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._http)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(BODY), BODY)
        )
        return reader, writer

    async def fill(self) -> list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Have every slot taken and the rest of the requests queued."""
        self._open.clear()
        gate = asyncio.Semaphore(CONNECTING_AT_ONCE)

        async def send() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            async with gate:
                return await self._send()

        streams = await asyncio.gather(*(send() for _ in range(REQUESTS)))
        await self.until(lambda state: state["requests"] == REQUESTS - SLOTS)
        return streams

    async def until(self, claim: Any) -> float:
        """Wait until the EPP's state is as claimed; return the seconds it took."""
        started = time.monotonic()
        while not claim(state := await asyncio.to_thread(self._state)):
            if time.monotonic() - started > 60:
                self._open.set()
                raise SystemExit(f"did not come true within 60 s: {state}")
            await asyncio.sleep(0.02)
        return time.monotonic() - started

    def _state(self) -> Any:
        with urlopen(f"http://127.0.0.1:{self._metrics}/debug/queues", timeout=30) as page:
            return json.load(page)

    def release(self) -> None:
        """Let the model server answer."""
        self._open.set()

    def rss_mb(self) -> float:
        """Return the resident memory of the EPP."""
        status = Path(f"/proc/{self._processes[0].pid}/status").read_text()
        match = re.search(r"VmRSS:\s+(\d+) kB", status)
        if match is None:
            raise SystemExit("the EPP has ended")
        return int(match[1]) / 1024


async def _answer(reader: asyncio.StreamReader) -> str:
    head = await reader.readuntil(b"\r\n\r\n")
    return head.split(None, 2)[1].decode()


async def _measure(folder: Path) -> dict[str, float]:
    bench = Bench(folder)
    try:
        await bench.start()
        idle_mb = bench.rss_mb()
        streams = await bench.fill()
        queued_mb = bench.rss_mb()
        started = time.monotonic()
        bench.release()
        statuses = Counter(await asyncio.gather(*(_answer(reader) for reader, _ in streams)))
        answered_seconds = time.monotonic() - started
        print(f"answered: {dict(statuses)}")
        for _, writer in streams:
            writer.close()
        await bench.until(lambda state: state["in_flight"] == 0)
        streams = await bench.fill()
        for _, writer in streams:
            writer.transport.abort()
        freed_seconds = await bench.until(
            lambda state: state["requests"] == state["in_flight"] == 0
        )
        return {
            "queued": REQUESTS,
            "answered_200": statuses["200"],
            "answered_seconds": answered_seconds,
            "rss_mb_idle": idle_mb,
            "rss_mb_queued": queued_mb,
            "rss_mb_after_all": bench.rss_mb(),
            "cancel_all_seconds": freed_seconds,
        }
    finally:
        bench.stop()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if 0 <= hard < REQUESTS + 1000:
        raise SystemExit(f"needs {REQUESTS + 1000} open files, the hard limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as folder:
        figures = asyncio.run(_measure(Path(folder)))
    for name, value in figures.items():
        print(f"{name:20}{value:12.3f}")
    if arguments.json:
        rounded = {name: round(value, 3) for name, value in figures.items()}
        arguments.json.write_text(json.dumps({"bench": "burst", "figures": rounded}) + "\n")


if __name__ == "__main__":
    main()
