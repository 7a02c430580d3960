"""Envoy's connections to model servers, by the bootstrap of `forebay up`: real Envoy and EPP."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from envoy_process import Envoy
from ext_proc_peer import EPPThread
from loop_thread import LoopThread

from forebay_control.plan import Plan, SaturationMode, SaturationPlan

KEEP_ALIVE_SECONDS = 5.0  # uvicorn's, and so vLLM's, SGLang's and trtllm-serve's
REQUESTS = 100
PLAN = Plan(saturation=SaturationPlan(SaturationMode.CONCURRENCY, max_concurrency=REQUESTS))


class UvicornLike:
    """A model server that closes a connection that has been idle for 5 s, without a warning."""

    def __init__(self) -> None:
        self.closed_idle = 0
        self.answered = 0
        self.seen = 0
        self.resets = False
        self._thread = LoopThread()
        self.address = self._thread.listen(self._serve)

    async def _serve(self, reader, writer) -> None:
        try:
            while True:
                await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), KEEP_ALIVE_SECONDS)
                self.seen += 1
                if self.resets:
                    writer.transport.abort()
                    return
                await asyncio.sleep(0.2)  # so that requests sent together need a connection each
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
                self.answered += 1
        except TimeoutError:
            self.closed_idle += 1

    def stop_listening(self) -> None:
        self._thread.stop_listening()

    def stop(self) -> None:
        self._thread.stop()


@pytest.fixture
def server():
    server = UvicornLike()
    yield server
    server.stop()


@pytest.fixture
def envoy(tmp_path, server):
    epp = EPPThread("completion-queue", plan=PLAN, endpoints=(server.address,))
    envoy = Envoy(tmp_path, epp.transport.port)
    yield envoy
    envoy.stop()
    epp.stop()


def wave(envoy: Envoy, moments: list[float]) -> list[int]:
    """Send a request at each moment; return the statuses."""

    def ask(moment: float) -> int:
        time.sleep(max(0.0, moment - time.monotonic()))
        with closing(envoy.connect()) as connection:
            connection.request("GET", "/v1/models")
            response = connection.getresponse()
            response.read()
            return response.status

    with ThreadPoolExecutor(len(moments)) as threads:
        return list(threads.map(ask, moments))


def test_no_request_meets_a_connection_that_the_server_closes(envoy, server):
    """Envoy has closed idle connections by then; requests aimed at that moment are answered."""
    now = time.monotonic()
    first = wave(envoy, [now] * REQUESTS)
    idle_since = time.monotonic()
    aimed = [idle_since + 4.9 + 0.15 * number / REQUESTS for number in range(REQUESTS)]

    second = wave(envoy, aimed)

    assert set(first + second) == {200}
    assert (server.closed_idle, server.answered) == (0, 2 * REQUESTS)


def test_a_request_that_may_have_reached_a_server_is_not_sent_again(envoy, server):
    """The server reads it and resets the connection; doing it twice could do it twice."""
    server.resets = True

    status, _, _ = envoy.request(b'{"model": "m"}')

    assert (status, server.seen) == (503, 1)
    assert envoy.stat("cluster.model_servers.upstream_rq_retry") == 0


def test_a_connection_that_is_refused_is_tried_once_more(envoy, server):
    """No server has seen the request."""
    server.stop_listening()

    status, _, _ = envoy.request(b'{"model": "m"}')

    assert status == 503
    assert envoy.stat("cluster.model_servers.upstream_rq_retry") == 1
