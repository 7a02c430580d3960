"""adapters/debug.py: /debug/queues for people on the same machine."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from forebay_epp.adapters import debug
from forebay_epp.core.terms import (
    BandState,
    ControllerState,
    EndpointState,
    FlowState,
)
from forebay_epp.loopback import is_loopback, refusal

STATE = ControllerState(
    pool="serving/chat",
    requests=4,
    size_bytes=4000,
    in_flight=8,
    saturation=1.25,
    draining=False,
    bands=(
        BandState("Sheddable", -100, 0, 0, 0.0, 0.0, draining=True, flows=()),
        BandState(
            *("Critical", 100, 4, 4000, 0.5, 3.0, False),
            (FlowState("chat\ud800", 1, 1000), FlowState("batch", 3, 3000)),
        ),
    ),
    endpoints=(EndpointState("10.0.0.1:8000", "pod-1", 8, 0, 8, 0, 8, 1, 0.9, fresh=True),),
)


def client_of(state, remote: str | None = None) -> TestClient:
    """A client of a server that believes its peer to be `remote`."""

    @web.middleware
    async def pretend(request, handler):
        return await handler(request.clone(remote=remote) if remote else request)

    app = web.Application(middlewares=[pretend])
    app.add_routes(debug.routes(state))
    return TestClient(TestServer(app))


async def state() -> ControllerState:
    """The controller's answer."""
    return STATE


async def test_shows_bands_by_priority_with_their_longest_flows_first():
    """The order is the order of dispatch."""
    async with client_of(state) as client:
        response = await client.get("/debug/queues")
        data = await response.json()

    assert response.status == 200
    assert [band["band"] for band in data["bands"]] == ["Critical", "Sheddable"]
    assert data["bands"][0]["flows"] == [
        {"model": "batch", "requests": 3, "size_bytes": 3000, "tenant": None},
        {"model": "chat\ud800", "requests": 1, "size_bytes": 1000, "tenant": None},
    ]
    assert data["bands"][1]["draining"] is True


async def test_shows_endpoints_and_saturation():
    """Everything that decides whether a request may leave."""
    async with client_of(state) as client:
        data = await (await client.get("/debug/queues")).json()

    assert data["saturation"] == 1.25
    assert data["endpoints"] == [
        {
            "address": "10.0.0.1:8000",
            "name": "pod-1",
            "in_flight": 8,
            "foreign": 0,
            "limit": 8,
            "free": 0,
            "running": 8,
            "waiting": 1,
            "kv_usage": 0.9,
            "fresh": True,
            "out": False,
            "cause": "",
            "trial_seconds": None,
        }
    ]


async def test_other_machines_are_refused():
    """The answer is an error in JSON, and the controller is not even asked."""
    asked = []

    async def counted() -> ControllerState:
        asked.append(1)
        return STATE

    async with client_of(counted, remote="10.1.2.3") as client:
        response = await client.get("/debug/queues", headers={"X-Forwarded-For": "127.0.0.1"})
        data = await response.json()

    assert response.status == 403
    assert "loopback" in data["error"]["message"]
    assert asked == []


async def test_a_data_plane_that_does_not_answer_is_an_error(monkeypatch):
    """The page does not hang with it."""
    monkeypatch.setattr(debug, "STATE_TIMEOUT_SECONDS", 0.05)

    async def never() -> ControllerState:
        return await asyncio.get_running_loop().create_future()

    async with client_of(never) as client:
        response = await client.get("/debug/queues")
        data = await response.json()

    assert response.status == 503
    assert "0.05 s" in data["error"]["message"]


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
def test_loopback_peers(peer):
    """All ways in which this machine's own address is written."""
    assert is_loopback(peer)


@pytest.mark.parametrize(
    "peer", [None, "", "10.0.0.1", "0.0.0.0", "::", "::ffff:10.0.0.1", "fe80::1", "localhost", "x"]
)
def test_other_peers(peer):
    """What is not an address at all is not loopback either."""
    assert not is_loopback(peer)


@pytest.mark.parametrize(
    "host", [None, "127.0.0.1:9090", "localhost", "LOCALHOST:1", "[::1]:80", "[::1]"]
)
def test_hosts_of_this_machine(host):
    """What a browser or curl sends for a page here, or for a forwarded port."""
    assert refusal("127.0.0.1", host) is None


@pytest.mark.parametrize("host", ["evil.example:9090", "10.0.0.1", "localhost.evil.example"])
def test_names_that_resolve_to_loopback_are_refused(host):
    """A page of another site cannot read ours by DNS rebinding."""
    assert "localhost" in refusal("127.0.0.1", host)
