"""The operator's control server on a thread of the test, which says itself what is to run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ext_proc_peer import until
from loop_thread import LoopThread

from forebay_operator.channel.server import ControlServer
from forebay_operator.channel.trust import unauthenticated
from forebay_operator.status.observed import EPPState

if TYPE_CHECKING:
    from forebay_control.v1 import control_pb2 as pb

WAIT_SECONDS = 30


class Driver:
    """Programs the EPPs that dial `port`, from `thread`; believes everybody unless told whom.

    A leader that hears of a higher epoch takes the next one, as a folder's operator does.
    """

    def __init__(self, epoch: int = 1, authorize=unauthenticated, credentials=None) -> None:
        self._authorize, self._credentials = authorize, credentials
        self.thread = LoopThread()
        self.port = self.thread.do(self._start(epoch))

    async def _start(self, epoch: int) -> int:
        self.server = ControlServer(self._authorize, lambda _: None, self._heal)
        self.server.lead(epoch)
        return await self.server.serve("127.0.0.1:0", self._credentials)

    def _heal(self, seen: int, _uid: str, _namespace: str) -> None:
        self.server.lead(seen + 1)

    def ask(self, question):
        """Have the server's thread answer."""

        async def answer():
            return question(self.server)

        return self.thread.do(answer())

    def program(self, pool: str, snapshot: pb.Snapshot) -> None:
        """Have the pool's EPPs run this."""
        self.ask(lambda server: server.program(pool, snapshot))

    def epps(self, pool: str) -> list:
        """The EPPs that are connected, and how they stand."""
        return self.ask(lambda server: server.epps(pool, server.connected(pool)))

    def programmed(self, pool: str) -> bool:
        """Whether an EPP is connected and all of them run what was said last."""
        found = self.epps(pool)
        return bool(found) and all(epp.state is EPPState.PROGRAMMED for epp in found)

    def put(self, pool: str, snapshot: pb.Snapshot) -> None:
        """Have the pool's EPPs run this, and wait until they do."""
        self.program(pool, snapshot)
        until(lambda: self.programmed(pool), WAIT_SECONDS)

    def stop(self) -> None:
        self.thread.do(self.server.stop())
        self.thread.stop()
