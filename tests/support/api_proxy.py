"""A reverse proxy in front of a real API server that breaks answers as networks and servers do.

Plain HTTP on loopback towards the client; everything else goes through unchanged.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import aiohttp
from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Answer = Callable[[web.Request], Awaitable[web.StreamResponse | None]]

_HOP = {"host", "transfer-encoding", "content-length", "content-encoding", "connection"}


def status_answer(code: int, reason: str, **headers: str) -> Answer:
    """Answer with a Status object, as an API server words its errors."""

    async def answer(_: web.Request) -> web.StreamResponse:
        body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code}
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.json_response({**body, "reason": reason}, status=code, headers=names)

    return answer


def cut_answer(text: bytes) -> Answer:
    """Answer with what is no whole JSON."""

    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(body=text, content_type="application/json")

    return answer


def late(seconds: float) -> Answer:
    """Let the request through, but late."""

    async def answer(_: web.Request) -> None:
        await asyncio.sleep(seconds)

    return answer


def is_list(plural: str = "") -> Callable[[web.Request], bool]:
    """Match LISTs, of one kind or of all."""
    return lambda r: r.method == "GET" and "limit" in r.query and r.path.endswith(f"/{plural}")


def is_any_list(request: web.Request) -> bool:
    return request.method == "GET" and "limit" in request.query


def is_watch(request: web.Request) -> bool:
    return request.query.get("watch") == "true"


def is_status(request: web.Request) -> bool:
    return request.method == "PATCH" and request.path.endswith("/status")


@dataclass
class _Rule:
    matches: Callable[[web.Request], bool]
    answer: Answer
    times: float


@dataclass
class Proxy:
    """The proxy, in a thread of its own.

    Attributes:
        seen: (monotonic seconds, method, path) of each request that a rule has broken.
    """

    upstream: str
    seen: list[tuple[float, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rules: list[_Rule] = []
        self._watches: dict[asyncio.Queue, web.Request] = {}
        self._deaf = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._up = threading.Event()
        self._thread.start()
        assert self._up.wait(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # What tests do

    def break_(
        self, matches: Callable[[web.Request], bool], answer: Answer, times: float = float("inf")
    ) -> Callable[[], None]:
        """Answer matching requests so, as often; return what ends it."""
        rule = _Rule(matches, answer, times)
        self._rules.append(rule)
        return lambda: self._rules.remove(rule)

    def deafen(self) -> None:
        """Swallow what watches deliver, until `end_watches`."""
        self._deaf = True

    def end_watches(self, line: bytes = b"") -> None:
        """Write a line into every open watch and end it; new ones deliver again."""
        asyncio.run_coroutine_threadsafe(self._end_watches(line), self._loop).result(10)

    def watches(self) -> int:
        return len(self._watches)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    # What it does

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        trust = ssl.create_default_context()
        trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
        connector = aiohttp.TCPConnector(ssl=trust, limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as self._session:
            app = web.Application(client_max_size=8 << 20)
            app.router.add_route("*", "/{path:.*}", self._handle)
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.port = runner.addresses[0][1]
            self._up.set()
            await self._stop.wait()
            await self._end_watches(b"")
            await runner.cleanup()
        await asyncio.sleep(0.25)  # aiohttp's advice: TLS connections close in the background

    async def _end_watches(self, line: bytes) -> None:
        self._deaf = False
        for queue in list(self._watches):
            queue.put_nowait(line)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        for rule in list(self._rules):
            if rule.times > 0 and rule.matches(request):
                rule.times -= 1
                self.seen.append((self._loop.time(), request.method, request.path))
                answer = await rule.answer(request)
                if answer is not None:
                    return answer
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _HOP}
        try:
            async with self._session.request(
                request.method,
                self.upstream + request.raw_path,
                headers={**headers, "accept-encoding": "identity"},
                data=await request.read() or None,
            ) as answer:
                if is_watch(request) and answer.status == 200:
                    return await self._watch(request, answer)
                kept = {k: v for k, v in answer.headers.items() if k.lower() not in _HOP}
                return web.Response(status=answer.status, headers=kept, body=await answer.read())
        except aiohttp.ClientError:
            return web.Response(status=502)

    async def _watch(
        self, request: web.Request, answer: aiohttp.ClientResponse
    ) -> web.StreamResponse:
        """Pass lines on until the server or `end_watches` ends it."""
        response = web.StreamResponse(headers={"content-type": "application/json"})
        await response.prepare(request)
        queue: asyncio.Queue[bytes] = asyncio.Queue()
        self._watches[queue] = request
        ending = asyncio.ensure_future(queue.get())
        try:
            while True:
                line = asyncio.ensure_future(answer.content.readline())
                await asyncio.wait((line, ending), return_when=asyncio.FIRST_COMPLETED)
                if ending.done():
                    line.cancel()
                    with suppress(asyncio.CancelledError, aiohttp.ClientError):
                        await line
                    await response.write(ending.result())
                    break
                if not line.result():
                    break
                if not self._deaf:
                    await response.write(line.result())
        except (ConnectionError, aiohttp.ClientError):
            pass
        finally:
            ending.cancel()
            del self._watches[queue]
        return response


def error_line(code: int, reason: str) -> bytes:
    """An ERROR event of a watch."""
    status = {"kind": "Status", "apiVersion": "v1", "code": code, "reason": reason}
    return json.dumps({"type": "ERROR", "object": status}).encode() + b"\n"
