"""Notifies the EPPs of a pool that the pool is deleted, once that is certain.

A mistake would end a pool in use, so a pool counts as absent only after two looks ten seconds
apart, and never if a look fails: not before the store is filled, not for a namespace that may not
be read, not while the kind itself is not installed. An EPP that was away is notified when it dials.
control.proto says what an EPP does then. Planning a pool that exists belongs in planner.py.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from forebay_control.v1 import control_pb2 as pb
from forebay_operator.cluster.api import ApiError
from forebay_operator.resources import KINDS, InferencePool, InferencePoolV1Alpha2

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from forebay_operator.channel.server import ControlServer
    from forebay_operator.cluster.api import Cluster

CONFIRM_SECONDS = 10.0  # between the two looks, as for a LIST that wipes out a kind
LOOK_SECONDS = 1.0
MAX_SUSPECTS = 1000  # pools that EPPs name and that are in no store

_POOLS = [kind for kind in KINDS if kind.model in (InferencePool, InferencePoolV1Alpha2)]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Suspect:
    """A pool that seems to be gone. `absent_since`: the first look that did not find it."""

    uid: str
    absent_since: float | None = None
    look_at: float = 0.0
    deleted: bool = False


class Deletions:
    """Finds out which pools are deleted.

    Args:
        control: the EPPs.
        is_absent: looks for a pool (namespace, name); None where that cannot be said now.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        control: ControlServer,
        is_absent: Callable[[str, str], Awaitable[bool | None]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._control = control
        self._is_absent = is_absent
        self._clock = clock
        self._suspects: OrderedDict[str, _Suspect] = OrderedDict()

    def suspect(self, pool: str, uid: str = "") -> None:
        """Note that a pool is not in the store."""
        if pool in self._suspects:
            return
        self._suspects[pool] = _Suspect(uid, look_at=self._clock())
        while len(self._suspects) > MAX_SUSPECTS:
            oldest, _ = self._suspects.popitem(last=False)
            self._control.forget(oldest)

    def exists(self, pool: str) -> None:
        """Note that a pool is in the store (again); its EPPs dial and are checked again."""
        suspect = self._suspects.pop(pool, None)
        if suspect is not None and suspect.deleted:
            _log.info("pool exists again", extra={"pool": pool})
            self._control.redial(pool)

    def is_deleted(self, pool: str) -> bool:
        """Return whether a pool that an EPP asks for is deleted; look if that is unknown."""
        self.suspect(pool)
        return self._suspects[pool].deleted

    async def run(self) -> None:
        """Look for the pools that seem to be gone, until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Look for those that are due."""
        for pool, suspect in list(self._suspects.items()):
            if suspect.deleted or suspect.look_at > self._clock():
                continue
            absent = await self._is_absent(*pool.split("/", 1))
            if self._suspects.get(pool) is not suspect:
                continue  # it has come meanwhile
            now = self._clock()
            suspect.look_at = now + CONFIRM_SECONDS
            if absent is None:
                suspect.absent_since = None
            elif not absent:
                del self._suspects[pool]
            elif suspect.absent_since is None:
                suspect.absent_since = now
            else:
                suspect.deleted = True
                _log.warning("pool is deleted; its EPPs drain", extra={"pool": pool})
                self._control.program(pool, pb.Snapshot(deleted=True, pool_uid=suspect.uid))


async def is_absent(cluster: Cluster, namespace: str, name: str) -> bool | None:
    """Look for a pool of either kind; None where the API server does not say.

    A kind whose CRD is not installed says nothing; one of them has to.
    """
    answers = 0
    for kind in _POOLS:
        try:
            async for page in cluster.pages(kind, namespace):
                if any(item.get("metadata", {}).get("name") == name for item in page.items):
                    return False
        except ApiError as error:
            if error.status == 404:
                continue
            _log.info("cannot look for a pool", extra={"pool": name, "error": str(error)})
            return None
        answers += 1
    return True if answers else None
