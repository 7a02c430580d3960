"""The demo behind hack/demo: the same overload through plain Envoy and through forebay.

Four simulated servers, 8 slots each, take about 58 requests of 50 tokens a second. Streaming chat
requests of three models come at nearly twice that rate, on a schedule that does not wait for
answers. Everything runs on loopback and ends with the demo.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from forebay_cli import envoy
from forebay_cli.child import dying_with_us
from forebay_sim import arrivals, report

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "crds" / "examples" / "quickstart"
SERVERS, SLOTS, TOKENS = 4, 8, 50
MODELS = {"critical": "llama-chat", "standard": "llama-summary", "sheddable": "llama-batch"}
RATES = {"critical": 18.6, "standard": 46.0, "sheddable": 46.0}
COLOURS = {"critical": "#0072b2", "standard": "#e69f00", "sheddable": "#009e73"}
SEED = 7
START_SECONDS = 30.0
ANSWER_SECONDS = 180.0


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Client(asyncio.Protocol):
    """One connection, one request at a time; reads as little of an answer as it can."""

    def __init__(self) -> None:
        """Begin idle."""
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[str] | None = None
        self._status = ""
        self._tail = b""
        self.first_at: float | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = transport  # type: ignore[assignment]

    def send(self, request: bytes) -> asyncio.Future[str]:
        """Send a request; the future is the status of its whole answer."""
        self._answer = asyncio.get_running_loop().create_future()
        self._status = ""
        self._tail = b""
        self.first_at = None
        if self._transport is None or self._transport.is_closing():
            self._answer.set_exception(ConnectionResetError())
        else:
            self._transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        """Note the status, the first token, and the end."""
        if not self._status:
            self._status = data.split(None, 2)[1].decode()
            if b"content-length" in data:
                self._finish()
                return
        if self.first_at is None and b"data: " in data:
            self.first_at = asyncio.get_running_loop().time()
        self._tail = (self._tail + data)[-5:]
        if self._tail == b"0\r\n\r\n":
            self._finish()

    def _finish(self) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(self._status)

    def connection_lost(self, exc: Exception | None) -> None:
        """A connection that ends within an answer is an outcome, too."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc or ConnectionResetError())

    @property
    def usable(self) -> bool:
        """Whether another request can be sent."""
        return self._transport is not None and not self._transport.is_closing()


class Load:
    """Sends a schedule through one port and collects the results."""

    def __init__(self, port: int, run: str) -> None:
        """Send nothing yet."""
        self._port = port
        self._run = run
        self._idle: list[Client] = []
        self.results: list[report.Result] = []

    async def send(self, schedule: list[arrivals.Arrival], progress: Progress) -> None:
        """Send everything at its time and wait for all answers."""
        loop = asyncio.get_running_loop()
        task = progress.add_task(self._run, total=len(schedule))
        self._started = loop.time()
        pending = set()
        for number, arrival in enumerate(schedule):
            await asyncio.sleep(max(0.0, self._started + arrival.at - loop.time()))
            request = asyncio.create_task(self._request(number, arrival))
            pending.add(request)
            request.add_done_callback(pending.discard)
            request.add_done_callback(lambda _: progress.advance(task))
        if pending:
            await asyncio.wait(set(pending), timeout=ANSWER_SECONDS)
        for request in pending:
            request.cancel()

    async def _request(self, number: int, arrival: arrivals.Arrival) -> None:
        loop = asyncio.get_running_loop()
        body = json.dumps(
            {
                "model": MODELS[arrival.name],
                "messages": [{"role": "user", "content": f"Tell me about river {number}."}],
                "max_tokens": TOKENS,
                "stream": True,
            }
        ).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nhost: demo\r\n"
            "content-type: application/json\r\n"
            f"x-request-id: {self._run}-{number}\r\ncontent-length: {len(body)}\r\n\r\n"
        ).encode()
        sent_at = loop.time()
        first_at = None
        try:
            client = self._idle.pop() if self._idle else await self._connect()
            status = await client.send(head + body)
            first_at = client.first_at
            if client.usable:
                self._idle.append(client)
        except (OSError, asyncio.CancelledError) as error:
            status = type(error).__name__
        self.results.append(
            report.Result(
                arrival.name,
                status,
                sent_at - self._started,
                None if first_at is None else first_at - self._started,
                loop.time() - self._started,
            )
        )

    async def _connect(self) -> Client:
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(Client, "127.0.0.1", self._port)
        return client


class Stage:
    """The processes of the demo."""

    def __init__(self, folder: Path) -> None:
        """Start nothing yet."""
        self._folder = folder
        self._processes: list[asyncio.subprocess.Process] = []
        self.servers: list[str] = []

    async def _start(self, name: str, *command: object) -> asyncio.subprocess.Process:
        log = await asyncio.to_thread((self._folder / f"{name}.log").open, "wb")
        process = await asyncio.create_subprocess_exec(
            *dying_with_us(*map(str, command)),
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            env=os.environ | {"PYTHONSAFEPATH": "1"},
            start_new_session=True,
        )
        log.close()
        self._processes.append(process)
        return process

    async def start_servers(self) -> None:
        """Start the simulated model servers."""
        for number in range(SERVERS):
            name = f"server-{number}"
            process = await self._start(
                name,
                *(sys.executable, "-m", "forebay_sim", "--port", 0, "--max-num-seqs", SLOTS),
                *("--time-to-first-token-ms", 50, "--inter-token-latency-ms", 10),
            )
            if process.stdout is None:
                raise AssertionError("started with a pipe")
            line = (await process.stdout.readline()).decode()
            if not line.startswith("listening on "):
                raise SystemExit(f"a simulated server did not start:\n{self._log(name)}")
            self.servers.append(line.split()[-1])

    async def start_direct(self) -> int:
        """Start Envoy alone, least request over the servers, and return its port."""
        http, admin = free_port(), free_port()
        config = self._folder / "direct.json"
        text = json.dumps(envoy.direct(envoy.Ports(http, 0, admin), tuple(self.servers)))
        await asyncio.to_thread(config.write_text, text)
        binary = Path(sys.executable).with_name("envoy")
        await self._start(
            "direct",
            *(binary, "-c", config, "-l", "error", "--use-dynamic-base-id"),
            *("--concurrency", 1),
        )
        await self._ready("direct", http)
        return http

    async def start_forebay(self) -> int:
        """Start `forebay up` as a user would and return Envoy's port."""
        http = free_port()
        endpoints = [flag for server in self.servers for flag in ("--endpoint", server)]
        await self._start(
            "forebay",
            *(sys.executable, "-m", "forebay_cli", "up", QUICKSTART, *endpoints),
            *("--http-port", http, "--grpc-port", free_port()),
            *("--grpc-health-port", free_port(), "--metrics-port", free_port()),
        )
        await self._ready("forebay", http)
        return http

    async def _ready(self, name: str, port: int) -> None:
        deadline = asyncio.get_running_loop().time() + START_SECONDS
        while True:
            process = self._processes[-1]
            if process.returncode is not None or asyncio.get_running_loop().time() > deadline:
                raise SystemExit(f"{name} did not start:\n{self._log(name)}")
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                status = await reader.readline()
                writer.close()
                if b" 200 " in status:
                    return
            await asyncio.sleep(0.1)

    def _log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text()[-2000:]

    async def served_at_most_once(self) -> bool:
        """Ask the servers whether any request reached two of them, or one twice."""
        seen: set[str] = set()
        for server in self.servers:
            host, _, port = server.rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 26)
            writer.write(b"GET /admin/requests HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            page = (await reader.read()).partition(b"\r\n\r\n")[2]
            writer.close()
            ids = json.loads(page)["ids"]
            if any(count > 1 for count in ids.values()) or seen & ids.keys():
                return False
            seen |= ids.keys()
        return True

    async def stop_last(self) -> None:
        """End the process started last."""
        process = self._processes.pop()
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), 20)
            except TimeoutError:
                process.kill()
                await process.wait()

    async def stop(self) -> None:
        """End every process."""
        while self._processes:
            await self.stop_last()


async def demonstrate(seconds: float, console: Console) -> tuple[list[dict[str, Any]], Any]:
    """Run both modes; return the JSON form of the runs and their results by mode."""
    schedule = arrivals.poisson(RATES, seconds, SEED)
    runs = []
    results: dict[str, list[report.Result]] = {}
    columns = (TextColumn("{task.description:8}"), BarColumn(), TextColumn("{task.completed}"))
    with tempfile.TemporaryDirectory(prefix="forebay-demo-") as folder:
        stage = Stage(Path(folder))
        try:
            with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
                await stage.start_servers()
                for mode, start in (
                    ("direct", stage.start_direct),
                    ("forebay", stage.start_forebay),
                ):
                    port = await start()
                    load = Load(port, mode)
                    await load.send(schedule, progress)
                    await stage.stop_last()
                    results[mode] = load.results
                    runs.append(
                        {
                            "mode": mode,
                            "wall_seconds": round(max(r.ended_at for r in load.results), 3),
                            "exactly_once": len(load.results) == len(schedule)
                            and await stage.served_at_most_once(),
                            "classes": {
                                name: report.describe(load.results, name) for name in RATES
                            },
                        }
                    )
        finally:
            await stage.stop()
    return runs, results


def table(runs: list[dict[str, Any]]) -> Table:
    """Return the runs side by side, a row per class and mode."""
    out = Table(
        title="the same overload, with and without forebay; times in seconds",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    out.add_column("class")
    out.add_column("through")
    for column in (
        *("offered", "answered", "refused", "TTFT\np50", "TTFT\np99"),
        *("end to\nend p99", "last\nanswer"),
    ):
        out.add_column(column, justify="right")
    for name in RATES:
        for run in runs:
            figures = run["classes"][name]
            out.add_row(
                name if run["mode"] == "direct" else "",
                "Envoy" if run["mode"] == "direct" else "[bold]forebay[/bold]",
                str(figures["offered"]),
                str(figures["ok"]),
                str(figures["offered"] - figures["ok"]),
                _seconds(figures["ttft_ms"]["p50"]),
                _seconds(figures["ttft_ms"]["p99"]),
                _seconds(figures["e2e_ms"]["p99"]),
                _seconds((figures["last_answer_seconds"] or 0) * 1e3),
            )
        out.add_section()
    return out


def _seconds(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds / 1e3:.2f}"


def plot(results: dict[str, list[report.Result]], path: Path) -> None:
    """Draw each request's time to first token over its arrival."""
    import matplotlib as mpl  # noqa: PLC0415  # slow to import, seldom wanted

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    titles = {"direct": "Envoy alone (least request)", "forebay": "forebay"}
    for axis, (mode, title) in zip(axes, titles.items(), strict=True):
        for name, colour in reversed(COLOURS.items()):
            answered = [r for r in results[mode] if r.name == name and r.first_at is not None]
            axis.scatter(
                [r.sent_at for r in answered],
                [r.first_at - r.sent_at for r in answered if r.first_at is not None],
                s=5,
                color=colour,
                label=f"{name} ({MODELS[name]})",
            )
        axis.set_title(title)
        axis.set_xlabel("arrival, seconds after the start")
        axis.set_yscale("log")
        axis.grid(visible=True, which="major", alpha=0.3)
    axes[0].set_ylabel("time to first token, seconds")
    axes[0].legend(loc="lower right", markerscale=3, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(prog="hack/demo", description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="length of the load")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a plot (PNG) there")
    arguments = parser.parse_args()
    if arguments.seconds <= 0:
        parser.error("--seconds must be above 0")
    console = Console()
    console.print(
        f"{SERVERS} simulated servers with {SLOTS} slots; {sum(RATES.values()):.0f} requests/s for "
        f"{arguments.seconds:g} s, nearly twice what they can answer"
    )
    try:
        runs, results = asyncio.run(demonstrate(arguments.seconds, console))
    except KeyboardInterrupt:
        return 130
    console.print(table(runs))
    if arguments.json:
        arguments.json.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    if arguments.plot:
        plot(results, arguments.plot)
        console.print(f"plot: {arguments.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
