"""adapters/scraper.py against real servers on loopback, most of them behaving badly."""

from __future__ import annotations

import asyncio
import gzip
import logging
import socket
import struct
import time
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from itertools import pairwise

import pytest

from forebay_control.plan import MetricsPlan, SeriesPlan
from forebay_epp.adapters import scraper as scraper_module
from forebay_epp.adapters.scraper import Scraper
from forebay_epp.core.terms import EndpointMetrics
from forebay_epp.fetching import CAUSES, MAX_PAGE_BYTES

PAGE = b"vllm:num_requests_running 3\nvllm:num_requests_waiting 1\nvllm:kv_cache_usage_perc 0.5\n"


def answer(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    """An HTTP response with its length."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


class RawServer:
    """A TCP server that hands every request to `behave(writer)`, until that closes the writer."""

    def __init__(self, behave) -> None:
        self.behave = behave
        self.requests: list[bytes] = []
        self.connections = 0
        self.address = ""
        self._tasks: set[asyncio.Task] = set()

    async def _serve(self, reader, writer) -> None:
        self._tasks.add(asyncio.current_task())
        self.connections += 1
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while not writer.is_closing():
                self.requests.append(await reader.readuntil(b"\r\n\r\n"))
                await self.behave(writer)
        writer.close()

    @asynccontextmanager
    async def listening(self):
        """Serve within the context."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks)


def replies(data: bytes):
    """Behaviour: send these bytes for every request."""

    async def behave(writer) -> None:
        writer.write(data)
        await writer.drain()

    return behave


async def hang(_writer) -> None:
    """Behaviour: never answer."""
    await asyncio.Event().wait()


async def drip(writer) -> None:
    """Behaviour: a byte a second."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    while True:
        writer.write(b"v")
        await writer.drain()
        await asyncio.sleep(1)


async def reset(writer) -> None:
    """Behaviour: break the connection with RST in the middle of the page."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nvllm:num_requests_running 3\n")
    await writer.drain()
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


async def cut_off(writer) -> None:
    """Behaviour: end the connection before the page is complete."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + PAGE)
    writer.close()


async def pour(writer) -> None:
    """Behaviour: 50 MB of chunks."""
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(800):
        writer.write(b"10000\r\n" + b"#" * 65536 + b"\r\n")
        await writer.drain()


async def until(condition, seconds: float = 10.0) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.002)


@asynccontextmanager
async def scraping(*addresses: str, interval_seconds: float = 0.02, **options):
    """A running scraper and the list of what it reports."""
    reports: list[EndpointMetrics] = []
    scraper = Scraper(reports.append, interval_seconds, **options)
    scraper.set_addresses(frozenset(addresses))
    task = asyncio.create_task(scraper.run())
    try:
        yield scraper, reports
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_reports_what_a_page_says():
    """The report names the endpoint and when the scrape was sent."""
    before = time.monotonic()
    async with (
        RawServer(replies(answer(PAGE))).listening() as server,
        scraping(server.address) as (_, reports),
    ):
        await until(lambda: reports)

    report = reports[0]
    assert report == EndpointMetrics(server.address, 3, 1, 0.5, report.started_at, 0.02)
    assert before < report.started_at < time.monotonic()


@pytest.mark.parametrize(("tokens", "expected"), [(b"900.0", (70.0, 900.0)), (b"NaN", (None, 0.0))])
async def test_reports_steps_with_their_tokens_or_not_at_all(tokens, expected):
    """One is worth nothing without the other."""
    page = PAGE + (
        b"\nvllm:iteration_tokens_total_count 70.0\nvllm:iteration_tokens_total_sum %b\n" % tokens
    )
    async with (
        RawServer(replies(answer(page))).listening() as server,
        scraping(server.address) as (_, reports),
    ):
        await until(lambda: reports)

    assert (reports[0].steps, reports[0].step_tokens) == expected


async def test_reports_the_size_of_the_kv_cache():
    """In tokens."""
    page = PAGE + b'\nvllm:cache_config_info{block_size="16",num_gpu_blocks="1000"} 1.0\n'
    async with (
        RawServer(replies(answer(page))).listening() as server,
        scraping(server.address) as (_, reports),
    ):
        await until(lambda: reports)

    assert reports[0].kv_capacity_tokens == 16_000


async def test_reports_a_page_without_cache_usage():
    """KV usage may be unknown; running and waiting may not."""
    page = b"\n".join(PAGE.split(b"\n")[:2])
    async with (
        RawServer(replies(answer(page))).listening() as server,
        scraping(server.address) as (_, reports),
    ):
        await until(lambda: reports)

    assert reports[0].kv_usage is None


async def test_started_at_is_when_the_scrape_was_sent():
    """A request dispatched while a slow server answers is not taken to be on the page."""

    async def slow(writer) -> None:
        await asyncio.sleep(0.2)
        await replies(answer(PAGE))(writer)

    async with (
        RawServer(slow).listening() as server,
        scraping(server.address) as (_, reports),
    ):
        await until(lambda: reports)
        received_at = time.monotonic()

    assert received_at - reports[0].started_at >= 0.2


async def test_asks_for_an_uncompressed_page_on_one_connection():
    """Scrapes reuse the connection and do not accept compression."""
    async with (
        RawServer(replies(answer(PAGE))).listening() as server,
        scraping(server.address) as (_, reports),
    ):
        await until(lambda: len(reports) >= 5)

    assert server.connections == 1
    assert server.requests[0].startswith(b"GET /metrics HTTP/1.1\r\n")
    assert b"Accept-Encoding: identity\r\n" in server.requests[0]


def by_path(pages: dict[str, bytes]):
    """A server that answers by path, 404 elsewhere; it notes what was asked for."""
    server = RawServer(None)

    async def behave(writer) -> None:
        path = server.requests[-1].split()[1].decode()
        missing = answer(b"", status="404 Not Found")
        writer.write(answer(pages[path]) if path in pages else missing)
        await writer.drain()

    server.behave = behave
    return server


@pytest.mark.parametrize("first", [None, b"[]"], ids=["404", "no load"])
async def test_finds_the_page_at_the_other_known_path_and_stays_there(first):
    """As trtllm-serve has it, without a failure; when it fails the first is tried again."""
    pages = {"/prometheus/metrics": PAGE} | ({"/metrics": first} if first else {})
    async with (
        by_path(pages).listening() as server,
        scraping(server.address) as (scraper, reports),
    ):
        await until(lambda: len(reports) >= 3)
        asked = [request.split()[1] for request in server.requests[:3]]
        assert asked == [b"/metrics", *[b"/prometheus/metrics"] * 2]
        assert not any(scraper.failures.values())

        pages["/metrics"] = pages.pop("/prometheus/metrics")
        before = len(reports)
        await until(lambda: len(reports) > before)


async def test_a_server_without_a_page_fails_once_a_scrape():
    """Both paths are one scrape, and the first one's failure is reported."""
    async with (
        by_path({}).listening() as server,
        scraping(server.address) as (scraper, _),
    ):
        await until(lambda: scraper.failures["status"] >= 2)

    assert abs(len(server.requests) - 2 * scraper.failures["status"]) <= 2


async def test_a_plan_says_where_the_page_is_and_what_is_on_it():
    """Port, path and series; the next scrape follows a change."""
    plan = MetricsPlan("/stats", 0, SeriesPlan("r"), SeriesPlan("w"), SeriesPlan("kv"))
    async with (
        by_path({"/stats": b"r 5\nw 6\nkv 0.75\n", "/metrics": PAGE}).listening() as pages,
        by_path({}).listening() as model_server,
        scraping(model_server.address) as (scraper, reports),
    ):
        port = int(pages.address.rpartition(":")[2])
        scraper.set_metrics(replace(plan, port=port))
        await until(lambda: reports)
        assert (reports[0].running, reports[0].waiting, reports[0].kv_usage) == (5, 6, 0.75)
        assert reports[0].address == model_server.address

        scraper.set_metrics(MetricsPlan(port=port))
        await until(lambda: reports[-1].running == 3)


BAD_SERVERS = {
    "hang": (hang, "timeout"),
    "drip": (drip, "timeout"),
    "reset": (reset, "connect"),
    "error": (replies(answer(PAGE, status="500 Oops")), "status"),
    "no content": (replies(answer(b"", status="204 No Content")), "status"),
    "html": (replies(answer(b"<html>vllm:num_requests_running 3</html>")), "unparsable"),
    "empty": (replies(answer(b"")), "unparsable"),
    "nan": (replies(answer(PAGE.replace(b"3", b"NaN"))), "unparsable"),
    "only running": (replies(answer(PAGE.split(b"\n")[0])), "unparsable"),
    "gzip": (replies(answer(gzip.compress(PAGE), "Content-Encoding: gzip")), "unparsable"),
    "gzip named, not done": (replies(answer(PAGE, "Content-Encoding: gzip")), "unparsable"),
    "gzip not named": (replies(answer(gzip.compress(PAGE))), "unparsable"),
    "cut off": (cut_off, "connect"),
    "pour": (pour, "too_large"),
    "too large at once": (replies(answer(PAGE + b"#" * MAX_PAGE_BYTES)), "too_large"),
    "not http": (replies(b"SSH-2.0-OpenSSH_9.7\r\n\r\n"), "unparsable"),
    "header bomb": (replies(answer(PAGE, "X: " + "x" * 100_000)), "unparsable"),
    "bad length": (
        replies(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n" + PAGE),
        "unparsable",
    ),
}


@pytest.mark.parametrize(("behave", "cause"), BAD_SERVERS.values(), ids=BAD_SERVERS)
async def test_a_bad_answer_is_counted_and_not_reported(behave, cause):
    """Whatever a server sends that is not a plain page of bounded size, nothing is reported."""
    async with (
        RawServer(behave).listening() as server,
        scraping(server.address) as (scraper, reports),
    ):
        await until(lambda: scraper.failures[cause])

    assert reports == []
    assert {name for name, count in scraper.failures.items() if count} == {cause}


async def test_an_endless_page_is_not_read_to_its_end():
    """After the limit the connection is closed; the rest stays in socket buffers."""
    sent = 0

    async def count(writer) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while sent < 50_000_000:
            writer.write(b"10000\r\n" + b"#" * 65536 + b"\r\n")
            await writer.drain()
            sent += 65536

    async with (
        RawServer(count).listening() as server,
        scraping(server.address) as (scraper, _),
    ):
        await until(lambda: scraper.failures["too_large"])

    assert sent < 25_000_000


async def test_redirects_are_not_followed():
    """A server cannot point the scraper elsewhere."""
    async with RawServer(replies(answer(PAGE))).listening() as other:
        location = f"Location: http://{other.address}/metrics"
        redirect = replies(answer(b"", location, status="302 Found"))
        async with (
            RawServer(redirect).listening() as server,
            scraping(server.address) as (scraper, reports),
        ):
            await until(lambda: scraper.failures["redirect"] >= 3)

    assert reports == []
    assert other.requests == []


async def test_nobody_listens():
    """A refused connection is a failure to connect."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        async with scraping(address) as (scraper, reports):
            await until(lambda: scraper.failures["connect"] >= 2)

    assert reports == []


@pytest.mark.parametrize("address", ["", "127.0.0.1:99999", "[::1", "a b:1", "\ud800:80"])
async def test_an_address_that_is_none_disturbs_nobody(address):
    """It fails to connect while another endpoint is scraped."""
    async with (
        RawServer(replies(answer(PAGE))).listening() as server,
        scraping(address, server.address) as (scraper, reports),
    ):
        await until(lambda: sum(scraper.failures.values()) >= 2 and len(reports) >= 2)

    assert {report.address for report in reports} == {server.address}


async def test_a_hanging_endpoint_delays_no_other():
    """Others are scraped again and again before the first timeout."""
    async with (
        RawServer(replies(answer(PAGE))).listening() as good,
        RawServer(hang).listening() as bad,
        scraping(good.address, bad.address) as (scraper, reports),
    ):
        await until(lambda: len(reports) >= 5)
        timeouts = scraper.failures["timeout"]

    assert timeouts == 0
    assert len(bad.requests) <= 1


async def test_one_request_at_a_time_per_endpoint():
    """A server slower than the interval skips turns instead of piling up requests."""
    now = peak = 0

    async def slow(writer) -> None:
        nonlocal now, peak
        now += 1
        peak = max(peak, now)
        await asyncio.sleep(0.05)
        now -= 1
        await replies(answer(PAGE))(writer)

    async with (
        RawServer(slow).listening() as server,
        scraping(server.address, interval_seconds=0.01) as (_, reports),
    ):
        await until(lambda: len(reports) >= 5)

    assert peak == 1


async def test_any_bytes_are_survived():
    """After every kind of broken answer the endpoint is asked again, and believed again."""
    broken = [
        b"\r\n",
        b"HTTP/1.1\r\n\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/9.9 200 OK\r\n\r\n",
        b"HTTP/1.1 99999 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: \xff\xfe\x00\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=\xff\r\n\r\n",
        b"HTTP/1.1 301 Moved\r\nLocation: http://[::1\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nSet-Cookie: a=\x01; Max-Age=x\r\n\r\n",
        bytes(range(256)),
    ]

    async def misbehave(writer) -> None:
        if broken:
            writer.write(broken.pop())
            writer.close()
        else:
            await replies(answer(PAGE))(writer)

    async with (
        RawServer(misbehave).listening() as server,
        scraping(server.address) as (_, reports),
    ):
        await until(lambda: reports)

    assert broken == []


async def test_scrapes_what_was_named_last():
    """Endpoints come and go while the scraper runs; one that went is not asked again."""
    async with (
        RawServer(replies(answer(PAGE))).listening() as old,
        RawServer(replies(answer(PAGE))).listening() as new,
        scraping(old.address) as (scraper, reports),
    ):
        await until(lambda: reports)
        scraper.set_addresses(frozenset([new.address]))
        asked = len(old.requests)
        del reports[:]
        await until(lambda: len(reports) >= 5)

    assert len(old.requests) == asked
    assert {report.address for report in reports} == {new.address}


async def test_a_scrape_of_an_endpoint_that_left_is_abandoned():
    """Its connection is closed and nothing is counted."""
    async with (
        RawServer(hang).listening() as server,
        scraping(server.address) as (scraper, _),
    ):
        await until(lambda: server.requests)
        scraper.set_addresses(frozenset())
        await until(lambda: not scraper._tasks)

    assert scraper.failures == dict.fromkeys(CAUSES, 0)


async def test_logs_a_failure_once_and_the_recovery_once(caplog):
    """A server that is down for long does not fill the log."""
    caplog.set_level(logging.INFO, logger="forebay_epp")
    server = RawServer(replies(answer(PAGE)))
    async with (
        server.listening(),
        scraping(server.address) as (scraper, reports),
    ):
        await until(lambda: reports)
        server.behave = replies(answer(b"", status="503 Busy"))
        await until(lambda: scraper.failures["status"] >= 5)
        server.behave = replies(answer(PAGE))
        del reports[:]
        await until(lambda: len(reports) >= 5)

    lines = [record for record in caplog.records if record.name.startswith("forebay_epp")]
    assert [line.levelname for line in lines] == ["WARNING", "INFO"]
    assert [line.endpoint for line in lines] == [server.address] * 2
    assert lines[0].cause == "status"


async def test_scrapes_of_several_endpoints_are_spread_over_the_interval():
    """Eight endpoints come to leave no gap of half an interval; a stalled round does not count."""
    interval_seconds = 0.4
    async with AsyncExitStack() as stack:
        servers = [RawServer(replies(answer(PAGE))) for _ in range(8)]
        for server in servers:
            await stack.enter_async_context(server.listening())
        addresses = [server.address for server in servers]
        _, reports = await stack.enter_async_context(
            scraping(*addresses, interval_seconds=interval_seconds)
        )

        def spread():
            latest = {report.address: report.started_at for report in reports}
            phases = sorted(at % interval_seconds for at in latest.values())
            gaps = [
                after - before
                for before, after in pairwise([*phases, phases[0] + interval_seconds])
            ]
            return len(phases) == len(addresses) and max(gaps) < interval_seconds / 2

        await until(lambda: reports and spread())


async def test_a_large_pool_is_scraped_less_often(monkeypatch):
    """The interval grows when all endpoints together would be too much."""
    monkeypatch.setattr(scraper_module, "MAX_SCRAPES_PER_SECOND", 5.0)
    async with (
        RawServer(replies(answer(PAGE))).listening() as one,
        RawServer(replies(answer(PAGE))).listening() as two,
        scraping(one.address, two.address, interval_seconds=0.01) as (_, reports),
    ):
        await until(lambda: len(reports) >= 5)

    times = [report.started_at for report in reports if report.address == reports[0].address]
    assert times[-1] - times[-2] > 0.2


async def test_a_failing_report_ends_the_scraper():
    """A bug in the receiver of reports is not swallowed."""

    def fail(_metrics) -> None:
        raise LookupError

    async with RawServer(replies(answer(PAGE))).listening() as server:
        scraper = Scraper(fail, interval_seconds=0.01)
        scraper.set_addresses(frozenset([server.address]))
        with pytest.raises(ExceptionGroup) as raised:
            await asyncio.wait_for(scraper.run(), 5)

    assert raised.group_contains(LookupError)


@pytest.mark.parametrize("interval_seconds", [0, -1, float("nan")])
def test_an_interval_must_be_above_0(interval_seconds):
    """The error says so."""
    with pytest.raises(ValueError, match="must be above 0"):
        Scraper(print, interval_seconds)


async def test_a_refused_scrape_is_told_as_evidence_against_the_endpoint():
    """Also one that says 503; a page that cannot be read proves nothing."""
    told = []
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = f"127.0.0.1:{unused.getsockname()[1]}"
        async with (
            RawServer(replies(answer(b"", status="503 No"))).listening() as failing,
            RawServer(replies(answer(b"nothing to read"))).listening() as unreadable,
            scraping(
                *(closed, failing.address, unreadable.address),
                report_failure=lambda address, refused: told.append((address, refused)),
            ) as (scraper, _),
        ):
            await until(lambda: len(set(told)) == 2 and scraper.failures["unparsable"] > 1)

    assert set(told) == {(closed, True), (failing.address, False)}


async def test_metrics_on_a_port_of_their_own_are_no_evidence():
    """That nothing listens there says nothing about the port that serves requests."""
    told = []
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        async with scraping(
            "127.0.0.1:1", report_failure=lambda *arguments: told.append(arguments)
        ) as (scraper, _):
            scraper.set_metrics(MetricsPlan(port=port))
            told.clear()
            failed = scraper.failures["connect"]
            await until(lambda: scraper.failures["connect"] > failed + 1)

    assert told == []
