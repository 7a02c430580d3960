"""An asyncio loop on a thread of its own, for tests that are not coroutines.

grpc.aio serves one loop per process well, so what uses it in a test shares one.
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent.futures import Future

WAIT_SECONDS = 120


class LoopThread:
    """Runs coroutines until it is stopped."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def submit(self, work) -> Future:
        """Begin with a coroutine."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def do(self, work):
        """Return what a coroutine does."""
        return self.submit(work).result(WAIT_SECONDS)

    def stop(self) -> None:
        """Cancel what still runs and end."""
        self.do(self._cancel())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_SECONDS)
        self._loop.close()

    async def _cancel(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
