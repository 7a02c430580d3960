"""adapters/prometheus.py: the /metrics page, read back with Prometheus's own parser."""

from __future__ import annotations

import asyncio
import re
import sys
import threading
from dataclasses import replace

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from observed import complete, decide, request
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families

from forebay_control.plan import Mode
from forebay_epp.adapters import prometheus
from forebay_epp.codec.callers import SILENT
from forebay_epp.codec.extproc.events import Arrived
from forebay_epp.core.terms import (
    BandState,
    ControllerState,
    Dispatched,
    EndpointState,
    FlowState,
    Outcome,
    Request,
    Shadowed,
)
from forebay_epp.traffic import MAX_MODEL_LABELS, OTHER_MODEL, Traffic

STATE = ControllerState(
    pool="serving/chat",
    requests=5,
    size_bytes=5000,
    in_flight=8,
    saturation=1.25,
    draining=False,
    bands=(
        BandState(
            *("Critical", 100, 2, 2000, 0.5, 3.0, False),
            (FlowState("chat", 2, 2000), FlowState("idle", 0, 0)),
        ),
        BandState(*("Standard", 0, 3, 3000, 1.5, 4.0, False), (FlowState("batch", 3, 3000),)),
    ),
    endpoints=(
        EndpointState("10.0.0.1:8000", "pod-1", 8, 0, 8, 0, 8, 1, 0.9, fresh=True),
        EndpointState("10.0.0.2:8000", "pod-2", 0, 0, 4, 4, 0, 0, None, fresh=False),
    ),
)


async def read(
    traffic: Traffic | None = None,
    state: ControllerState = STATE,
    scrapes_failed: dict[str, int] | None = None,
    accept: str = "",
    times: int = 1,
    control: prometheus.ControlState | None = None,
) -> str:
    """The text of the page, from a real server."""

    async def ask_state() -> ControllerState:
        return state

    app = web.Application()
    app.add_routes(
        prometheus.routes(ask_state, traffic or Traffic(), scrapes_failed or {}, lambda: control)
    )
    async with TestClient(TestServer(app)) as client:
        for _ in range(times):
            response = await client.get("/metrics", headers={"Accept": accept})
            text = await response.text()

            assert response.status == 200
    return text


def samples(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    """Values by sample name and label values (in the order of label names), each once."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            series = found.setdefault(sample.name, {})
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            assert labels not in series, f"{sample.name}{sample.labels} is duplicated"
            series[labels] = sample.value
    return found


def busy_traffic() -> Traffic:
    """Counters of everything."""
    traffic = Traffic()
    traffic.configure(["chat"])
    decide(traffic, "Critical", "chat", Outcome.DISPATCHED, 0.02)
    decide(traffic, "Critical", "chat", Outcome.DISPATCHED, 100.0)
    traffic.answered(1, Outcome.REJECTED_BAD_REQUEST, 0.0)
    traffic.first_token(request("Critical"), 0.25)
    complete(traffic, "Critical", "chat", 200, 2.0, 100, 50)
    traffic.stream_opened()
    traffic.stalled(0.003)
    traffic.arrived(1, Arrived("chat", 1234, None, SILENT, None), 0.0)
    traffic.plan_reloaded(ok=True)
    return traffic


async def test_publishes_the_queues_of_each_band():
    """Length, bytes and age by band and pool."""
    page = samples(await read())

    assert page["forebay_queue_requests"] == {
        ("Critical", "serving/chat"): 2,
        ("Standard", "serving/chat"): 3,
    }
    assert page["forebay_queue_size_bytes"]["Critical", "serving/chat"] == 2000
    assert page["forebay_queue_oldest_seconds"]["Standard", "serving/chat"] == 1.5


async def test_publishes_flows_that_have_requests():
    """An idle flow has no series."""
    traffic = Traffic()
    traffic.configure(["chat", "batch"])
    page = samples(await read(traffic))

    assert page["forebay_flow_queue_requests"] == {
        ("Critical", "chat"): 2,
        ("Standard", "batch"): 3,
    }


async def test_publishes_the_endpoints():
    """Slots, and whether their own metrics count."""
    page = samples(await read())
    one, two = ("10.0.0.1:8000",), ("10.0.0.2:8000",)

    assert page["forebay_in_flight_requests"] == {one: 8, two: 0}
    assert page["forebay_endpoint_limit"] == {one: 8, two: 4}
    assert page["forebay_endpoint_free_slots"] == {one: 0, two: 4}
    assert page["forebay_endpoint_metrics_fresh"] == {one: 1, two: 0}
    assert page["forebay_saturation"] == {(): 1.25}


async def test_publishes_the_traffic():
    """Outcomes, times, answers, tokens, bytes and streams."""
    page = samples(await read(busy_traffic()))

    assert page["forebay_requests_total"] == {
        ("Critical", "chat", "Dispatched"): 2,
        ("", "", "RejectedBadRequest"): 1,
    }
    assert page["forebay_queue_wait_seconds_count"] == {("Critical",): 2}
    assert page["forebay_queue_wait_seconds_sum"] == {("Critical",): 100.02}
    assert page["forebay_time_to_first_token_seconds_count"] == {("Critical",): 1}
    assert page["forebay_request_seconds_count"] == {("Critical",): 1}
    assert page["forebay_responses_total"] == {("2xx",): 1}
    assert page["forebay_prompt_tokens_total"] == {("chat",): 100}
    assert page["forebay_completion_tokens_total"] == {("chat",): 50}
    assert page["forebay_request_body_bytes_total"] == {(): 1234}
    assert page["forebay_streams_open"] == {(): 1}
    assert page["forebay_streams_opened_total"] == {(): 1}
    assert page["forebay_streams_refused_total"] == {(): 0}
    assert page["forebay_plan_reloads_total"] == {("taken",): 1, ("refused",): 0}


async def test_publishes_what_a_plan_that_observes_would_do():
    """Outcomes, waits, overtaken requests, and what would wait now."""
    traffic = Traffic()
    traffic.configure(["chat"])
    late = Request(1, "chat", 1, band="Standard", flow="chat")
    traffic.shadowed(Shadowed(late, Dispatched(1, "10.0.0.1:8000", 2.5), overtaken=True))
    observing = replace(STATE, mode=Mode.OBSERVE, shadow=STATE)

    page = samples(await read(traffic, observing))

    chat = ("Standard", "chat")
    assert page["forebay_observing"] == {(): 1}
    assert page["forebay_shadow_queue_requests"] == {("Critical",): 2, ("Standard",): 3}
    assert page["forebay_shadow_requests_total"] == {(*chat, "Dispatched"): 1}
    assert page["forebay_shadow_queue_wait_seconds_sum"] == {("Standard",): 2.5}
    assert page["forebay_shadow_waited_seconds_total"] == {chat: 2.5}
    assert page["forebay_shadow_overtaken_requests_total"] == {chat: 1}
    assert samples(await read())["forebay_observing"] == {(): 0}


async def test_histogram_buckets_are_cumulative_and_end_in_infinity():
    """A value above every bound is only in the last bucket."""
    page = samples(await read(busy_traffic()))
    buckets = page["forebay_queue_wait_seconds_bucket"]

    assert buckets["Critical", "0.01"] == 0
    assert buckets["Critical", "0.025"] == 1
    assert buckets["Critical", "60.0"] == 1
    assert buckets["Critical", "+Inf"] == 2


async def test_publishes_failed_scrapes_by_cause():
    """What the scraper counts stands there under its own name."""
    page = samples(await read(scrapes_failed={"timeout": 3, "connect": 0}))

    assert page["forebay_scrapes_failed_total"] == {("timeout",): 3, ("connect",): 0}


async def test_the_worst_lag_is_since_the_page_was_last_read():
    """The histogram keeps what the gauge forgets."""
    traffic = busy_traffic()
    first = samples(await read(traffic))
    second = samples(await read(traffic))

    assert first["forebay_loop_lag_max_seconds"] == {(): 0.003}
    assert second["forebay_loop_lag_max_seconds"] == {(): 0}
    assert second["forebay_loop_lag_seconds_count"] == {(): 1}


async def test_publishes_the_process():
    """Memory, CPU and open files come with prometheus_client."""
    page = samples(await read())

    assert page["process_resident_memory_bytes"][()] > 1e6
    assert "process_cpu_seconds_total" in page


async def test_names_follow_the_conventions():
    """Lower case, our prefix, base units, and a text and a type for each."""
    families = list(text_string_to_metric_families(await read(busy_traffic())))
    own = [family for family in families if not family.name.startswith("process_")]

    assert len(own) > 20
    for family in own:
        assert re.fullmatch(r"forebay_[a-z]+(_[a-z]+)*", family.name)
        assert family.documentation.endswith(".")
        assert family.type in {"counter", "gauge", "histogram"}
        assert not re.search(r"milli|_ms$|_kb|_percent", family.name)


async def test_speaks_openmetrics_to_those_who_ask():
    """Prometheus asks for it first."""
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    text = await read(busy_traffic(), accept=accept)

    assert text.endswith("# EOF\n")
    assert list(openmetrics_parser.text_string_to_metric_families(text))


async def test_reading_twice_gives_each_series_once():
    """A page does not pile up what the pages before it had."""
    assert samples(await read(busy_traffic(), times=3))


async def test_flows_beyond_the_cap_are_summed():
    """Four thousand flows give a hundred series and one for the rest."""
    flows = tuple(FlowState(f"flow-{number}", 1, 10) for number in range(4_000))
    state = replace(STATE, bands=(replace(STATE.bands[0], flows=flows),))
    traffic = Traffic()
    traffic.configure(flow.model for flow in flows)
    series = samples(await read(traffic, state))["forebay_flow_queue_requests"]

    assert len(series) == MAX_MODEL_LABELS + 1
    assert series["Critical", OTHER_MODEL] == 4_000 - MAX_MODEL_LABELS


@pytest.mark.parametrize("name", ["\ud800", 'a"b\\c\nd', "x" * 1_000_000, "ä€😀", "\x00", "{}="])
async def test_any_name_leaves_the_page_readable(name):
    """Names of bands, models, flows and endpoints may be anything."""
    traffic = Traffic()
    traffic.configure([name])
    decide(traffic, name, name, Outcome.DISPATCHED, 0.1)
    complete(traffic, name, name, 200, 1.0, 1, 1)
    band = replace(STATE.bands[0], band=name, flows=(FlowState(name, 1, 1),))
    endpoint = replace(STATE.endpoints[0], address=name)
    text = await read(traffic, replace(STATE, pool=name, bands=(band,), endpoints=(endpoint,)))

    assert len(text) < 100_000
    assert len(samples(text)["forebay_requests_total"]) == 1


async def test_without_an_answer_of_the_controller_the_rest_is_published(monkeypatch):
    """When the data plane hangs, its lag is what one looks for."""
    monkeypatch.setattr(prometheus, "STATE_TIMEOUT_SECONDS", 0.05)

    async def never() -> ControllerState:
        return await asyncio.get_running_loop().create_future()

    app = web.Application()
    app.add_routes(prometheus.routes(never, busy_traffic(), {}, lambda: None))
    async with TestClient(TestServer(app)) as client:
        page = samples(await (await client.get("/metrics")).text())

    assert page["forebay_controller_responding"] == {(): 0}
    assert "forebay_queue_requests" not in page
    assert page["forebay_loop_lag_seconds_count"] == {(): 1}


async def test_pages_can_be_read_while_another_thread_counts():
    """New bands, models and outcomes appear in the middle of it."""
    traffic = Traffic()
    stop = threading.Event()

    def count() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            band, model = f"band-{number % 300}", f"model-{number}"
            traffic.configure([model])
            decide(traffic, band, model, Outcome.DISPATCHED, 0.01)
            complete(traffic, band, model, number % 600, 0.1, 1, 1)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    thread = threading.Thread(target=count)
    thread.start()
    try:
        text = await read(traffic, times=5)
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)

    assert samples(text)["forebay_requests_total"]
