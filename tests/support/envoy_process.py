"""A real Envoy in front of an EPP, and a model server that remembers what reached it."""

from __future__ import annotations

import asyncio
import http.client
import json
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

from aiohttp import web
from ext_proc_peer import until
from ports import free_port

from forebay_cli import envoy
from forebay_cli.child import dying_with_us

BINARY = Path(sys.executable).with_name("envoy")


class ModelServer:
    """A small HTTP server on a thread: echoes what it got, or streams, and keeps a list.

    An answer counts as many tokens as the request's `max_tokens` says.
    """

    def __init__(self) -> None:
        self.seen: list[dict] = []
        self.hold = threading.Event()
        self.hold.set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(10)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("upgrade") == "websocket":
            return await self._converse(request)
        body = await request.read()
        self.seen.append(
            {"path": request.path, "headers": dict(request.headers), "body": body.decode()}
        )
        while not self.hold.is_set():  # noqa: ASYNC110  # set by another thread
            await asyncio.sleep(0.005)
        try:
            asked = json.loads(body)
        except ValueError:
            asked = {}
        usage = {"prompt_tokens": 3, "completion_tokens": asked.get("max_tokens", 4)}
        if not asked.get("stream"):
            return web.json_response({"model": asked.get("model"), "usage": usage})
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for token in ("one", "two"):
            event = json.dumps({"model": asked["model"], "token": token})
            await response.write(f"data: {event}\n\n".encode())
        await response.write(f"data: {json.dumps({'usage': usage})}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _converse(self, request: web.Request) -> web.WebSocketResponse:
        """Say back what is said, until the client closes."""
        self.seen.append({"path": request.path, "headers": dict(request.headers), "body": ""})
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            await socket.send_str(message.data)
        return socket

    def _run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        app = web.Application(client_max_size=1 << 26)
        app.router.add_route("*", "/{path:.*}", self._serve)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=4096)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stopping.wait()
        await runner.cleanup()

    def stop(self) -> None:
        self.hold.set()
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(10)


class Envoy:
    """One Envoy process with the product's own bootstrap, as `edit` changes it."""

    def __init__(
        self,
        folder: Path,
        grpc_port: int,
        edit=lambda _: None,
        more_grpc: tuple[int, ...] = (),
        **options,
    ) -> None:
        self.http, self.admin = free_port(), free_port()
        config = folder / f"envoy-{self.http}.json"
        ports = envoy.Ports(self.http, grpc_port, self.admin, more_grpc=more_grpc)
        bootstrap = envoy.bootstrap(ports, secure=False, **options)
        edit(bootstrap)
        config.write_text(json.dumps(bootstrap))
        self._process = subprocess.Popen(
            dying_with_us(
                str(BINARY),
                *("-c", str(config), "-l", "off", "--use-dynamic-base-id"),
                *("--concurrency", "1"),
            ),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until(self._ready, 20)

    def _ready(self) -> bool:
        assert self._process.poll() is None, "Envoy has ended"
        try:
            return "::health_flags::healthy" in self._admin("/clusters")
        except OSError:
            return False

    def _admin(self, path: str) -> str:
        with closing(http.client.HTTPConnection("127.0.0.1", self.admin, timeout=5)) as connection:
            connection.request("GET", path)
            return connection.getresponse().read().decode()

    def avoids_one(self) -> bool:
        """Whether a health check of an EPP has failed."""
        return "/failed_active_hc" in self._admin("/clusters")

    def stat(self, name: str) -> int:
        """A counter of Envoy's own."""
        return int(self._admin(f"/stats?filter=^{name}$").rpartition(":")[2])

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.http, timeout=30)

    def request(self, body: bytes | str | None, *, path="/v1/chat/completions", **headers):
        """Send a request and return (status, headers, body)."""
        connection = self.connect()
        method = "GET" if body is None else "POST"
        connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        response = connection.getresponse()
        answer = response.status, dict(response.getheaders()), response.read()
        connection.close()
        return answer

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)
