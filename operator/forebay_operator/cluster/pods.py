"""The operator's own watches of pods, in the namespaces that hold one of its pools.

Pods are many and large, and kopf would keep several copies of each.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from forebay_operator.cluster import api
from forebay_operator.pacing import Backoff
from forebay_operator.resources import POD

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from forebay_operator.cluster.api import Cluster

MAX_BACKOFF_SECONDS = 10.0
STEADY_SECONDS = 60.0
END_SECONDS = 10.0

_log = logging.getLogger(__name__)


class PodWatches:
    """One watch a namespace.

    Args:
        cluster: the API.
        sweep: lists the pods of a namespace; returns the version from which a watch goes on, None
            where there is nothing to read.
        on_event: called with each event of a watch.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        cluster: Cluster,
        sweep: Callable[[str], Awaitable[str | None]],
        on_event: Callable[[Any], None],
        clock: Callable[[], float],
    ) -> None:
        self._cluster = cluster
        self._sweep = sweep
        self._on_event = on_event
        self._clock = clock
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._versions: dict[str, str] = {}
        self._watched_at: dict[str, float] = {}
        self._lists = asyncio.Semaphore(1)

    def __contains__(self, namespace: str) -> bool:
        """Return whether the pods of a namespace are watched, or about to be."""
        return namespace in self._tasks

    def listed(self, namespace: str, version: str) -> None:
        """Note the version of a LIST from which a watch that has not begun yet can go on."""
        if namespace not in self._tasks:
            self._versions[namespace] = version

    def begin(self, namespace: str) -> None:
        """Begin to read the pods of a namespace."""
        self._tasks[namespace] = asyncio.create_task(self._follow(namespace))

    def end(self, namespace: str) -> None:
        """Stop reading the pods of a namespace."""
        self._tasks.pop(namespace).cancel()

    def steady(self, since: float) -> set[str]:
        """Return the namespaces that have been watched since a moment."""
        return {name for name, at in self._watched_at.items() if at < since}

    async def stop(self) -> None:
        """End every watch."""
        for task in self._tasks.values():
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=END_SECONDS)

    async def _follow(self, namespace: str) -> None:
        """List and watch the pods of a namespace, until cancelled."""
        version = self._versions.pop(namespace, None)
        backoff = Backoff(MAX_BACKOFF_SECONDS)
        while True:
            began_at = self._clock()
            try:
                if version is None:
                    async with self._lists:
                        version = await self._sweep(namespace)
                if version is not None:
                    began_at = self._watched_at[namespace] = self._clock()
                    async for event in self._cluster.watch(POD, namespace, version):
                        version = event["object"]["metadata"]["resourceVersion"]
                        if event["type"] != "BOOKMARK":
                            self._on_event(event)
            except api.ApiError as error:
                _log.info("pods: %s", error, extra={"namespace": namespace})
                if error.status in (403, 410):
                    version = None
            except Exception:  # one namespace must not stop the others, nor stay deaf
                _log.exception("the watch of pods failed", extra={"namespace": namespace})
                version = None
            finally:
                self._watched_at.pop(namespace, None)
            if self._clock() - began_at > STEADY_SECONDS:
                backoff.reset()
            await asyncio.sleep(backoff.next_seconds())
