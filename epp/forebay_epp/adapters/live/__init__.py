"""The live page: what the EPP does now, for people, and the same as JSON for programs.

GET /live is one static page without foreign parts, GET /live/events its stream of server-sent
events (one a second, made once for all viewers), GET /live/state one of these as JSON. What is in
an event belongs in report.py, what is remembered in history.py. Nothing is done for viewers while
there are none.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web

from forebay_epp.loopback import refusal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

INTERVAL_SECONDS = 1.0
STATE_TIMEOUT_SECONDS = 5.0
MAX_VIEWERS = 32

_PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")


def routes(
    report: Callable[[], Awaitable[dict[str, object]]], *, to_all: bool = False
) -> list[web.RouteDef]:
    """Return the routes of the live page.

    They answer 403 to peers that are not on loopback, and 503 to a viewer beyond `MAX_VIEWERS` and
    where the data plane does not answer.

    Args:
        report: makes an event; raises TimeoutError where the data plane does not answer.
        to_all: answer peers on other machines as well.
    """
    feed = _Feed(report)
    policy = content_security_policy(_PAGE)

    def check(request: web.Request) -> None:
        reason = refusal(request.remote, request.headers.get("Host"))
        if reason is not None and not to_all:
            raise web.HTTPForbidden(text=f"{reason}\n")

    async def page(request: web.Request) -> web.Response:
        check(request)
        headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }
        return web.Response(text=_PAGE, content_type="text/html", headers=headers)

    async def state(request: web.Request) -> web.Response:
        check(request)
        try:
            return web.json_response(await _within(report), headers={"Cache-Control": "no-store"})
        except TimeoutError:
            raise web.HTTPServiceUnavailable(text="no answer from the data plane\n") from None

    async def events(request: web.Request) -> web.StreamResponse:
        check(request)
        if feed.viewers >= MAX_VIEWERS:
            raise web.HTTPServiceUnavailable(text=f"{MAX_VIEWERS} viewers are connected\n")
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        await feed.send(response)
        return response

    return [
        web.get("/live", page),
        web.get("/live/state", state),
        web.get("/live/events", events),
    ]


def content_security_policy(page: str) -> str:
    """Return a policy that lets the page run its own script and style, and nothing else.

    Both are named by their SHA-256 (CSP level 2), and the script can set text only (Trusted Types).
    """

    def sha256(tag: str) -> str:
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()

    return (
        f"default-src 'none'; script-src 'sha256-{sha256('script')}'; "
        f"style-src 'sha256-{sha256('style')}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


async def _within(report: Callable[[], Awaitable[dict[str, object]]]) -> dict[str, object]:
    async with asyncio.timeout(STATE_TIMEOUT_SECONDS):
        return await report()


class _Feed:
    """Events for all viewers, made as long as there are some.

    A viewer that reads slowly gets the newest event when it is ready, not those in between.
    """

    def __init__(self, report: Callable[[], Awaitable[dict[str, object]]]) -> None:
        self._report = report
        self._making: asyncio.Task[None] | None = None
        self._event: asyncio.Future[bytes] | None = None
        self.viewers = 0

    async def send(self, response: web.StreamResponse) -> None:
        """Send events until the viewer goes away."""
        running = asyncio.get_running_loop()
        if self._event is None:
            self._event = running.create_future()
            self._making = asyncio.create_task(self._make())
        self.viewers += 1
        try:
            while self._event is not None:
                await response.write(await asyncio.shield(self._event))
        except ConnectionError:
            pass
        finally:
            self.viewers -= 1
            if not self.viewers and self._making is not None:
                self._making.cancel()
                self._making = self._event = None

    async def _make(self) -> None:
        running = asyncio.get_running_loop()
        while True:
            try:
                event = f"data: {json.dumps(await _within(self._report))}\n\n".encode()
            except TimeoutError:
                event = b"event: late\ndata: no answer from the data plane\n\n"
            made, self._event = self._event, running.create_future()
            if made is not None:
                made.set_result(event)
            await asyncio.sleep(INTERVAL_SECONDS)
