"""Limits learned from other model servers: a real EPP behind a real Envoy under load.

The servers are simulated; they publish their load as the real ones do.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING

import aiohttp
import pytest
from control_driver import Driver
from control_peers import POOL, snapshot
from control_plane import EPPProcess
from envoy_process import Envoy
from ext_proc_peer import until
from loop_thread import LoopThread
from manifest_reading import pool_ref

from forebay_control import mapping
from forebay_epp.core.limits.adaptive import FIRST_WINDOW
from forebay_operator.planning import topology
from forebay_operator.resources import POLICY, FlowControlPolicy, read
from forebay_sim.hardware import PRESETS
from forebay_sim.metricspage import ENGINES
from forebay_sim.server import ServerSettings, serve

if TYPE_CHECKING:
    from forebay_control.v1 import control_pb2 as pb

HARDWARE = replace(PRESETS["plain"], max_num_seqs=16)
CLIENTS = 120
OTHER = {
    "path": "/stats",
    "running": 'requests{state="running"}',
    "waiting": 'requests{state="waiting"}',
    "kvCacheUsage": "cache_usage",
}


class Load:
    """Simulated servers by the kind of their page, and clients that keep the pool full."""

    def __init__(self, kinds) -> None:
        self._thread = LoopThread()
        self._runners = []
        self.addresses = self._thread.do(self._serve(kinds))
        self.statuses: set[int] = set()

    async def _serve(self, kinds) -> dict[str, str]:
        addresses = {}
        for kind in kinds:
            settings = ServerSettings(hardware=HARDWARE, metrics=kind)
            runner, port = await serve(settings, "127.0.0.1", 0)
            self._runners.append(runner)
            addresses[kind] = f"127.0.0.1:{port}"
        return addresses

    def start(self, port: int) -> None:
        self._clients = self._thread.submit(self._send(f"http://127.0.0.1:{port}/v1/completions"))

    async def _send(self, url: str) -> None:
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(CLIENTS):
                group.create_task(self._client(session, url))

    async def _client(self, session: aiohttp.ClientSession, url: str) -> None:
        body = {"model": "m", "prompt": "x", "max_tokens": 8}
        while True:
            async with session.post(url, json=body) as response:
                self.statuses.add(response.status)
                await response.read()

    def stop(self) -> None:
        self._clients.cancel()
        for runner in self._runners:
            self._thread.do(runner.cleanup())
        self._thread.stop()


@pytest.fixture
def driver():
    driver = Driver()
    yield driver
    driver.stop()


def program(load: Load, metrics: dict | None = None) -> pb.Snapshot:
    """The default plan with these model server metrics, as the operator plans them."""
    made = snapshot(30.0, POOL, *load.addresses.values())
    spec = {"targetRefs": [pool_ref("chat")]} | ({"modelServerMetrics": metrics} if metrics else {})
    policy = read(POLICY, {"metadata": {"name": "a"}, "spec": spec})
    assert isinstance(policy, FlowControlPolicy)
    plan = topology._metrics(policy.spec.model_server_metrics)
    if plan is not None:
        mapping.write(plan, made.plan.metrics)
    return made


def test_limits_are_learned_from_every_kind_of_server(driver, tmp_path):
    """Known ones at once; the other one's page counts when a policy names its series."""
    load = Load(ENGINES)
    epp = EPPProcess(tmp_path, "epp-0", "chat", driver.port)
    with contextlib.ExitStack() as stack:
        stack.callback(epp.end)
        driver.put(POOL, program(load))
        envoy = Envoy(tmp_path, epp.grpc)
        stack.callback(envoy.stop)
        load.start(envoy.http)
        stack.callback(load.stop)

        def endpoint(kind: str) -> dict:
            page = json.loads(epp.page("/debug/queues"))
            return next(e for e in page["endpoints"] if e["address"] == load.addresses[kind])

        for kind in ENGINES.keys() - {"other"}:
            until(lambda kind=kind: endpoint(kind)["limit"] > FIRST_WINDOW, 30)
            assert endpoint(kind)["fresh"]
        assert not endpoint("other")["fresh"]

        driver.put(POOL, program(load, OTHER))
        until(lambda: endpoint("other")["fresh"] and endpoint("other")["limit"] > FIRST_WINDOW, 30)

    assert load.statuses == {200}
