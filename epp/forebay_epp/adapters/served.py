"""Asks every model server of the pool which models it serves, once a minute.

A server's own names, including its LoRA adapters, go into the list that clients get. Reading the
page belongs in codec/openai/catalogue.py.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from forebay_epp.codec.openai import MAX_SERVED_MODELS, ServedModel, read_served
from forebay_epp.fetching import fetch, open_session, text

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp import ClientSession

INTERVAL_SECONDS = 60.0
FIRST_RETRY_SECONDS = 1.0
MAX_AT_ONCE = 16

_log = logging.getLogger(__name__)


class ServedModels:
    """Keeps the list of models that the current endpoints serve.

    A new endpoint is asked at once. One that does not answer is asked again after a second, then
    after twice as long each time up to a minute; meanwhile what it said last counts.

    Args:
        report: called in the event loop with all models, by name, whenever they change.
    """

    def __init__(self, report: Callable[[tuple[ServedModel, ...]], None]) -> None:
        self._report = report
        self._due: dict[str, float] = {}
        self._retry_seconds: dict[str, float] = {}
        self._models: dict[str, tuple[ServedModel, ...]] = {}
        self._reported: dict[str, ServedModel] = {}
        self._changed = asyncio.Event()

    def set_addresses(self, addresses: frozenset[str]) -> None:
        """Ask these endpoints (ip:port) from now on and no others."""
        for gone in self._due.keys() - addresses:
            del self._due[gone]
            self._retry_seconds.pop(gone, None)
            self._models.pop(gone, None)
        for address in addresses - self._due.keys():
            self._due[address] = 0.0
        self._changed.set()

    async def run(self) -> None:
        """Ask until cancelled."""
        now = asyncio.get_running_loop().time
        async with open_session() as session:
            while True:
                self._changed.clear()
                due = sorted(self._due, key=self._due.__getitem__)[:MAX_AT_ONCE]
                due = [address for address in due if self._due[address] <= now()]
                await asyncio.gather(*(self._ask(session, address) for address in due))
                self._tell()
                soonest = min(self._due.values(), default=float("inf"))
                try:
                    async with asyncio.timeout_at(None if soonest == float("inf") else soonest):
                        await self._changed.wait()
                except TimeoutError:
                    pass

    async def _ask(self, session: ClientSession, address: str) -> None:
        pause = INTERVAL_SECONDS
        try:
            page = await fetch(session, f"http://{address}/v1/models", "application/json")
            models = read_served(page)
        except Exception as error:  # any error that a server provokes: ask it again
            pause = self._retry_seconds.get(address, FIRST_RETRY_SECONDS)
            self._retry_seconds[address] = min(2 * pause, INTERVAL_SECONDS)
            _log.debug(
                "the endpoint does not list its models",
                extra={"endpoint": address, "error": text(error)},
            )
        else:
            self._retry_seconds.pop(address, None)
            if address in self._due:
                self._models[address] = models
        if address in self._due:
            self._due[address] = asyncio.get_running_loop().time() + pause

    def _tell(self) -> None:
        """Report the models if they are others than before; one that stays keeps its date."""
        found: dict[str, ServedModel] = {}
        for address in sorted(self._models):
            for model in self._models[address]:
                if len(found) < MAX_SERVED_MODELS or model.name in found:
                    found.setdefault(model.name, self._reported.get(model.name, model))
        if found.keys() != self._reported.keys():
            self._reported = found
            self._report(tuple(found[name] for name in sorted(found)))
