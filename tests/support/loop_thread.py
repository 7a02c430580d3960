"""An asyncio loop on a thread of its own, for tests that are not coroutines.

grpc.aio serves one loop per process well, so what uses it in a test shares one.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from concurrent.futures import Future

    Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

WAIT_SECONDS = 120
READER_BYTES = 1 << 24  # that a connection's reader holds


class LoopThread:
    """Runs coroutines, and servers on loopback, until it is stopped."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._servers: list[asyncio.Server] = []
        self._connections: set[asyncio.StreamWriter] = set()
        self._thread.start()

    def submit(self, work) -> Future:
        """Begin with a coroutine."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def do(self, work):
        """Return what a coroutine does."""
        return self.submit(work).result(WAIT_SECONDS)

    def listen(self, serve: Serve, port: int = 0) -> str:
        """Serve each connection with a coroutine, closing it afterwards; return the address.

        Without a port any free one is taken.
        """

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Awaitable[None]:
            # Noted before the coroutine's first step, which a cancelled one never takes.
            self._connections.add(writer)
            return run(reader, writer)

        async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(OSError, asyncio.IncompleteReadError):
                await serve(reader, writer)
            writer.close()
            self._connections.discard(writer)

        async def start() -> str:
            server = await asyncio.start_server(
                accept, "127.0.0.1", port, backlog=4096, limit=READER_BYTES
            )
            self._servers.append(server)
            return f"127.0.0.1:{server.sockets[0].getsockname()[1]}"

        return self.do(start())

    def stop_listening(self) -> None:
        """Accept nothing more; what is connected stays."""

        async def close() -> None:
            for server in self._servers:
                server.close()

        self.do(close())

    def stop(self) -> None:
        """Close what is open, cancel what still runs and end."""
        self.stop_listening()
        self.do(self._cancel())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_SECONDS)
        self._loop.close()

    async def _cancel(self) -> None:
        for writer in self._connections:
            writer.transport.abort()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
