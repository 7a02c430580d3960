"""An EPP process from a plan file, Envoy in front of it, model servers that misbehave on request.

Clients and model servers are coroutines of one thread, so that hundreds of them cost little.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from control_plane import Process
from envoy_process import Envoy
from ext_proc_peer import until
from loop_thread import LoopThread
from ports import free_port

if TYPE_CHECKING:
    from concurrent.futures import Future
    from pathlib import Path

CLIENT_SECONDS = 60
BANDS = {"Critical": 100, "Standard": 0, "Sheddable": -100}
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
_ID = re.compile(rb"\r\nx-id: (\S+)\r\n", re.IGNORECASE)
_OUTCOME = re.compile(r"\r\nx-forebay-outcome: (\w+)")
_RETRY_AFTER = re.compile(r"\r\nretry-after: (\d+)")

# Answers a request, whose head it is given.
Behaviour = "Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]"


def snapshot(
    addresses: list[str],
    *,
    slots: int = 1,
    ttl_seconds: float = 60,
    max_requests: int = 10_000,
    max_bytes: int = 1 << 28,
    max_body_bytes: int = 1 << 23,
) -> dict:
    """A plan file's content: three bands, one model each, named as its band in lower case.

    Without `slots` (0) limits are learned.
    """
    return {
        "plan": {
            "pool": "test/pool",
            "bands": [
                {
                    "name": name,
                    "priority": priority,
                    "fairness": "FCFS",
                    "ordering": "FCFS",
                    "ttlSeconds": ttl_seconds,
                    "maxRequests": max_requests,
                    "maxBytes": max_bytes,
                    "flowMaxRequests": max_requests,
                    "flowMaxBytes": max_bytes,
                }
                for name, priority in BANDS.items()
            ],
            "models": [{"name": name.lower(), "band": name} for name in BANDS],
            "limits": {
                "maxRequests": 3 * max_requests,
                "maxBytes": max_bytes,
                "maxBodyBytes": max_body_bytes,
            },
            "saturation": {
                "mode": "Concurrency" if slots else "Adaptive",
                "maxConcurrency": slots or 1,
                "kvCacheUsageThreshold": 1,
            },
            "unmatched": {"action": "Queue", "band": "Standard"},
            "noEndpointsTtlSeconds": 5,
        },
        "endpoints": {"endpoints": [{"address": address} for address in addresses]},
    }


class SimulatedServer(Process):
    """`python -m forebay_sim` on a port that it keeps; an answer takes about 0.1 s."""

    def __init__(self, folder: Path, number: int, slots: int) -> None:
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        command = [
            *(sys.executable, "-P", "-m", "forebay_sim", f"--port={port}"),
            *(f"--max-num-seqs={slots}", "--time-to-first-token-ms=50"),
            "--inter-token-latency-ms=3",
        ]
        super().__init__(command, folder / f"server-{number}.log", port)
        until(lambda: self.page("/health") is not None, 30)


class PlanFileEpp(Process):
    """`python -m forebay_epp` on a plan file."""

    def __init__(self, folder: Path, content: dict, *flags: str) -> None:
        self._plan = folder / "plan.json"
        self.write(content)
        self.grpc, self.health, http = free_port(), free_port(), free_port()
        command = [
            *(sys.executable, "-P", "-m", "forebay_epp", f"--plan-file={self._plan}"),
            *("--bind-address=127.0.0.1", "--secure-serving=false"),
            *(f"--grpc-port={self.grpc}", f"--grpc-health-port={self.health}"),
            *(f"--metrics-port={http}", "--drain-timeout=5s", *flags),
        ]
        super().__init__(command, folder / "epp.log", http)

    def write(self, content: dict) -> None:
        """Put another plan in force."""
        new = self._plan.with_suffix(".new")
        new.write_text(json.dumps(content))
        new.replace(self._plan)

    def state(self) -> dict:
        """What waits and runs."""
        return json.loads(self.page("/debug/queues") or "{}")


@dataclass
class Answer:
    """What a client got: 200, an outcome, or what went wrong, and when (monotonic seconds)."""

    id: str
    outcome: str
    sent_at: float
    ended_at: float
    retry_after_seconds: int | None = None


@dataclass
class Servers:
    """Model servers; each `behaves` as told.

    `seen` counts the ids that reached each, `heads` are the heads of all requests with an id.
    """

    thread: LoopThread
    addresses: list[str] = field(default_factory=list)
    heads: list[bytes] = field(default_factory=list)
    seen: list[Counter[str]] = field(default_factory=list)

    def add(self, behaves: Behaviour) -> str:
        """Start one; return its address."""
        number = len(self.seen)
        self.seen.append(Counter())

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if b"chunked" in head:
                    await reader.readuntil(b"0\r\n\r\n")
                if found := _ID.search(head):
                    self.seen[number][found[1].decode()] += 1
                    self.heads.append(head)
                await behaves(head, writer)

        self.addresses.append(self.thread.listen(serve))
        return self.addresses[-1]

    @property
    def served(self) -> Counter[str]:
        """How often each id reached any server."""
        return sum(self.seen, Counter())


def answering(seconds: float = 0.0) -> Behaviour:
    """Answer every request after so many seconds."""

    async def behave(_: bytes, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(seconds)
        writer.write(ANSWER)

    return behave


class Clients:
    """Model servers and clients of one test on a thread, and what each client got.

    Attributes:
        envoy: which the clients ask; set by who starts it.
    """

    envoy: Envoy

    def __init__(self, *behaviours: Behaviour) -> None:
        self.thread = LoopThread()
        self.servers = Servers(self.thread)
        for behaviour in behaviours:
            self.servers.add(behaviour)
        self.answers: list[Answer] = []
        self._sent = 0
        self._first = 0

    def forget(self) -> None:
        """Count from here on."""
        self.answers.clear()
        self._first = self._sent

    def send(
        self,
        model: str,
        count: int = 1,
        *,
        size_bytes: int = 20,
        leave_after: float | None = None,
        headers: bytes = b"",
    ) -> list[Future[Answer]]:
        """Send requests at once.

        Args:
            model: whose.
            count: how many.
            size_bytes: of the prompt.
            leave_after: seconds after which the client is gone.
            headers: more of them, as lines.
        """
        ids = [f"{model}-{self._sent + number}" for number in range(count)]
        self._sent += count
        body = json.dumps({"model": model, "prompt": "x" * size_bytes}).encode()
        return [
            self.thread.submit(self._ask(request, headers, body, leave_after)) for request in ids
        ]

    async def _ask(
        self,
        request: str,
        headers: bytes,
        body: bytes,
        leave_after: float | None,
        http: int | None = None,
    ) -> Answer:
        sent_at = time.monotonic()
        retry_after = None
        try:
            async with asyncio.timeout(CLIENT_SECONDS if leave_after is None else leave_after):
                outcome, retry_after = await self._exchange(
                    request, headers, body, http or self.envoy.http
                )
        except TimeoutError:
            outcome = "no answer" if leave_after is None else "left"
        except (OSError, asyncio.IncompleteReadError) as error:
            outcome = f"broken: {type(error).__name__}"
        answer = Answer(request, outcome, sent_at, time.monotonic(), retry_after)
        self.answers.append(answer)
        return answer

    async def _exchange(
        self, request: str, headers: bytes, body: bytes, http: int
    ) -> tuple[str, int | None]:
        reader, writer = await asyncio.open_connection("127.0.0.1", http)
        try:
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-id: %b\r\nconnection: close\r\n"
                b"content-type: application/json\r\ncontent-length: %d\r\n%b\r\n"
                % (request.encode(), len(body), headers)
            )
            writer.write(body)
            text = (await reader.read()).decode(errors="replace")
        finally:
            writer.transport.abort()  # what is still unsent would keep it open
        status = text.split(" ", 2)[1] if text.startswith("HTTP/") else "nothing"
        found = _OUTCOME.search(text)
        retry_after = _RETRY_AFTER.search(text)
        return (
            found[1] if found else status,
            int(retry_after[1]) if retry_after else None,
        )

    def totals(self) -> Counter[str]:
        """How many answers there were of each outcome."""
        return Counter(answer.outcome for answer in self.answers)

    def check(self) -> None:
        """Every request had one answer; a server saw it once if that is 200, else at most once."""
        assert len(self.answers) == self._sent - self._first
        served = self.servers.served
        for answer in self.answers:
            count = served[answer.id]
            assert count == 1 if answer.outcome == "200" else count <= 1, answer


class DataPlane(Clients):
    """Servers, EPP, Envoy and clients of one test; all end with it.

    Args:
        folder: for plan, log and configuration.
        behaviours: one model server each.
        addresses: model servers that run elsewhere, instead.
        responses: whether answers are observed or pass through the EPP.
        plan: arguments of `snapshot`.
    """

    def __init__(
        self,
        folder: Path,
        *behaviours: Behaviour,
        addresses: list[str] | None = None,
        responses: str = "Read",
        **plan,
    ) -> None:
        super().__init__(*behaviours)
        self.content = snapshot(addresses or self.servers.addresses, **plan)
        self.epp = PlanFileEpp(folder, self.content)
        self.envoy = Envoy(folder, self.epp.grpc, responses=responses)
        until(lambda: self.send("critical")[0].result(60).outcome == "200", 30)
        self.forget()

    def until_waiting(self, number: int) -> None:
        """Wait until exactly so many requests are queued."""
        until(lambda: self.epp.state().get("requests") == number, 30)

    def until_idle(self) -> None:
        """Wait until nothing waits, runs or is open: slots, bytes and streams are back at zero."""

        def idle() -> bool:
            state = self.epp.state()
            return (
                (state.get("requests"), state.get("size_bytes"), state.get("in_flight"))
                == (0, 0, 0)
            ) and self.epp.metric("forebay_streams_open") == 0

        until(idle, 30)

    def stop(self) -> None:
        """End everything."""
        self.envoy.stop()
        self.epp.end()
        self.thread.stop()
