"""The operator's control server on a thread of the test, which says itself what is to run."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

from ext_proc_peer import until

from forebay_operator.conditions import PickerState
from forebay_operator.control import ControlServer
from forebay_operator.trust import believe

if TYPE_CHECKING:
    from forebay_control.v1 import control_pb2 as pb

WAIT_SECONDS = 30


class Driver:
    """Programs the pickers that dial `port`: believing everybody in plaintext, unless told whom.

    A leader that hears of a higher epoch takes the next one, as a folder's operator does.
    """

    def __init__(self, epoch: int = 1, authorize=believe, credentials=None) -> None:
        self._authorize, self._credentials = authorize, credentials
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.port = self._do(self._start(epoch))

    async def _start(self, epoch: int) -> int:
        self.server = ControlServer(self._authorize, lambda _: None, self._heal)
        self.server.lead(epoch)
        return await self.server.serve("127.0.0.1:0", self._credentials)

    def _heal(self, seen: int) -> None:
        self.server.lead(seen + 1)

    def _do(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(WAIT_SECONDS)

    def ask(self, question):
        """Have the server's thread answer."""

        async def answer():
            return question(self.server)

        return self._do(answer())

    def program(self, pool: str, snapshot: pb.Snapshot) -> None:
        """Have the pool's pickers run this."""
        self.ask(lambda server: server.program(pool, snapshot))

    def pickers(self, pool: str) -> list:
        """The pickers that are connected, and how they stand."""
        return self.ask(lambda server: server.pickers(pool, server.connected(pool)))

    def programmed(self, pool: str) -> bool:
        """Whether a picker is connected and all of them run what was said last."""
        found = self.pickers(pool)
        return bool(found) and all(picker.state is PickerState.PROGRAMMED for picker in found)

    def put(self, pool: str, snapshot: pb.Snapshot) -> None:
        """Have the pool's pickers run this, and wait until they do."""
        self.program(pool, snapshot)
        until(lambda: self.programmed(pool), WAIT_SECONDS)

    def stop(self) -> None:
        self._do(self.server.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_SECONDS)
        self._loop.close()
