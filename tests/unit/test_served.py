"""adapters/served.py against real servers on loopback."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from aiohttp import web

from forebay_epp.adapters import served
from forebay_epp.adapters.served import ServedModels

if TYPE_CHECKING:
    from forebay_epp.codec.openai import ServedModel


class Server:
    """Lists models, or fails as configured."""

    def __init__(self, *names):
        self.names = names
        self.status = 200
        self.asked = 0
        self.asks = asyncio.Queue()
        self.address = ""

    async def _list(self, _):
        self.asked += 1
        self.asks.put_nowait(self.status)
        data = [{"id": name, "created": self.asked, "owned_by": "vllm"} for name in self.names]
        return web.json_response({"object": "list", "data": data}, status=self.status)

    @asynccontextmanager
    async def listening(self):
        app = web.Application()
        app.add_routes([web.get("/v1/models", self._list)])
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.address = f"127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            await runner.cleanup()


@asynccontextmanager
async def asking(*servers):
    """Ask these servers; yields the adapter and a queue of what it reports."""
    reports: asyncio.Queue[tuple[ServedModel, ...]] = asyncio.Queue()
    async with AsyncExitStack() as stack:
        for server in servers:
            await stack.enter_async_context(server.listening())
        models = ServedModels(reports.put_nowait)
        models.set_addresses(frozenset(server.address for server in servers))
        task = asyncio.create_task(models.run())
        try:
            async with asyncio.timeout(20):
                yield models, reports
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def names(models):
    return [model.name for model in models]


async def test_every_models_name_is_reported_once():
    """Servers of a pool are mostly alike; adapters may differ."""
    async with asking(Server("llama", "lora-a"), Server("llama", "lora-b")) as (_, reports):
        assert names(await reports.get()) == ["llama", "lora-a", "lora-b"]
        assert reports.empty()


async def test_a_new_endpoint_is_asked_at_once_and_one_that_left_is_forgotten():
    """What it alone served is no longer there."""
    first, second = Server("llama"), Server("qwen")
    async with asking(first, second) as (models, reports):
        models.set_addresses(frozenset([first.address]))
        while names(await reports.get()) != ["llama"]:
            pass
        models.set_addresses(frozenset([first.address, second.address]))
        assert names(await reports.get()) == ["llama", "qwen"]


async def test_a_server_that_fails_is_asked_again_and_what_it_said_counts(monkeypatch):
    """A model that stays keeps its date; news come with the next answer."""
    monkeypatch.setattr(served, "INTERVAL_SECONDS", 0.02)
    monkeypatch.setattr(served, "FIRST_RETRY_SECONDS", 0.01)
    server = Server("llama")
    server.status = 401
    async with asking(server) as (_, reports):
        for _ in range(3):
            await server.asks.get()
        assert reports.empty()
        server.status = 200
        (llama,) = await reports.get()
        server.status = 500
        while await server.asks.get() != 500:
            pass
        await server.asks.get()
        server.names = ("llama", "lora")
        server.status = 200
        assert (await reports.get())[0] == llama


async def test_what_is_kept_is_bounded(monkeypatch):
    """Whatever servers say."""
    monkeypatch.setattr(served, "MAX_SERVED_MODELS", 10)
    many = Server(*(f"m{number:02}" for number in range(30)))
    async with asking(many, Server("other")) as (_, reports):
        assert len(await reports.get()) <= 10


async def test_many_servers_are_asked_in_groups():
    """All of them, some at a time, and none twice."""
    servers = [Server(f"m{number}") for number in range(40)]
    async with asking(*servers) as (_, reports):
        while len(await reports.get()) < len(servers):
            pass
        assert [server.asked for server in servers] == [1] * len(servers)
