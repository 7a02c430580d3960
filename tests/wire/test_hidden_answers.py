"""Real Envoys that show an answer's headers and hide its body, as gateways may."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import closing
from queue import Queue

import pytest
from envoy_process import Envoy
from ext_proc_peer import until

from forebay_control.plan import Plan
from forebay_epp import data_plane
from forebay_epp.core.terms import EndpointMetrics
from forebay_epp.data_plane import HEADERS_ONLY_SECONDS

STREAM = json.dumps({"model": "m", "stream": True})
HEADERS = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)


class Streaming:
    """A server that sends the headers of a stream of events at once, and the rest when it may."""

    def __init__(self) -> None:
        self._port: Queue[int] = Queue()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))
        self._thread.start()
        self.address = f"127.0.0.1:{self._port.get(timeout=10)}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"0\r\n\r\n")
        writer.write(HEADERS)
        await self._may_end.wait()
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        await writer.drain()
        writer.close()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._may_end, self._stopping = asyncio.Event(), asyncio.Event()
        async with await asyncio.start_server(self._serve, "127.0.0.1", 0) as server:
            self._port.put(server.sockets[0].getsockname()[1])
            await self._stopping.wait()

    def end_answers(self) -> None:
        self._loop.call_soon_threadsafe(self._may_end.set)

    def stop(self) -> None:
        self.end_answers()
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(10)


def skip_trailers(bootstrap: dict) -> None:
    """Show nothing behind the answer's headers."""
    (listener,) = bootstrap["static_resources"]["listeners"]
    filters = listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]
    (mode,) = (
        each["typed_config"]["processing_mode"]
        for each in filters
        if "processing_mode" in each["typed_config"]
    )
    mode["response_trailer_mode"] = "SKIP"


def scrape(epp, server) -> None:
    """Have the EPP read that nothing runs, and believe it for long."""

    def scraped(now):
        metrics = EndpointMetrics(server.address, 0, 0, 0.0, now, interval_seconds=10.0)
        epp.controller.observe(metrics, now)

    epp.ask(scraped)


@pytest.fixture
def server():
    server = Streaming()
    yield server
    server.stop()


@pytest.fixture
def patient(monkeypatch):
    """An EPP that takes a stream's end for that of the headers however busy the machine is."""
    monkeypatch.setattr(data_plane, "HEADERS_ONLY_SECONDS", 60.0)


@pytest.fixture
def epp(start, server):
    """An EPP that learns limits and has a page of its only server."""
    epp = start(plan=Plan(), endpoints=(server.address,))
    scrape(epp, server)
    return epp


@pytest.fixture
def answer(request, tmp_path, epp):
    """An answer whose headers have come, through an Envoy of this kind."""
    envoy = Envoy(tmp_path, epp.transport.port, request.param, response_body_mode="NONE")
    with closing(envoy.connect()) as connection:
        connection.request("POST", "/v1/chat/completions", STREAM)
        yield connection.getresponse()
    envoy.stop()


def slots(epp) -> tuple[int, int]:
    """Slots taken by requests whose ends will be seen, and slots taken at all."""
    (endpoint,) = epp.state().endpoints
    return endpoint.in_flight, endpoint.limit - endpoint.free


@pytest.mark.parametrize("answer", [lambda _: None], indirect=True)
def test_with_trailers_shown_the_end_of_the_answer_frees_the_slot(epp, server, answer):
    """The stream ends with the answer, which may take as long as it likes."""
    come_at = epp.ask(lambda now: now)
    until(lambda: epp.ask(lambda now: now) > come_at + HEADERS_ONLY_SECONDS)
    assert slots(epp) == (1, 1)

    server.end_answers()

    assert answer.read() == b"data: [DONE]\n\n"
    until(epp.idle)
    assert slots(epp) == (0, 0)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("answer", [skip_trailers], indirect=True)
def test_with_headers_alone_a_scrape_frees_the_slot(epp, server, answer):
    """The stream ends with the headers, which is no reason to send the next request."""
    until(epp.idle)
    assert slots(epp) == (0, 1)

    server.end_answers()
    assert answer.read() == b"data: [DONE]\n\n"
    assert slots(epp) == (0, 1)
    scrape(epp, server)

    assert slots(epp) == (0, 0)
