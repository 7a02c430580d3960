"""Asks every model server of the pool for its metrics, several times a second.

How a page is fetched (fetching.py), what it means (codec/metricstext.py) and when silence makes
metrics stale (the core) do not belong here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from forebay_control.plan import MetricsPlan
from forebay_epp.codec.metricstext import engines, parse_page
from forebay_epp.core.terms import EndpointMetrics
from forebay_epp.fetching import (
    CAUSES,
    FetchError,
    cause,
    fetch,
    open_session,
    refused,
    text,
    unserved,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp import ClientSession

MAX_SCRAPES_PER_SECOND = 200.0  # of all endpoints together: half a millisecond of CPU each
PATHS = ("/metrics", "/prometheus/metrics")  # the second is trtllm-serve's

# Consecutive multiples of it, modulo 1, are spread evenly however many there are.
_GOLDEN_RATIO = 0.618033988749895

_log = logging.getLogger(__name__)


class Scraper:
    """Scrapes the metrics page of each current endpoint once per interval.

    Where the plan names no path, the first of `PATHS` that has the load is kept until it fails.

    Each endpoint has its own task and its own moment within the interval, so that one that hangs
    delays no other, and all of them together make an even load. At most one request is in flight
    per endpoint; a slow one skips turns. In a pool so large that this would be more than
    `MAX_SCRAPES_PER_SECOND` the interval grows.

    Args:
        report: called in the event loop with every page that shows running and waiting requests.
        interval_seconds: between the starts of two scrapes of one endpoint.
        clock: monotonic seconds, for `EndpointMetrics.started_at`.
        report_failure: called in the event loop with the endpoint of every scrape that shows the
            endpoint itself to fail, and whether even the connection was refused. A page elsewhere
            than on the endpoint's own port shows nothing of that, and neither does one that is
            slow or cannot be read.

    Attributes:
        failures: scrapes that failed, by cause; all of `CAUSES` exist from the start.

    Raises:
        ValueError: the interval is not above 0.
    """

    def __init__(
        self,
        report: Callable[[EndpointMetrics], None],
        interval_seconds: float = 0.2,
        clock: Callable[[], float] = time.monotonic,
        report_failure: Callable[[str, bool], None] = lambda _address, _refused: None,
    ) -> None:
        if not interval_seconds > 0:
            raise ValueError(f"scrape interval must be above 0 s, is {interval_seconds}")
        self.failures = dict.fromkeys(CAUSES, 0)
        self._report = report
        self._report_failure = report_failure
        self._interval = interval_seconds
        self._clock = clock
        self._addresses: frozenset[str] = frozenset()
        self._failing: set[str] = set()
        self._metrics = MetricsPlan()
        self._engines = engines(self._metrics)
        self._paths: dict[str, str] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._running: tuple[ClientSession, asyncio.TaskGroup] | None = None
        self._phase = 0.0

    def set_addresses(self, addresses: frozenset[str]) -> None:
        """Scrape these endpoints (ip:port) from now on and no others.

        To be called in the thread of the event loop; before `run` it is kept for then.
        """
        self._addresses = addresses
        if self._running is not None:
            self._follow_addresses(*self._running)

    def set_metrics(self, metrics: MetricsPlan) -> None:
        """Look for the load there from the next scrape on; in the thread of the event loop."""
        if metrics != self._metrics:
            self._metrics = metrics
            self._engines = engines(metrics)
            self._paths.clear()

    async def run(self) -> None:
        """Scrape until cancelled.

        Raises:
            ExceptionGroup: `report` raised.
        """
        async with (
            open_session() as session,
            asyncio.TaskGroup() as group,
        ):
            self._running = session, group
            self._follow_addresses(session, group)
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                self._running = None
                self._tasks.clear()
                self._failing.clear()

    def _follow_addresses(self, session: ClientSession, group: asyncio.TaskGroup) -> None:
        for address in self._tasks.keys() - self._addresses:
            self._tasks.pop(address).cancel()
            self._failing.discard(address)
            self._paths.pop(address, None)
        for address in sorted(self._addresses - self._tasks.keys()):
            self._phase = (self._phase + _GOLDEN_RATIO) % 1.0
            watch = self._watch(session, address, self._phase)
            self._tasks[address] = group.create_task(watch, name=f"scrape {address}")

    async def _watch(self, session: ClientSession, address: str, phase: float) -> None:
        """Scrape one endpoint until cancelled; `phase` is its offset 0-1 within the interval."""
        now = asyncio.get_running_loop().time
        while True:
            interval = self._current_interval()
            await asyncio.sleep(interval - (now() - phase * interval) % interval)
            try:
                metrics = await self._scrape(session, address)
            except Exception as error:  # any error that a server provokes: ask it again
                self._failed(address, error)
            else:
                self._succeeded(address)
                self._report(metrics)

    def _current_interval(self) -> float:
        return max(self._interval, len(self._tasks) / MAX_SCRAPES_PER_SECOND)

    async def _scrape(self, session: ClientSession, address: str) -> EndpointMetrics:
        metrics, known = self._metrics, self._paths.pop(address, "")
        failures = []
        for path in (metrics.path,) if metrics.path else (known,) if known else PATHS:
            started_at = self._clock()
            try:
                url = _url(address, metrics.port, path)
                page = self._read(address, await fetch(session, url, "text/plain"), started_at)
            except FetchError as error:
                if not error.missing:
                    raise
                failures.append(error)
                continue
            if metrics is self._metrics and address in self._tasks:
                self._paths[address] = path
            return page
        raise failures[0]

    def _read(self, address: str, page_text: bytes, started_at: float) -> EndpointMetrics:
        """Return what the page says.

        Raises:
            FetchError: it does not show running and waiting.
        """
        page = parse_page(page_text, self._engines)
        if page.running is None or page.waiting is None:
            what = "the page does not show running and waiting requests"
            raise FetchError("unparsable", what, missing=True)
        return EndpointMetrics(
            address,
            page.running,
            page.waiting,
            page.kv_usage,
            started_at,
            self._current_interval(),
            page.steps,
            page.step_tokens,
            page.kv_capacity_tokens,
            page.prefix_hits,
            page.answer_tokens,
        )

    def _failed(self, address: str, error: Exception) -> None:
        why = cause(error)
        self.failures[why] += 1
        if (refused(error) or unserved(error)) and not self._metrics.port:
            self._report_failure(address, refused(error))
        if address not in self._failing:
            self._failing.add(address)
            _log.warning(
                "scraping the endpoint's metrics fails; its load is unknown",
                extra={"endpoint": address, "cause": why, "error": text(error)},
            )

    def _succeeded(self, address: str) -> None:
        if address in self._failing:
            self._failing.discard(address)
            _log.info("scraping the endpoint's metrics works again", extra={"endpoint": address})


def _url(address: str, port: int, path: str) -> str:
    """Return where an endpoint's page is; port 0 is the endpoint's own."""
    host, _, own_port = address.rpartition(":")
    return f"http://{host}:{port or own_port}{path}"
