"""Scraping 1,000 endpoints: how many are fresh, and what it costs.

The real scraper and the real flow controller, which nothing is sent to, in this process. In another
one a server has an address of 127.0.0.0/8 for each endpoint, and answers with one page of vLLM's
size at once. CPU time is this process's. The rate is compared with that of 10 endpoints.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from pages import page
from ports import free_port

from forebay_cli.child import dying_with_us
from forebay_control.plan import Plan
from forebay_epp.adapters.scraper import Scraper
from forebay_epp.core.controller import FlowController
from forebay_epp.core.terms import Endpoint

PAGE_BYTES = 50_000  # vLLM 0.32 with one model
WARM_SECONDS, SECONDS = 8.0, 20.0
SAMPLE_SECONDS = 0.25
SERVER = """
import asyncio, sys

page = open(sys.argv[1], "rb").read()
head = b"HTTP/1.1 200 OK\\r\\ncontent-type: text/plain\\r\\ncontent-length: %d\\r\\n\\r\\n"

class Peer(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        if data.endswith(b"\\r\\n\\r\\n"):
            self.transport.write(head % len(page) + page)

async def main():
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Peer, "0.0.0.0", int(sys.argv[2]), backlog=4096)
    await server.serve_forever()

asyncio.run(main())
"""


async def scrape(port: int, endpoints: int) -> dict[str, float]:
    """Scrape so many for a while; return what was seen."""
    addresses = [f"127.0.{n // 250 + 1}.{n % 250 + 1}:{port}" for n in range(endpoints)]
    controller = FlowController(Plan(), Random(1))
    controller.set_endpoints([Endpoint(address) for address in addresses], time.monotonic())
    pages = 0

    def report(metrics: object) -> None:
        nonlocal pages
        pages += 1
        controller.observe(metrics, time.monotonic())  # type: ignore[arg-type]

    scraper = Scraper(report)
    scraper.set_addresses(frozenset(addresses))
    running = asyncio.create_task(scraper.run())
    await asyncio.sleep(WARM_SECONDS)
    began, cpu_began, pages = time.monotonic(), time.process_time(), 0
    fresh = samples = 0
    while time.monotonic() < began + SECONDS:
        await asyncio.sleep(SAMPLE_SECONDS)
        now = time.monotonic()
        controller.poll(now)
        states = controller.state(now).endpoints
        fresh += sum(state.fresh for state in states)
        samples += len(states)
    seconds, cpu_seconds = time.monotonic() - began, time.process_time() - cpu_began
    running.cancel()
    return {
        "fresh_percent": 100 * fresh / samples,
        "scrapes_per_second": pages / seconds,
        "cores": cpu_seconds / seconds,
        "cpu_us_per_scrape": 1e6 * cpu_seconds / max(1, pages),
        **{f"failed_{cause}": float(number) for cause, number in scraper.failures.items()},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="hack/bench scrapes", description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--endpoints", type=int, default=1000)
    parser.add_argument("--page", type=Path, help="a page of a real server")
    arguments = parser.parse_args()
    logging.disable()
    text = arguments.page.read_bytes() if arguments.page else page(PAGE_BYTES)
    found: dict[str, dict[str, float]] = {}
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="forebay-") as name:
        file = Path(name) / "page"
        file.write_bytes(text)
        command = [sys.executable, "-c", SERVER, str(file), str(port)]
        with subprocess.Popen(dying_with_us(*command)) as server:
            try:
                for endpoints in (10, arguments.endpoints):
                    found[str(endpoints)] = asyncio.run(scrape(port, endpoints))
            finally:
                server.kill()
    for figure in next(iter(found.values())):
        values = "".join(f"{figures[figure]:>12.1f}" for figures in found.values())
        print(f"{figure:24}{values}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"bench": "scrapes", "figures": found}) + "\n")


if __name__ == "__main__":
    main()
