"""Requests through a real Envoy to small model servers, and what came of each.

Clients and model servers are coroutines of one thread, on loopback, so that hundreds of requests
a second cost little.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from loop_thread import LoopThread

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
    from typing import Self

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
CHUNKED = b"2\r\n{}\r\n0\r\n\r\n"  # the answer as it comes through Envoy
CLIENT_SECONDS = 120
_ID = re.compile(rb"\r\nx-id: (\d+)\r\n", re.IGNORECASE)


class Ledger:
    """What each request was answered, and how often it reached a model server.

    `outcomes` holds 200 for an answer of a model server, else x-forebay-outcome, else what went
    wrong.
    """

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.outcomes: defaultdict[int, list[str]] = defaultdict(list)
        self.served: Counter[int] = Counter()

    @property
    def totals(self) -> Counter[str]:
        return Counter(outcome for found in self.outcomes.values() for outcome in found)

    def check(self) -> None:
        """Fail unless each request has one outcome and was served once if that is 200, else not."""
        assert self.outcomes.keys() == set(self.sent)
        for request in self.sent:
            (outcome,) = self.outcomes[request]
            told = outcome == "200" or outcome.startswith(("Rejected", "Evicted"))
            assert told, f"request {request}: {outcome}"
            assert self.served[request] == (outcome == "200"), f"request {request}"


class Traffic:
    """Sends requests at a steady rate and answers them as model servers.

    Args:
        servers: how many model servers there are.
        service_seconds: how long they take for a request.
    """

    def __init__(self, servers: int = 3, service_seconds: float = 0.04) -> None:
        self._number = servers
        self._service_seconds = service_seconds
        self._thread = LoopThread()
        self._http = 0
        self.addresses: list[str] = []
        self.ledger = Ledger()

    def __enter__(self) -> Self:
        self.addresses += [self._thread.listen(self._serve) for _ in range(self._number)]
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.stop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readuntil(b"0\r\n\r\n")  # the body comes chunked
            self.ledger.served[int(_ID.search(head)[1])] += 1
            await asyncio.sleep(self._service_seconds)
            writer.write(ANSWER)

    def begin(
        self, http: int, requests: int, per_second: float, model: Callable[[int], str]
    ) -> Future[None]:
        """Send requests for the models that `model` names; the future ends with the last answer."""
        self._http = http
        return self._thread.submit(self._run(requests, per_second, model))

    async def _run(self, requests: int, per_second: float, model: Callable[[int], str]) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        asked = []
        for number in range(requests):
            await asyncio.sleep(max(0.0, began + number / per_second - loop.time()))
            self.ledger.sent.append(number)
            asked.append(asyncio.create_task(self._ask(number, model(number))))
        await asyncio.gather(*asked)

    async def _ask(self, number: int, model: str) -> None:
        try:
            async with asyncio.timeout(CLIENT_SECONDS):
                outcome = await self._request(number, model)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            outcome = f"no answer: {error!r}"
        self.ledger.outcomes[number].append(outcome)

    async def _request(self, number: int, model: str) -> str:
        body = json.dumps({"model": model, "prompt": "x" * 100}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self._http)
        try:
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-id: %d\r\nconnection: close\r\n"
                b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
                % (number, len(body), body)
            )
            answer = await reader.read()  # to the end: a second answer would show
        finally:
            writer.transport.abort()  # what is still unsent would keep it open
        head, _, rest = answer.partition(b"\r\n\r\n")
        status = head.split(b" ", 2)[1].decode() if b" " in head else "nothing"
        if status == "200":
            return "200" if rest == CHUNKED else f"200 with {rest[:200]!r}"
        found = re.search(rb"\r\nx-forebay-outcome: (\w+)", head)
        return found[1].decode() if found else f"{status}: {rest[:200]!r}"
