"""The /metrics page of an EPP.

Names, units and labels of every metric are declared here. Counting belongs in traffic.py and the
controller; this module only reads.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from aiohttp import web
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from forebay_control.plan import Mode
from forebay_epp.traffic import printable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping

    from prometheus_client.core import Metric

    from forebay_epp.core.terms import BandState, ControllerState, EndpointState, Outcome
    from forebay_epp.traffic import Histogram, ShadowCounts, Traffic

STATE_TIMEOUT_SECONDS = 1.0

_BAND_GAUGES: tuple[tuple[str, str, Callable[[BandState], float]], ...] = (
    ("forebay_queue_requests", "Requests that wait.", lambda band: band.requests),
    (
        "forebay_queue_size_bytes",
        "Memory that waiting requests hold.",
        lambda band: band.size_bytes,
    ),
    (
        "forebay_queue_oldest_seconds",
        "How long the oldest waiting request has waited.",
        lambda band: band.oldest_seconds,
    ),
)

_ENDPOINT_GAUGES: tuple[tuple[str, str, Callable[[EndpointState], float]], ...] = (
    (
        "forebay_in_flight_requests",
        "Requests dispatched to the endpoint and not yet completed.",
        lambda endpoint: endpoint.in_flight,
    ),
    (
        "forebay_endpoint_limit",
        "Requests the endpoint is taken to handle at once.",
        lambda endpoint: endpoint.limit,
    ),
    (
        "forebay_endpoint_free_slots",
        "Free slots of the endpoint.",
        lambda endpoint: endpoint.free,
    ),
    (
        "forebay_endpoint_out",
        "1 while the endpoint is left out because it fails.",
        lambda endpoint: endpoint.out,
    ),
    (
        "forebay_endpoint_metrics_fresh",
        "1 while the endpoint's own metrics are recent enough to count.",
        lambda endpoint: endpoint.fresh,
    ),
)


@dataclass(frozen=True, slots=True)
class ControlState:
    """The state of the connection between this EPP and its operator.

    Attributes:
        connected: whether there is a stream.
        stale: there has been none for so long that what runs may be out of date.
        source: where the plan in force came from: Live, File or Defaults.
        epoch: of the program in force; 0 for none.
        revision: likewise.
        sha256: of that program, as hex.
        answers: to programs, by "ack" or "nack".
        disk_failures: of keeping the last good program, by reason.
        pool_deleted: whether the operator has said that the pool is deleted.
    """

    connected: bool
    stale: bool
    source: str
    epoch: int
    revision: int
    sha256: str
    answers: Mapping[str, int]
    disk_failures: Mapping[str, int]
    pool_deleted: bool = False


def routes(
    ask_state: Callable[[], Awaitable[ControllerState]],
    traffic: Traffic,
    scrapes_failed: Mapping[str, int],
    control: Callable[[], ControlState | None],
) -> list[web.RouteDef]:
    """Return the route that answers GET /metrics.

    Args:
        ask_state: asks the controller for its state. When that takes too long the page goes out
            without queues and endpoints, because then the rest of it is what is needed.
        traffic: counters that the data-plane thread keeps updating.
        scrapes_failed: failed scrapes by cause; read again for every page.
        control: the connection to the operator; None without one.
    """
    page = _Page(traffic, scrapes_failed, control)
    registry = CollectorRegistry()
    registry.register(page)
    ProcessCollector(registry=registry)

    async def metrics(request: web.Request) -> web.Response:
        try:
            async with asyncio.timeout(STATE_TIMEOUT_SECONDS):
                page.state = await ask_state()
        except TimeoutError:
            page.state = None
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(registry), headers={"Content-Type": content_type})

    return [web.get("/metrics", metrics)]


class _Page(Collector):
    """Everything but process_*. `state` is set before each collection; None means unknown."""

    def __init__(
        self,
        traffic: Traffic,
        scrapes_failed: Mapping[str, int],
        control: Callable[[], ControlState | None],
    ) -> None:
        self.state: ControllerState | None = None
        self._control = control
        self._traffic = traffic
        self._scrapes_failed = scrapes_failed

    def collect(self) -> Iterator[Metric]:
        """Yield all families."""
        yield GaugeMetricFamily(
            "forebay_controller_responding",
            "1 when the data plane has answered for this page.",
            value=self.state is not None,
        )
        if self.state is not None:
            yield from self._queues(self.state)
            yield from _endpoints(self.state)
            yield from _observing(self.state)
        yield from _requests(self._traffic)
        yield from _shadow(self._traffic.shadow)
        yield from _streams(self._traffic)
        yield _counter(
            "forebay_scrapes_failed",
            "Scrapes of model servers that failed.",
            "cause",
            self._scrapes_failed,
        )
        yield _counter(
            "forebay_plan_reloads", "Plans offered.", "result", self._traffic.plan_reloads
        )
        if (control := self._control()) is not None:
            yield from _control(control)

    def _queues(self, state: ControllerState) -> Iterator[Metric]:
        for name, text, value_of in _BAND_GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=("pool", "band"))
            for band in state.bands:
                gauge.add_metric((printable(state.pool), printable(band.band)), value_of(band))
            yield gauge
        waiting: Counter[tuple[str, str]] = Counter()
        for band in state.bands:
            for flow in band.flows:
                if flow.requests and flow.model is not None:
                    waiting[printable(band.band), self._traffic.models.label(flow.model)] += (
                        flow.requests
                    )
        gauge = GaugeMetricFamily(
            "forebay_flow_queue_requests",
            "Waiting requests, by flow.",
            labels=("band", "model"),
        )
        for labels, requests in waiting.items():
            gauge.add_metric(labels, requests)
        yield gauge


def _endpoints(state: ControllerState) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "forebay_saturation",
        "How full the pool is; at or above 1: no free slot.",
        value=state.saturation,
    )
    yield GaugeMetricFamily(
        "forebay_prefix_index_blocks",
        "Blocks of prompts that endpoints are believed to have cached, once for each endpoint.",
        value=state.prefix_blocks,
    )
    for name, text, value_of in _ENDPOINT_GAUGES:
        gauge = GaugeMetricFamily(name, text, labels=("endpoint",))
        for endpoint in state.endpoints:
            gauge.add_metric((printable(endpoint.address),), value_of(endpoint))
        yield gauge


def _observing(state: ControllerState) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "forebay_observing",
        "1 while the plan only observes, and requests are sent at once.",
        value=state.mode is Mode.OBSERVE,
    )
    waiting = GaugeMetricFamily(
        "forebay_shadow_queue_requests",
        "Requests that would be waiting by the plan, in mode Observe, or by its shadow.",
        labels=("band",),
    )
    for band in state.shadow.bands if state.shadow is not None else ():
        waiting.add_metric((printable(band.band),), band.requests)
    yield waiting


def _shadow(counts: ShadowCounts) -> Iterator[Metric]:
    yield _outcomes(
        "forebay_shadow_requests",
        "Requests by what the plan, in mode Observe, or its shadow would have done.",
        counts.outcomes,
    )
    yield _histogram_by_band(
        "forebay_shadow_queue_wait_seconds",
        "Time that dispatched requests would have spent in the queue.",
        counts.waits,
    )
    for name, text, values in (
        ("forebay_shadow_waited_seconds", "Their sum, by model.", counts.waited),
        (
            "forebay_shadow_overtaken_requests",
            "Requests that would have been sent after one that came later.",
            counts.overtaken,
        ),
    ):
        counter = CounterMetricFamily(name, text, labels=("band", "model"))
        for (band, model), value in list(values.items()):
            counter.add_metric((printable(band), model), value)
        yield counter


def _control(state: ControlState) -> Iterator[Metric]:
    for name, text, value in (
        ("forebay_control_connected", "1 while the operator is connected.", state.connected),
        (
            "forebay_control_stale",
            "1 when the operator has been away for a minute or more.",
            state.stale,
        ),
        ("forebay_pool_deleted", "1 while the pool is deleted.", state.pool_deleted),
        ("forebay_program_epoch", "Epoch of the program in force.", state.epoch),
        ("forebay_program_revision", "Revision of the program in force.", state.revision),
    ):
        yield GaugeMetricFamily(name, text, value=value)
    program = GaugeMetricFamily(
        "forebay_program_info", "The program in force.", labels=("source", "sha256")
    )
    program.add_metric((state.source, state.sha256), 1)
    yield program
    yield _counter("forebay_programs", "Answers to programs.", "answer", state.answers)
    yield _counter(
        "forebay_last_good_failures",
        "Failures to keep or use the last good program.",
        "reason",
        state.disk_failures,
    )


def _requests(traffic: Traffic) -> Iterator[Metric]:
    yield _outcomes("forebay_requests", "Requests that have left flow control.", traffic.outcomes)
    yield _histogram_by_band(
        "forebay_queue_wait_seconds",
        "Time that requests spent in the queue.",
        traffic.waits,
    )
    yield _histogram_by_band(
        "forebay_predicted_wait_error_seconds",
        "By how much requests waited more or less than predicted.",
        traffic.wait_errors,
    )
    yield _histogram_by_band(
        "forebay_time_to_first_token_seconds",
        "Time from dispatch to the first chunk of a streamed answer.",
        traffic.first_tokens,
    )
    yield _histogram_by_band(
        "forebay_arrival_to_first_token_seconds",
        "Time from arrival to the first chunk of the answer: the wait included.",
        traffic.starts,
    )
    yield _histogram_by_band(
        "forebay_request_seconds",
        "Time from arrival to the end of the answer.",
        traffic.durations,
    )
    yield _counter(
        "forebay_responses", "Answers of model servers.", "status_class", traffic.responses
    )
    yield _counter(
        "forebay_endpoint_ejections",
        "Endpoints that were left out because they failed.",
        "cause",
        traffic.ejections,
    )
    yield _counter("forebay_prompt_tokens", "Prompt tokens.", "model", traffic.prompt_tokens)
    yield _counter(
        "forebay_completion_tokens",
        "Generated tokens, as usage tells.",
        "model",
        traffic.completion_tokens,
    )
    yield _counter(
        "forebay_estimated_completion_tokens",
        "Generated tokens of answers whose usage is not seen, by residency.",
        "model",
        traffic.estimated_tokens,
    )
    yield CounterMetricFamily(
        "forebay_request_body_bytes", "Request bodies read.", value=traffic.body_bytes
    )


def _streams(traffic: Traffic) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "forebay_streams_open", "ext_proc streams open now.", value=traffic.streams_open
    )
    yield CounterMetricFamily(
        "forebay_streams_opened", "ext_proc streams ever opened.", value=traffic.streams_opened
    )
    yield CounterMetricFamily(
        "forebay_streams_refused",
        "ext_proc streams refused beyond the limit.",
        value=traffic.streams_refused,
    )
    yield _counter(
        "forebay_observed_answers",
        "Answers in streams of their own: tied to their requests, or why not.",
        "stream",
        traffic.watches,
    )
    lag = HistogramMetricFamily(
        "forebay_loop_lag_seconds", "How late turns of the data-plane loop are."
    )
    lag.add_metric((), *_buckets(traffic.stalls))
    yield lag
    yield GaugeMetricFamily(
        "forebay_loop_lag_max_seconds",
        "The longest lag since the page was last read.",
        value=traffic.take_worst_stall(),
    )


def _counter(name: str, text: str, label: str, counts: Mapping[str, int]) -> Metric:
    counter = CounterMetricFamily(name, text, labels=(label,))
    for value, count in dict(counts).items():
        counter.add_metric((value,), count)
    return counter


def _outcomes(name: str, text: str, counts: Mapping[tuple[str, str, Outcome], int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=("band", "model", "outcome"))
    for (band, model, outcome), count in dict(counts).items():
        family.add_metric((printable(band), model, outcome.value), count)
    return family


def _histogram_by_band(name: str, text: str, histograms: Mapping[str, Histogram]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=("band",))
    for band, histogram in dict(histograms).items():
        family.add_metric((printable(band),), *_buckets(histogram))
    return family


def _buckets(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    """Return (upper bound, cumulative count) pairs and the sum."""
    bounds = (*map(str, histogram.bounds), "+Inf")
    counts = accumulate(list(histogram.counts))
    return list(zip(bounds, counts, strict=True)), histogram.total
