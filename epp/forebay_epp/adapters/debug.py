"""Debug pages of a running EPP, for the machine that it runs on.

They name models and flows, so only loopback peers get them; `kubectl port-forward` is one. Figures
for machines belong in adapters/prometheus.py.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from aiohttp import web

from forebay_epp.loopback import refusal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from forebay_epp.core.terms import ControllerState

STATE_TIMEOUT_SECONDS = 5.0


def routes(ask_state: Callable[[], Awaitable[ControllerState]]) -> list[web.RouteDef]:
    """Return the route that answers GET /debug/queues.

    It answers 403 to peers that are not on loopback and 503 when the controller does not answer.

    Args:
        ask_state: asks the controller for its state.
    """

    async def queues(request: web.Request) -> web.Response:
        if (reason := refusal(request.remote, request.headers.get("Host"))) is not None:
            return _error(403, reason)
        try:
            async with asyncio.timeout(STATE_TIMEOUT_SECONDS):
                state = await ask_state()
        except TimeoutError:
            return _error(503, f"no answer from the data plane in {STATE_TIMEOUT_SECONDS:g} s")
        return _json(200, describe(state))

    return [web.get("/debug/queues", queues)]


def describe(state: ControllerState) -> dict[str, object]:
    """Return the state as JSON data: bands by priority, the longest queues of a band first."""
    return _sorted(asdict(state))


def _sorted(data: dict[str, Any]) -> dict[str, object]:
    data["bands"] = sorted(data["bands"], key=lambda band: band["priority"], reverse=True)
    for band in data["bands"]:
        band["flows"] = sorted(band["flows"], key=lambda flow: flow["requests"], reverse=True)
    if data["shadow"] is not None:
        data["shadow"] = _sorted(data["shadow"])
    return data


def _error(status: int, message: str) -> web.Response:
    return _json(status, {"error": {"message": message, "code": status}})


def _json(status: int, data: object) -> web.Response:
    text = json.dumps(data, indent=2) + "\n"
    return web.Response(status=status, text=text, content_type="application/json")
