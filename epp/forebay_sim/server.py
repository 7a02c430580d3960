"""A vLLM-compatible HTTP server on a simulated engine, in real time.

One task drives the engine and writes each step's tokens straight to the clients' connections; a
handler per request waits for the end. Bodies and their parts belong in openai.py, what becomes of a
request's tokens in calls.py, time inside the batch in stepping.py.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aiohttp import web

from forebay_sim import openai
from forebay_sim.calls import Call, chunk
from forebay_sim.hardware import PRESETS, Hardware
from forebay_sim.metricspage import ENGINES, Load, MetricsPage
from forebay_sim.stepping import StepEngine
from forebay_sim.terms import (
    EngineRequest,
    Finished,
    FirstToken,
    NotReadyError,
    TokensProduced,
    TooLongError,
)

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler

    from forebay_sim.terms import Event

MAX_BODY_BYTES = 64 << 20
MAX_REMEMBERED_IDS = 50_000
ANY_MODEL = "*"
# vLLM 0.32 took 6 s for a schema of 426 kB.
GRAMMAR_SECONDS_PER_KILOBYTE = 0.014
METRICS_MODES = ("normal", "fake", "hang", "error", "unavailable")


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """The server that is simulated.

    Attributes:
        models: names it serves; "*" serves every name.
        loras: LoRA adapters it can load; each is a model name too.
        hardware: what its engine runs on.
        metrics: whose metrics page it has, one of metricspage.ENGINES.
        max_waiting: requests that may wait inside; more get 429.
        grammar_seconds_per_kilobyte: a request with a JSON schema is deferred for so long.

    Raises:
        ValueError: a value is out of range; the message names the field.
    """

    models: tuple[str, ...] = (ANY_MODEL,)
    loras: tuple[str, ...] = ()
    hardware: Hardware = PRESETS["plain"]
    metrics: str = "vllm"
    max_waiting: int = 100_000
    grammar_seconds_per_kilobyte: float = GRAMMAR_SECONDS_PER_KILOBYTE

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.max_waiting < 1:
            raise ValueError(f"max_waiting must be at least 1, is {self.max_waiting}")
        if not 0 <= self.grammar_seconds_per_kilobyte < float("inf"):
            raise ValueError(
                "grammar_seconds_per_kilobyte must be finite and at least 0,"
                f" is {self.grammar_seconds_per_kilobyte}"
            )


class SimulatedServer:
    """One simulated model server; `app` is what to serve."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._start(-math.inf)
        self._calls: dict[int, Call] = {}
        self._next_id = 0
        self._news = asyncio.Event()
        self._seen: OrderedDict[str, int] = OrderedDict()
        self._requests = 0
        self._metrics: dict[str, Any] = {"mode": "normal"}
        self.port = 0

    def _start(self, now: float) -> None:
        """Begin with an empty engine and counters of 0."""
        settings = self._settings
        self._engine = StepEngine(settings.hardware, now, show_tokens=True)
        self._page = MetricsPage(
            self._engine,
            settings.models[0],
            loras=bool(settings.loras),
            kind=settings.metrics,
        )

    def app(self) -> web.Application:
        """Return the routes."""
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._unless_starting])
        app.add_routes(
            [
                web.post("/v1/chat/completions", self._chat),
                web.post("/v1/completions", self._complete),
                web.get("/v1/models", self._models),
                web.get("/health", self._health),
                web.get(ENGINES[self._settings.metrics], self._show_metrics),
                web.post("/admin/config", self._configure),
                web.post("/admin/restart", self._restart),
                web.get("/admin/requests", self._show_requests),
            ]
        )
        if self._settings.metrics == "trtllm":  # trtllm-serve has its own statistics there
            app.router.add_get("/metrics", _no_statistics)
        app.cleanup_ctx.append(self._driving)
        return app

    async def _driving(self, _: web.Application) -> Any:
        self._start(asyncio.get_running_loop().time())
        driver = asyncio.create_task(self._drive())
        yield
        driver.cancel()
        with suppress(asyncio.CancelledError):
            await driver

    # --- the engine in real time

    async def _drive(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._news.clear()
            for event in self._engine.advance(loop.time()):
                self._apply(event)
            wakeup = self._engine.next_wakeup()
            if wakeup is None:
                await self._news.wait()
                continue
            timer = loop.call_at(wakeup, self._news.set)
            await self._news.wait()
            timer.cancel()

    def _apply(self, event: Event) -> None:
        calls = self._calls
        match event:
            case TokensProduced(_, request_ids):
                for request_id in request_ids:
                    call = calls.get(request_id)
                    if call is not None:
                        call.token()
            case FirstToken(at, request_id):
                call = calls.get(request_id)
                if call is not None:
                    call.first_at = at
                    self._page.first_token.add(at - call.started_at)
                    call.token()
            case Finished(at, request_id, usage):
                call = calls.pop(request_id, None)
                if call is not None:
                    self._page.end_to_end.add(at - call.started_at)
                    if not call.done.done():
                        call.done.set_result(usage)

    @web.middleware
    async def _unless_starting(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer nothing while the engine starts; a real server's port is closed until then."""
        starting = self._engine.ready_at > asyncio.get_running_loop().time()
        if starting and not request.path.startswith("/admin/"):
            return self._error(503, "the engine is starting", "ServiceUnavailableError")
        return await handler(request)

    async def _restart(self, _: web.Request) -> web.Response:
        """Lose all requests, whose connections are cut, and start again."""
        calls, self._calls = self._calls, {}
        self._start(asyncio.get_running_loop().time())
        self._news.set()
        for call in calls.values():
            call.cut()
        return web.json_response({"lost": len(calls)})

    # --- requests

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, chat=True)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, chat=False)

    async def _answer(self, request: web.Request, *, chat: bool) -> web.StreamResponse:
        self._remember(request.headers.get("x-request-id", ""))
        try:
            asked = openai.parse_request(await request.read(), chat=chat)
        except openai.BadRequestError as error:
            return self._error(400, str(error), "BadRequestError", error.param)
        if not self._serves(asked.model):
            message = f"The model `{asked.model[:100]}` does not exist."
            return self._error(404, message, "NotFoundError", "model")
        now = asyncio.get_running_loop().time()
        self._next_id += 1
        request_id = self._next_id
        model = asked.model or self._settings.models[0]
        answer = openai.AnswerFormat(asked, f"{request_id:x}", model, int(time.time()))
        adapter = asked.model if asked.model in self._settings.loras else ""
        settings, engine = self._settings, self._engine
        if engine.waiting >= settings.max_waiting:
            message = f"{settings.max_waiting} requests are waiting already"
            return self._error(429, message, "TooManyRequestsError")
        block_size = settings.hardware.block_size_tokens
        call = self._calls[request_id] = Call(answer, asked.max_tokens, now)
        try:
            engine.submit(
                EngineRequest(
                    request_id,
                    asked.prompt_tokens,
                    asked.max_tokens,
                    openai.block_hashes(asked.prompt, block_size, adapter),
                    adapter,
                    settings.grammar_seconds_per_kilobyte * asked.schema_bytes / 1e3,
                ),
                now,
            )
        except TooLongError as error:
            del self._calls[request_id]
            return self._error(400, str(error), "BadRequestError", "max_tokens")
        except NotReadyError as error:
            del self._calls[request_id]
            return self._error(503, str(error), "ServiceUnavailableError")
        self._news.set()
        call.connection = request.transport
        try:
            if asked.stream:
                response = await self._stream(request, call)
            else:
                usage = await call.done
                response = web.Response(
                    body=answer.whole(usage),
                    content_type="application/json",
                    headers=self._headers(),
                )
        except (asyncio.CancelledError, ConnectionError):
            # The client is gone: its slot goes to the next request.
            if self._calls.pop(request_id, None) is not None:
                self._engine.abort(request_id, asyncio.get_running_loop().time())
                self._page.finished["abort"] += 1
                self._news.set()
            raise
        self._page.finished[asked.finish_reason] += 1
        return response

    async def _stream(self, request: web.Request, call: Call) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"content-type": "text/event-stream; charset=utf-8", **self._headers()}
        )
        response.enable_chunked_encoding()
        await response.prepare(request)
        transport = request.transport
        if not isinstance(transport, asyncio.Transport):
            raise ConnectionResetError("the client is gone")
        # A token costs one write to the socket; aiohttp's own writer takes twice the time.
        call.stream_to(transport)
        usage = await call.done
        transport.write(chunk(call.format.closing(usage)))
        await response.write_eof()
        return response

    def _serves(self, model: str) -> bool:
        names = self._settings.models
        return ANY_MODEL in names or model in names or model in self._settings.loras or not model

    def _headers(self) -> dict[str, str]:
        return {"x-inference-port": str(self.port)}

    def _error(
        self, status: int, message: str, kind: str, param: str | None = None
    ) -> web.Response:
        return web.Response(
            status=status,
            body=openai.error_body(status, message, kind, param),
            content_type="application/json",
            headers=self._headers(),
        )

    def _remember(self, request_id: str) -> None:
        self._requests += 1
        if request_id:
            self._seen[request_id] = self._seen.get(request_id, 0) + 1
            if len(self._seen) > MAX_REMEMBERED_IDS:
                self._seen.popitem(last=False)

    # --- pages

    async def _models(self, _: web.Request) -> web.Response:
        names = [*self._settings.models, *self._settings.loras]
        data = [
            {"id": name, "object": "model", "owned_by": "forebay-sim"}
            for name in names
            if name != ANY_MODEL
        ]
        return web.json_response({"object": "list", "data": data}, headers=self._headers())

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(headers=self._headers())

    async def _show_metrics(self, _: web.Request) -> web.Response:
        engine, fake = self._engine, self._metrics
        match fake["mode"]:
            case "hang":
                await asyncio.sleep(3600)
            case "error":
                return web.Response(status=500, text="broken on purpose")
            case "unavailable":
                return web.Response(status=503, text="unavailable on purpose")
            case "fake":
                return web.Response(text=self._page.render(Load(**fake["load"])))
        said = engine.published
        load = Load(said.running, said.waiting, said.kv_usage, said.deferred)
        return web.Response(text=self._page.render(load))

    async def _configure(self, request: web.Request) -> web.Response:
        """Lie or fail on /metrics from now on: {"metrics": {"mode": ..., "running": ...}}."""
        try:
            given = dict((await request.json())["metrics"])
        except (ValueError, KeyError, TypeError):
            return self._error(400, 'send {"metrics": {"mode": ...}}', "BadRequestError")
        if given.get("mode") not in METRICS_MODES:
            modes = ", ".join(METRICS_MODES)
            return self._error(400, f"metrics.mode must be one of {modes}", "BadRequestError")
        load = {name: given[name] for name in Load.__slots__ if name in given}
        self._metrics = {"mode": given["mode"], "load": load}
        return web.json_response({"metrics": self._metrics})

    async def _show_requests(self, _: web.Request) -> web.Response:
        return web.json_response({"count": self._requests, "ids": self._seen})


async def _no_statistics(_: web.Request) -> web.Response:
    return web.json_response([])


async def serve(settings: ServerSettings, host: str, port: int) -> tuple[web.AppRunner, int]:
    """Serve until the runner is cleaned up.

    Returns:
        The runner and the port, which the system chooses for port 0.

    Raises:
        OSError: the address cannot be bound.
    """
    server = SimulatedServer(settings)
    runner = web.AppRunner(
        server.app(), access_log=None, handler_cancellation=True, shutdown_timeout=0.5
    )
    await runner.setup()
    site = web.TCPSite(runner, host, port, backlog=4096)
    try:
        await site.start()
    except OSError:
        await runner.cleanup()
        raise
    server.port = int(runner.addresses[0][1])
    return runner, server.port
