"""The soak behind hack/soak: an hour of mixed load with a fault every 30 seconds.

Four simulated servers, an operator on a folder, one EPP and Envoy, all real processes on loopback.
The EPP is restarted in the first quarter only: after that its memory is watched. A request may fail
where a process that it needs is killed under it; any other failure is a finding.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from control_plane import EPPProcess, FolderOperator, Process
from envoy_process import Envoy, free_port
from ext_proc_peer import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

MODELS = ("llama-chat",) * 8 + ("llama-summary",) * 7 + ("llama-batch",) * 4 + ("made-up-{}",)
REQUESTS_PER_SECOND = 20.0
BURST_SECONDS, BURST_REQUESTS = 60.0, 150
FAULT_SECONDS, SAMPLE_SECONDS, PRINT_SECONDS = 30.0, 10.0, 300.0
CLIENT_SECONDS = 150.0
SERVERS, SLOTS = 4, 8
SETTLE_SECONDS = 8.0  # after a kill: what it has cut shows within this
MAX_FAILURES_AFTER_KILL = 3
MAX_SLOPE_MB = 1.0  # in ten minutes
SEED = 11


@dataclass(frozen=True)
class Request:
    """A request that has ended. Times are monotonic seconds."""

    id: str
    outcome: str
    sent_at: float
    ended_at: float


@dataclass(frozen=True)
class Kill:
    """A process that was ended. Times are monotonic seconds; an EPP is away until it is ready."""

    what: str
    began_at: float
    ended_at: float


class Server(Process):
    """A simulated model server on a port that it keeps."""

    def __init__(self, folder: Path, number: int) -> None:
        """Start it."""
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        command = [
            *(sys.executable, "-P", "-m", "forebay_sim", "--port", str(port)),
            *("--max-num-seqs", str(SLOTS), "--time-to-first-token-ms", "50"),
            *("--inter-token-latency-ms", "10"),
        ]
        super().__init__(command, folder / f"server-{number}.log", port)

    def served(self) -> Counter[str]:
        """How often each request id has reached it since it was started."""
        return Counter(json.loads(self.page("/admin/requests") or '{"ids": {}}')["ids"])


class Soak:
    """The processes, the load, the faults, and what came of them."""

    def __init__(self, folder: Path, seconds: float) -> None:
        """Start everything."""
        self._random = random.Random(SEED)
        self._seconds = seconds
        self._servers = [Server(folder, number) for number in range(SERVERS)]
        manifests = folder / "manifests"
        self._operator = FolderOperator(folder, manifests=self._write(manifests))
        self._epp = EPPProcess(folder, "epp", "chat", self._operator.control_port)
        self._envoy = Envoy(folder, self._epp.grpc)
        self._http = self._envoy.http
        self._served: Counter[str] = Counter()
        self._kills: list[Kill] = []
        self._ended: list[Request] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._sent = 0
        self._began_at = time.monotonic()
        self._memory: dict[str, list[tuple[float, float]]] = {"epp": [], "operator": []}

    def _write(self, manifests: Path) -> Path:
        """Write the quickstart with the servers as an EndpointSlice a port."""
        source = Path(__file__).parent.parent / "crds" / "examples" / "quickstart"
        manifests.mkdir()
        for file in source.glob("*.yaml"):
            (manifests / file.name).write_text(file.read_text())
        slices = [
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "name": f"chat-{number}",
                    "labels": {"forebay.dev/inference-pool": "chat"},
                },
                "addressType": "IPv4",
                "endpoints": [{"addresses": ["127.0.0.1"]}],
                "ports": [{"name": "http", "port": server.http}],
            }
            for number, server in enumerate(self._servers)
        ]
        (manifests / "servers.yaml").write_text(yaml.safe_dump_all(slices))
        return manifests

    # --- load

    async def _load(self, until: float) -> None:
        loop = asyncio.get_running_loop()
        next_at, burst_at = loop.time(), loop.time() + BURST_SECONDS / 2
        while loop.time() < until:
            number = 1
            if loop.time() >= burst_at:
                burst_at += BURST_SECONDS
                number = BURST_REQUESTS
            for _ in range(number):
                self._sent += 1
                task = asyncio.create_task(self._ask(f"soak-{self._sent}"))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            next_at += self._random.expovariate(REQUESTS_PER_SECOND)
            await asyncio.sleep(max(0.0, next_at - loop.time()))

    async def _ask(self, request_id: str) -> None:
        draw = self._random.random()
        sent_at = time.monotonic()
        hang_up = self._random.uniform(0.01, 2.0) if draw < 0.04 else None
        try:
            async with asyncio.timeout(hang_up or CLIENT_SECONDS):
                outcome = await self._exchange(request_id, malformed=0.04 <= draw < 0.06)
        except TimeoutError:
            outcome = "hung up" if hang_up else "no answer"
        except OSError as error:
            outcome = f"failed: {type(error).__name__}"
        self._ended.append(Request(request_id, outcome, sent_at, time.monotonic()))

    async def _exchange(self, request_id: str, *, malformed: bool) -> str:
        """Send a request and read its answer to the end; return 200, an outcome or what failed."""
        stream = self._random.random() < 0.7
        body = json.dumps(
            {
                "model": self._random.choice(MODELS).format(request_id),
                "prompt": "x" * self._random.choice((20, 200, 2000, 100_000)),
                "max_tokens": self._random.randint(2, 60),
                "stream": stream,
            }
        ).encode()
        if malformed:
            body = body[:-1]
        reader, writer = await asyncio.open_connection("127.0.0.1", self._http)
        try:
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nhost: soak\r\nconnection: close\r\n"
                b"content-type: application/json\r\nx-request-id: %b\r\ncontent-length: %d\r\n\r\n"
                % (request_id.encode(), len(body))
            )
            writer.write(body)
            answer = await reader.read(-1)
        finally:
            writer.close()
        head, _, rest = answer.decode(errors="replace").partition("\r\n\r\n")
        lines = head.split("\r\n")
        status = lines[0].split(" ")[1] if " " in lines[0] else "nothing"
        told = [line.split(": ")[1] for line in lines if line.startswith("x-forebay-outcome: ")]
        if told:
            return told[0]
        if status != "200":
            return f"failed: {status}"
        whole = "[DONE]" in rest if stream else '"usage"' in rest
        return "200" if whole else "failed: cut"

    # --- faults

    async def _faults(self, until: float) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        first_quarter = began + (until - began) / 4
        while loop.time() + 2 * FAULT_SECONDS < until:
            await asyncio.sleep(FAULT_SECONDS)
            faults: list[Callable[[], Any]] = [
                self._kill_server,
                self._kill_server,
                self._freeze_server,
                self._kill_operator,
                self._edit,
                self._edit,
            ]
            if loop.time() < first_quarter:
                faults += [self._kill_epp, self._restart_epp]
            fault = self._random.choice(faults)
            name, load = fault.__name__.strip("_"), os.getloadavg()[0]
            print(f"{loop.time() - began:6.0f} s {name}, load {load:.1f}", flush=True)
            await fault()

    @contextmanager
    def _killing(self, what: str) -> Iterator[None]:
        """Note from when to when a process is away."""
        began = time.monotonic()
        yield
        self._kills.append(Kill(what, began, time.monotonic()))

    @asynccontextmanager
    async def _replacing_the_epp(self) -> AsyncIterator[None]:
        """Note from when to when the EPP is away: until its log says once more that it serves."""
        starts = self._epp_starts()
        with self._killing("epp"):
            yield
            self._epp.restart()
            self._memory["epp"].clear()
            await asyncio.to_thread(until, lambda: self._epp_starts() > starts, 60)

    def _epp_starts(self) -> int:
        return self._epp.log.count('"msg": "serving"')

    async def _kill_server(self) -> None:
        server = self._random.choice(self._servers)
        self._served += await asyncio.to_thread(server.served)  # its list dies with it
        with self._killing("server"):
            server.kill()
        await asyncio.sleep(self._random.uniform(2, 15))
        server.restart()

    async def _freeze_server(self) -> None:
        server = self._random.choice(self._servers)
        server.freeze()
        await asyncio.sleep(5)
        server.thaw()

    async def _kill_epp(self) -> None:
        async with self._replacing_the_epp():
            self._epp.kill()

    async def _restart_epp(self) -> None:
        async with self._replacing_the_epp():
            await asyncio.to_thread(self._epp.stop, 60)

    async def _kill_operator(self) -> None:
        self._operator.kill()
        await asyncio.sleep(self._random.uniform(0, 10))
        self._operator.restart()
        self._memory["operator"].clear()

    async def _edit(self) -> None:
        for _ in range(5):
            self._operator.edit(f"{self._random.randint(30, 120)}s")
            await asyncio.sleep(0.3)

    async def _watch(self, until: float) -> None:
        loop = asyncio.get_running_loop()
        while loop.time() < until:
            await asyncio.sleep(SAMPLE_SECONDS)
            for name, process in (("epp", self._epp), ("operator", self._operator)):
                rss = await asyncio.to_thread(process.rss_mb)
                if rss:
                    self._memory[name].append((loop.time(), rss))

    # --- the run

    async def run(self) -> list[str]:
        """Run for the time given; return what is wrong."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._seconds
        await asyncio.gather(self._load(until), self._faults(until), self._watch(until))
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=CLIENT_SECONDS)
        return await self._judge()

    async def _judge(self) -> list[str]:
        for server in self._servers:
            self._served += await asyncio.to_thread(server.served)
        wrong = []
        doubled = [request for request, count in self._served.items() if count > 1]
        if doubled:
            wrong.append(f"{len(doubled)} requests reached servers more than once: {doubled[:5]}")
        if len(self._ended) != self._sent:
            wrong.append(f"{self._sent - len(self._ended)} requests have no outcome")
        unexplained = [r for r in self._ended if self._failed(r) and not self._explained(r)]
        if unexplained:
            found = Counter(request.outcome for request in unexplained)
            wrong.append(f"{len(unexplained)} failures without a kill: {found}; {unexplained[:3]}")
            minutes = Counter(int((r.ended_at - self._began_at) / 60) for r in unexplained)
            wrong.append(f"they ended in these minutes: {dict(sorted(minutes.items()))}")
        wrong += self._judge_kills()
        await self._idle(wrong)
        for name, samples in self._memory.items():
            settled = samples[len(samples) // 4 :]  # before, it warms up
            steps = range(0, len(samples), int(PRINT_SECONDS / SAMPLE_SECONDS))
            print(f"{name}, MB every five minutes: {[round(samples[i][1], 1) for i in steps]}")
            if len(settled) > 30:
                slope = statistics.linear_regression(*zip(*settled, strict=True)).slope * 600
                print(f"{name}: {settled[-1][1]:.1f} MB, slope {slope:+.2f} MB in 10 minutes")
                if slope > MAX_SLOPE_MB:
                    wrong.append(f"memory of the {name} grows by {slope:.2f} MB in 10 minutes")
        outcomes = Counter(request.outcome for request in self._ended)
        print(f"{self._sent} requests: {dict(outcomes.most_common())}")
        return wrong

    def _judge_kills(self) -> list[str]:
        wrong = []
        for kill in self._kills:
            later = [
                request
                for request in self._ended
                if self._failed(request)
                and kill.began_at <= request.sent_at < kill.began_at + SETTLE_SECONDS
            ]
            if kill.what == "server" and len(later) > MAX_FAILURES_AFTER_KILL:
                wrong.append(f"{len(later)} requests failed that were sent after a server's kill")
        print(f"kills: {dict(Counter(kill.what for kill in self._kills))}")
        if away := [kill.ended_at - kill.began_at for kill in self._kills if kill.what == "epp"]:
            median, most = statistics.median(away), max(away)
            print(f"the EPP was away for {median:.1f} s, {most:.1f} s at most")
        return wrong

    async def _idle(self, wrong: list[str]) -> None:
        for _ in range(50):
            if await asyncio.to_thread(self._epp.idle):
                return
            await asyncio.sleep(0.2)
        wrong.append(f"the EPP is not idle after the last answer: {self._epp.queues()}")

    @staticmethod
    def _failed(request: Request) -> bool:
        return request.outcome.startswith(("failed", "no answer"))

    def _explained(self, request: Request) -> bool:
        """Whether something was killed while the request was on its way."""
        return any(
            kill.began_at <= request.ended_at and request.sent_at <= kill.ended_at + SETTLE_SECONDS
            for kill in self._kills
        )

    def stop(self) -> None:
        """End the processes."""
        with suppress(Exception):
            self._envoy.stop()
        for process in (self._epp, self._operator, *self._servers):
            process.end()


def main() -> int:
    """Run the soak."""
    parser = argparse.ArgumentParser(prog="hack/soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="length of the load")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="forebay-soak-") as folder:
        soak = Soak(Path(folder), arguments.minutes * 60)
        try:
            wrong = asyncio.run(soak.run())
        finally:
            soak.stop()
    for line in wrong:
        print(f"WRONG: {line}")
    print("soak: failed" if wrong else "soak: passed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
