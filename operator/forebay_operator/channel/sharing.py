"""Divides the slots of pools among their EPPs' streams: when to allot, and to whom it goes.

How many slots an EPP gets does not belong here (shares/).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from forebay_control.v1 import control_pb2 as pb
from forebay_operator import metrics
from forebay_operator.channel.shares import messages
from forebay_operator.channel.shares.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable

    from forebay_operator.channel.stream import Stream

ALLOT_SECONDS = 0.01  # reports that come together are answered together
REST = 4  # a pool's allotments take a fifth of the time at most


class _Pool:
    """The streams of one pool, by EPP, and who holds its slots."""

    def __init__(self, now: float) -> None:
        self.ledger = Ledger(now)
        self.streams: dict[str, Stream] = {}
        self.waiting = False
        self.next_at = now
        self.moves = 0


class Sharing:
    """The slots of all pools.

    Args:
        leading: says whether it is for us to say who gets slots.
        clock: monotonic seconds.
    """

    def __init__(self, leading: Callable[[], bool], clock: Callable[[], float]) -> None:
        self._leading = leading
        self._clock = clock
        self._pools: dict[str, _Pool] = {}

    def take(self, stream: Stream, demand: pb.Demand) -> None:
        """Take a report, and answer it soon."""
        now = self._clock()
        pool = self._pools.get(stream.pool)
        if pool is None:
            pool = self._pools[stream.pool] = _Pool(now)
        if pool.streams.get(stream.epp) is not stream:
            pool.streams[stream.epp] = stream
            pool.ledger.join(stream.epp, now)
        if not pool.ledger.knows(stream.epp):  # it was silent, and its slots have been given away
            stream.end(pb.FromOperator(close=pb.Close(retry_after_seconds=0)))
            return
        pool.ledger.report(stream.epp, messages.demand(demand), now)
        if not pool.waiting:
            pool.waiting = True
            seconds = max(0.0, pool.next_at - now)
            asyncio.get_running_loop().call_later(seconds, self._allot, stream.pool, pool)

    def leave(self, stream: Stream, *, gone: bool = False) -> None:
        """Note that a stream has ended; `gone`: its EPP has said that it ends."""
        pool = self._pools.get(stream.pool)
        if pool is None or pool.streams.get(stream.epp) is not stream:
            return
        pool.ledger.leave(stream.epp, self._clock(), gone=gone)
        del pool.streams[stream.epp]
        if not pool.streams:
            self._forget(stream.pool)

    def _allot(self, name: str, pool: _Pool) -> None:
        pool.waiting = False
        if self._pools.get(name) is not pool or not self._leading():
            return
        now = self._clock()
        allotted = pool.ledger.allot(now)
        took = self._clock() - now
        pool.next_at = now + took + max(ALLOT_SECONDS, REST * took)
        for epp, shares in allotted.items():
            stream = pool.streams.get(epp)
            if stream is not None and not stream.ended:
                stream.send(pb.FromOperator(shares=messages.shares(shares)))
                stream.wake.set()
        held = pool.ledger.held()
        metrics.SHARE_SLOTS.show(
            name,
            {
                (name, stream.pod_name): held[epp]
                for epp, stream in pool.streams.items()
                if epp in held
            },
        )
        metrics.SHARE_MOVES.labels(name).inc(pool.ledger.moves - pool.moves)
        pool.moves = pool.ledger.moves

    def _forget(self, name: str) -> None:
        del self._pools[name]
        metrics.SHARE_SLOTS.show(name, {})
