"""The operator's pages: who may see them."""

from __future__ import annotations

import time

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client.parser import text_string_to_metric_families

from forebay_operator import pages
from forebay_operator.channel.server import ControlServer
from forebay_operator.channel.trust import unauthenticated
from forebay_operator.cluster.store import Store
from forebay_operator.reconcile.planner import Planner
from forebay_operator.reconcile.statuses import Statuses


def client_of(remote: str) -> TestClient:
    """A client of an operator that knows nothing yet and believes its peer to be `remote`."""

    @web.middleware
    async def pretend(request, handler):
        return await handler(request.clone(remote=remote))

    control = ControlServer(unauthenticated, lambda _: None, lambda *_: None)
    store = Store()
    app = web.Application(middlewares=[pretend])
    statuses = Statuses(store, Planner(store, control, None), None)
    app.add_routes(pages.routes(statuses, store, time.monotonic, lambda: ""))
    return TestClient(TestServer(app))


@pytest.mark.parametrize("remote", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
async def test_resources_are_shown_on_loopback(remote):
    """That is where kubectl port-forward comes from there."""
    async with client_of(remote) as client:
        response = await client.get("/resources")

        assert (response.status, await response.json()) == (200, {"items": []})


@pytest.mark.parametrize("remote", ["10.1.2.3", "::ffff:10.1.2.3", "fe80::1", ""])
async def test_resources_are_not_shown_to_other_pods(remote):
    """They name objects of every namespace; what a proxy says of its client does not count."""
    async with client_of(remote) as client:
        response = await client.get("/resources", headers={"X-Forwarded-For": "127.0.0.1"})

        assert response.status == 403
        assert "port-forward" in await response.text()


async def test_probes_and_metrics_are_for_whoever_reaches_them():
    """The kubelet and Prometheus are not on loopback."""
    async with client_of("10.1.2.3") as client:
        for path in ("/livez", "/readyz"):
            assert (await client.get(path)).status == 200
        page = await (await client.get("/metrics")).text()

    names = {family.name for family in text_string_to_metric_families(page)}
    assert "forebay_control_refusals" in names
