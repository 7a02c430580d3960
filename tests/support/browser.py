"""A real headless Chromium, driven over the Chrome DevTools Protocol.

Everything that it loads comes from loopback: its own traffic is switched off.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import shutil
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiohttp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

START_SECONDS = 30
ANSWER_SECONDS = 20
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--no-first-run"),
    *("--remote-debugging-port=0", "--hide-scrollbars", "--mute-audio", "about:blank"),
)


def chromium() -> str | None:
    """The path of Chromium, if it is installed (Debian: apt-get install chromium)."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


class Tab:
    """A page, its console and the errors that it has had."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.complaints: list[str] = []
        self.requested: list[str] = []

    async def listen(self) -> None:
        """Take what the browser says, until it ends."""
        async for message in self._socket:
            said = json.loads(message.data)
            if "id" in said:
                self._answers.pop(said["id"]).set_result(said)
            elif said["method"] == "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(said["params"]["exceptionDetails"]))
            elif said["method"] == "Log.entryAdded":
                self.complaints.append(said["params"]["entry"]["text"])
            elif said["method"] == "Network.requestWillBeSent":
                self.requested.append(said["params"]["request"]["url"])

    async def tell(self, method: str, **params: object) -> dict[str, Any]:
        """Call a method of the protocol and return what it answers."""
        number = next(self._ids)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        said = await asyncio.wait_for(answer, ANSWER_SECONDS)
        assert "error" not in said, said
        return said["result"]

    async def run(self, expression: str) -> Any:
        """Return the value of an expression of JavaScript."""
        said = await self.tell("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    async def until(self, expression: str) -> None:
        """Wait until an expression is true."""
        async with asyncio.timeout(ANSWER_SECONDS):
            while not await self.run(expression):  # noqa: ASYNC110  # the page has no event of ours
                await asyncio.sleep(0.05)

    async def look(self, path: Path, *, width: int, height: int, scheme: str = "light") -> None:
        """Write a PNG of the page at this size, in the light or the dark scheme."""
        await self.tell(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        feature = {"name": "prefers-color-scheme", "value": scheme}
        await self.tell("Emulation.setEmulatedMedia", features=[feature])
        said = await self.tell("Page.captureScreenshot", format="png")
        path.write_bytes(  # noqa: ASYNC240  # nothing else waits
            base64.b64decode(said["data"])
        )


@asynccontextmanager
async def tab(folder: Path) -> AsyncIterator[Tab]:
    """Start Chromium with its profile in a folder, and open an empty page."""
    program = chromium()
    assert program is not None
    process = await asyncio.create_subprocess_exec(
        *(program, f"--user-data-dir={folder}", *FLAGS),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(START_SECONDS), aiohttp.ClientSession() as session:
            port_file = folder / "DevToolsActivePort"
            while not (port_file.exists() and port_file.read_text().count("\n")):
                assert process.returncode is None, "chromium has ended"
                await asyncio.sleep(0.05)
            port = port_file.read_text().splitlines()[0]
            async with session.get(f"http://127.0.0.1:{port}/json/list") as pages:
                (page,) = [each for each in await pages.json() if each["type"] == "page"]
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket,
        ):
            found = Tab(socket)
            listening = asyncio.create_task(found.listen())
            for domain in ("Page", "Runtime", "Log", "Network"):
                await found.tell(f"{domain}.enable")
            yield found
            listening.cancel()
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
