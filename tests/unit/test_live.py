"""adapters/live: what the live page is sent, and who gets it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import given
from hypothesis import strategies as st

from forebay_control.plan import Plan
from forebay_epp.adapters import live
from forebay_epp.adapters.live import report as live_report
from forebay_epp.adapters.live.history import History, quantile
from forebay_epp.adapters.live.report import (
    MAX_ENDPOINTS,
    MAX_FLOWS,
    PolicyInForce,
    describe,
)
from forebay_epp.core.terms import (
    BandState,
    ControllerState,
    Dispatched,
    EndpointState,
    FlowState,
    Outcome,
    Refused,
    Request,
    Shadowed,
)
from forebay_epp.traffic import Traffic

PAGE = (Path(live.__file__).parent / "page.html").read_text()


def state(flows: int = 0, endpoints: int = 0, name: str = "t") -> ControllerState:
    """A pool with so many flows in its one band, the longest last, and so many endpoints."""
    states = tuple(FlowState("m", n + 1, 0, f"{name}{n}") for n in range(flows))
    waiting = sum(flow.requests for flow in states)
    return ControllerState(
        *("serving/chat", waiting, 0, 0, 1.0, False),
        (BandState("Critical", 100, waiting, 0, 1.0, 2.0, False, states, flows),),
        tuple(
            EndpointState(f"10.0.{n >> 8}.{n & 255}:80", "", 1, 0, 2, 1, 1, 0, None, True)
            for n in range(endpoints)
        ),
    )


def described(of: ControllerState, traffic: Traffic | None = None) -> dict:
    return describe(of, PolicyInForce(), History(traffic or Traffic()), None)


def test_a_plan_beside_the_traffic_is_shown_by_band_and_model():
    """Those first that would wait longest; nothing where there is none."""
    traffic = Traffic()
    traffic.configure(["fast", "slow"])
    for number, (model, seconds) in enumerate([("fast", 1.0), ("slow", 4.0), ("slow", 8.0)]):
        request = Request(number, model, 1, band="Critical", flow=model)
        traffic.shadowed(Shadowed(request, Dispatched(number, "a", seconds), number == 2))
    request = Request(9, "fast", 1, band="Critical", flow="fast")
    full = Refused(9, Outcome.REJECTED_QUEUE_FULL, 1, 0.0, "full")
    traffic.shadowed(Shadowed(request, full, overtaken=False))

    data = described(replace(state(), shadow=state(flows=2)), traffic)

    assert described(state(), traffic)["shadow"] is None
    assert data["observes"] is False
    assert data["shadow"] == {
        "bands": [{"band": "Critical", "requests": 3}],
        "rows": [
            {
                "band": "Critical",
                "model": "slow",
                "sent": 2,
                "refused": 0,
                "overtaken": 1,
                "mean_wait_seconds": 6.0,
            },
            {
                "band": "Critical",
                "model": "fast",
                "sent": 1,
                "refused": 1,
                "overtaken": 0,
                "mean_wait_seconds": 1.0,
            },
        ],
        "other_rows": 0,
    }


def client_of(report=None, *, remote: str | None = None, to_all: bool = False) -> TestClient:
    """A client of a server that believes its peer to be `remote`."""

    async def empty() -> dict[str, object]:
        return {"pool": "serving/chat"}

    @web.middleware
    async def pretend(request, handler):
        return await handler(request.clone(remote=remote) if remote else request)

    app = web.Application(middlewares=[pretend])
    app.add_routes(live.routes(report or empty, to_all=to_all))
    return TestClient(TestServer(app))


@pytest.mark.parametrize("path", ["/live", "/live/state", "/live/events"])
async def test_other_machines_are_refused_unless_asked(path):
    """Each of the three names models and tenants, or leads to what does."""
    async with client_of(remote="10.1.2.3") as client:
        assert (await client.get(path)).status == 403
    async with client_of(remote="10.1.2.3", to_all=True) as client:
        assert (await client.get(path)).status == 200


async def test_a_name_of_another_site_is_refused():
    """A web page cannot have its own name resolve to loopback and read the state."""
    async with client_of() as client:
        response = await client.get("/live/state", headers={"Host": "evil.example"})

    assert response.status == 403


async def test_each_event_has_the_state():
    """As server-sent events, in one line of JSON each."""
    async with client_of() as client:
        response = await client.get("/live/events")
        line = await response.content.readline()

    assert response.content_type == "text/event-stream"
    assert json.loads(line.removeprefix(b"data: ")) == {"pool": "serving/chat"}


async def test_two_viewers_cost_one_report_an_event():
    """Whatever one has cost the data plane, the second costs nothing."""
    reports = []

    async def report() -> dict[str, object]:
        reports.append(1)
        return {}

    async with client_of(report) as client:
        first = await client.get("/live/events")
        second = await client.get("/live/events")
        await first.content.readline()
        await second.content.readline()

        assert len(reports) <= 2


async def test_there_is_a_limit_of_viewers(monkeypatch):
    """One more is told so."""
    monkeypatch.setattr(live, "MAX_VIEWERS", 1)
    async with client_of() as client:
        first = await client.get("/live/events")
        await first.content.readline()
        assert (await client.get("/live/events")).status == 503


async def test_a_data_plane_that_does_not_answer_is_reported():
    """To a viewer as an event, to a program as 503."""

    async def late() -> dict[str, object]:
        raise TimeoutError

    async with client_of(late) as client:
        assert (await client.get("/live/state")).status == 503
        assert await (await client.get("/live/events")).content.readline() == b"event: late\n"


def test_the_page_has_no_foreign_parts_and_never_reads_text_as_html():
    """Nothing is loaded from anywhere, and no sink of HTML is used."""
    assert not re.search(r"https?://|//\w+\.\w|@import|url\(", PAGE)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", PAGE)


async def test_the_policy_allows_the_pages_own_parts_only():
    """No part of it is unsafe, and nothing else may be loaded."""
    async with client_of() as client:
        policy = (await client.get("/live")).headers["Content-Security-Policy"]

    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert "require-trusted-types-for 'script'" in policy


def test_ten_thousand_flows_and_a_thousand_endpoints_are_a_few_kilobytes():
    """The longest flows and the fullest endpoints by name, the rest as sums."""
    data = described(state(flows=10_000, endpoints=1000))
    (band,) = data["bands"]

    assert len(json.dumps(data)) < 25_000
    assert [flow["requests"] for flow in band["flows"]] == list(
        range(10_000, 10_000 - MAX_FLOWS, -1)
    )
    assert band["other_flows"] == 10_000 - MAX_FLOWS
    assert (
        band["other_requests"] + sum(flow["requests"] for flow in band["flows"]) == band["requests"]
    )
    assert len(data["endpoints"]) == MAX_ENDPOINTS
    assert data["other_endpoints"] == {"count": 936, "taken": 936, "limit": 1872}


def test_names_are_as_long_as_labels_of_metrics():
    """A tenant is what a caller writes into a header."""
    data = described(state(flows=1, name="x" * 5000 + "\ud800"))

    assert len(data["bands"][0]["flows"][0]["tenant"]) == 128


def test_refusals_count_what_was_refused_by_band():
    """Over all models; a client that has gone was not refused."""
    traffic = Traffic()
    request = Request(1, "m", 1, band="Critical")
    for outcome in (Outcome.EVICTED_TTL, Outcome.EVICTED_TTL, Outcome.EVICTED_CANCELLED):
        traffic.decided(request, Refused(1, outcome, 1, 0.0, ""), 0.0)

    assert described(state(), traffic)["refusals"] == [
        {"band": "Critical", "outcome": "EvictedTTL", "now": 2, "ten_minutes": 2, "total": 2}
    ]


def test_a_plan_that_is_sent_again_has_not_changed(monkeypatch):
    """Only another one counts as a change."""
    monkeypatch.setattr(live_report.time, "time", iter((100.0, 200.0)).__next__)
    policy = PolicyInForce()
    for pool in ("a", "a", "b"):
        policy.reconfigured(Plan(pool))
        if pool == "a":
            assert policy.changed_at == 100.0

    assert policy.changed_at == 200.0


def test_history_forgets_what_is_older_than_ten_minutes():
    """Refusals of long ago are in the total only."""
    traffic = Traffic()
    history = History(traffic)
    start = history.before(0.0, 0.0).at
    traffic.answered(1, Outcome.REJECTED_BAD_REQUEST, 0.0)
    for second in range(0, 700, 5):
        history.sample(start + second)

    assert history.before(start + 695, 600).refusals == {("", "RejectedBadRequest"): 1}
    assert start + 90 <= history.before(start + 695, 600).at <= start + 95


@given(st.lists(st.floats(0.0, 9.9), min_size=1), st.sampled_from([0.5, 0.99, 1.0]))
def test_a_quantile_is_in_the_bucket_of_the_real_one(values, part):
    """As near as a histogram can tell."""
    bounds = (1.0, 2.0, 5.0, 10.0)
    counts = [0] * 5
    for value in values:
        counts[next(i for i, bound in enumerate(bounds) if value <= bound)] += 1
    real = sorted(values)[max(0, -(-len(values) * part // 1).__trunc__() - 1)]
    lower = max((bound for bound in (0.0, *bounds) if bound < real), default=0.0)

    found = quantile(bounds, counts, [], part)

    assert lower <= found <= next(bound for bound in bounds if real <= bound)


def test_a_quantile_of_nothing_new_is_none():
    """What was counted before does not count."""
    assert quantile((1.0,), [3, 1], [3, 1], 0.5) is None
