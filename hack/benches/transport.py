"""The EPP on both transports against a bare grpc.aio servicer, through one Envoy.

The bare servicer does nothing; ours does everything: reading, classifying, queueing, dispatching,
counting. CPU is user plus system time of the EPP's process, from /proc. Needs wrk and
nginx (Debian: apt-get install wrk nginx-light). All traffic is on loopback.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from forebay_cli import envoy
from forebay_cli.child import dying_with_us

CONCURRENCIES = (1, 32, 256)
ROUNDS = 3
SSE_STREAMS, SSE_CHUNKS, SSE_INTERVAL_SECONDS = 32, 100, 0.01
HERE = Path(__file__).parent
BODY = '{"model":"chat","messages":[{"role":"user","content":"' + "x" * 200 + '"}],"max_tokens":50}'
ANSWER = '{"id":"x","choices":[],"usage":{"prompt_tokens":50,"completion_tokens":50}}'
UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4}
TICKS = os.sysconf("SC_CLK_TCK")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Bench:
    """The parts that stay the same: Envoy and the model servers."""

    def __init__(self, folder: Path, seconds: int) -> None:
        """Choose ports and write the configuration files."""
        self._folder = folder
        self._seconds = seconds
        self._http, self._grpc = _free_port(), _free_port()
        self._json_server, self._sse_server = _free_port(), _free_port()
        self._processes: list[subprocess.Popen[bytes]] = []
        (folder / "post.lua").write_text(
            f"wrk.method = 'POST'\nwrk.body = '{BODY}'\n"
            "wrk.headers['Content-Type'] = 'application/json'\n"
        )

    def start(self, *command: object) -> subprocess.Popen[bytes]:
        """Start a process that ends with the bench."""
        log = (self._folder / "log").open("ab")
        parts = dying_with_us(*(str(part) for part in command))
        process = subprocess.Popen(parts, stdout=log, stderr=log)
        self._processes.append(process)
        return process

    def stop(self) -> None:
        """End every process, the youngest first."""
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        self._processes.clear()

    def start_fixtures(self) -> None:
        """Start Envoy and both model servers."""
        config = envoy.bootstrap(envoy.Ports(self._http, self._grpc), secure=False)
        (self._folder / "envoy.json").write_text(json.dumps(config))
        (self._folder / "nginx.conf").write_text(
            f"daemon off; pid {self._folder}/nginx.pid; error_log stderr; master_process off;\n"
            "events { worker_connections 4096; }\n"
            "http { access_log off; keepalive_requests 1000000000; server {\n"
            f"listen 127.0.0.1:{self._json_server};\n"
            "default_type application/json;\n"
            f"location / {{ return 200 '{ANSWER}'; }} }} }}\n"
        )
        self.start("nginx", "-c", self._folder / "nginx.conf", "-p", self._folder)
        self.start(
            sys.executable,
            HERE / "sse_backend.py",
            self._sse_server,
            SSE_CHUNKS,
            SSE_INTERVAL_SECONDS,
        )
        binary = Path(sys.executable).with_name("envoy")
        self.start(
            binary,
            *("-c", self._folder / "envoy.json", "--concurrency", 1, "-l", "error"),
            "--use-dynamic-base-id",
        )

    def start_epp(self, name: str, server: int) -> subprocess.Popen[bytes]:
        """Start the EPP under test and wait until requests pass."""
        address = f"127.0.0.1:{server}"
        if name == "bare_aio":
            epp = self.start(sys.executable, HERE / "bare_aio.py", self._grpc, address)
        else:
            plan = self._folder / "plan.json"
            plan.write_text(json.dumps(snapshot(address)))
            epp = self.start(
                *(sys.executable, "-m", "forebay_epp", "--plan-file", plan),
                *("--transport", name.replace("_", "-"), "--secure-serving=false"),
                *("--bind-address", "127.0.0.1", "--grpc-port", self._grpc),
                *("--grpc-health-port", 0, "--metrics-port", 0, "--verbosity", 0),
            )
        deadline = time.monotonic() + 20
        while not self._answers():
            if time.monotonic() > deadline or epp.poll() is not None:
                log = (self._folder / "log").read_text()[-2000:]
                raise SystemExit(f"{name} does not serve:\n{log}")
            time.sleep(0.1)
        return epp

    def stop_epp(self, epp: subprocess.Popen[bytes]) -> None:
        """End the EPP under test."""
        epp.kill()
        epp.wait()
        self._processes.remove(epp)

    def _answers(self) -> bool:
        request = urllib.request.Request(self._url, BODY.encode())  # noqa: S310  # loopback
        try:
            with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    @property
    def _url(self) -> str:
        return f"http://127.0.0.1:{self._http}/v1/chat/completions"

    def json_run(self, name: str, concurrency: int) -> dict[str, float]:
        """Load the EPP with short JSON answers."""
        epp = self.start_epp(name, self._json_server)
        before = _cpu_seconds(epp.pid)
        output = subprocess.run(
            [
                "wrk",
                "-t1",
                f"-c{concurrency}",
                f"-d{self._seconds}s",
                "--latency",
                "-s",
                str(self._folder / "post.lua"),
                self._url,
            ],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        cpu = _cpu_seconds(epp.pid) - before
        self.stop_epp(epp)
        if "Non-2xx" in output or "Socket errors" in output:
            raise SystemExit(f"{name} did not answer everything:\n{output}")
        requests = _number(r"(\d+) requests in", output)
        return {
            "rps": _number(r"Requests/sec:\s+([\d.]+)", output),
            "p50_ms": _milliseconds("50%", output),
            "p99_ms": _milliseconds("99%", output),
            "cpu_ms": cpu * 1e3 / requests,
        }

    def sse_run(self, name: str) -> float:
        """Stream through the EPP and return its CPU microseconds per chunk."""
        epp = self.start_epp(name, self._sse_server)
        before = _cpu_seconds(epp.pid)
        chunks = asyncio.run(self._stream())
        cpu = _cpu_seconds(epp.pid) - before
        self.stop_epp(epp)
        return cpu * 1e6 / chunks

    async def _stream(self) -> int:
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            f"content-length: {len(BODY)}\r\n\r\n{BODY}"
        ).encode()
        deadline = time.monotonic() + self._seconds

        async def client() -> int:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._http)
            events = 0
            while time.monotonic() < deadline:
                writer.write(head)
                answer = await reader.readuntil(b"0\r\n\r\n")
                events += answer.count(b"data: ")
            writer.close()
            return events

        return sum(await asyncio.gather(*(client() for _ in range(SSE_STREAMS))))


def snapshot(address: str, slots: int = 100_000) -> dict[str, Any]:
    """Return the plan of one endpoint with so many slots, as the plan file has it."""
    many = {"maxRequests": 100_000, "maxBytes": 1 << 30}
    return {
        "plan": {
            "pool": "bench/bench",
            "bands": [
                {
                    "name": "Standard",
                    "priority": 0,
                    "fairness": "RoundRobin",
                    "ordering": "FCFS",
                    "ttlSeconds": 60,
                    **many,
                    "flowMaxRequests": 100_000,
                    "flowMaxBytes": 1 << 30,
                }
            ],
            "models": [{"name": "chat", "band": "Standard"}],
            "limits": {**many, "maxBodyBytes": 1 << 20},
            "saturation": {
                "mode": "Concurrency",
                "maxConcurrency": slots,
                "kvCacheUsageThreshold": 1,
            },
            "unmatched": {"action": "Queue", "band": "Standard"},
            "noEndpointsTtlSeconds": 60,
        },
        "endpoints": {"endpoints": [{"address": address}]},
    }


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


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


def _measure(bench: Bench) -> dict[str, float]:
    names = ("bare_aio", "aio", "completion_queue")
    figures: dict[str, float] = {}
    for concurrency in CONCURRENCIES:
        rounds = [
            {name: bench.json_run(name, concurrency) for name in names} for _ in range(ROUNDS)
        ]
        for name in names:
            for unit in ("rps", "p50_ms", "p99_ms", "cpu_ms"):
                values = [results[name][unit] for results in rounds]
                figures[f"{name}_{unit}_c{concurrency}"] = statistics.median(values)
        for unit in ("rps", "cpu"):
            key = "rps" if unit == "rps" else "cpu_ms"
            figures[f"{unit}_ratio_c{concurrency}"] = statistics.median(
                results["completion_queue"][key] / results["bare_aio"][key] for results in rounds
            )
        line = "  ".join(
            f"{name} {figures[f'{name}_rps_c{concurrency}']:.0f}/s "
            f"{figures[f'{name}_cpu_ms_c{concurrency}']:.3f} ms CPU "
            f"p50 {figures[f'{name}_p50_ms_c{concurrency}']:.1f} "
            f"p99 {figures[f'{name}_p99_ms_c{concurrency}']:.1f} ms"
            for name in names
        )
        print(f"c={concurrency}: {line}", flush=True)
    rounds_of_chunks = [{name: bench.sse_run(name) for name in names} for _ in range(ROUNDS)]
    for name in names:
        values = [results[name] for results in rounds_of_chunks]
        figures[f"{name}_chunk_us"] = statistics.median(values)
    figures["chunk_cpu_ratio"] = statistics.median(
        results["completion_queue"] / results["bare_aio"] for results in rounds_of_chunks
    )
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=int, default=4, help="of each single run")
    arguments = parser.parse_args()
    missing = [name for name in ("wrk", "nginx") if shutil.which(name) is None]
    if missing:
        raise SystemExit(
            f"hack/bench transport needs {' and '.join(missing)}; "
            "on Debian: apt-get install wrk nginx-light"
        )
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.seconds)
        try:
            bench.start_fixtures()
            figures = _measure(bench)
        finally:
            bench.stop()
    for name, value in figures.items():
        print(f"{name:32}{value:12.3f}")
    if arguments.json:
        rounded = {name: round(value, 4) for name, value in figures.items()}
        arguments.json.write_text(json.dumps({"bench": "transport", "figures": rounded}) + "\n")


if __name__ == "__main__":
    main()
