"""Clients of an Envoy that runs somewhere else: single requests, and a trickle of them."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ext_proc_peer import until

if TYPE_CHECKING:
    from collections.abc import Iterator

PATH = "/v1/completions"
PATIENCE_SECONDS = 180.0
AT_ONCE = 100
TRICKLE_CLIENTS = 4
TRICKLE_REQUESTS = 5000  # a client stops here, whatever the test does
TRICKLE_PAUSE_SECONDS = 0.05
HELD_TOKENS = 100_000  # more than half an hour, and what a server's KV cache holds


@dataclass(frozen=True)
class Answer:
    """What came back; status 0 when the connection broke."""

    status: int
    outcome: str
    text: str
    ended_at: float

    def __str__(self) -> str:
        return f"{self.status} {self.outcome} {self.text[:100]}".strip()


def _post(address: tuple[str, int], body: dict) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(*address, timeout=PATIENCE_SECONDS)
    headers = {"content-type": "application/json"}
    connection.request("POST", PATH, json.dumps(body), headers)
    return connection


def ask(address: tuple[str, int], model: str, max_tokens: int = 2) -> Answer:
    """Send one request and wait for its answer."""
    body = {"model": model, "prompt": "hello", "max_tokens": max_tokens}
    try:
        with contextlib.closing(_post(address, body)) as connection:
            answer = connection.getresponse()
            text = answer.read().decode()
            outcome = answer.headers.get("x-forebay-outcome", "")
            return Answer(answer.status, outcome, text, time.monotonic())
    except (OSError, http.client.HTTPException) as error:
        return Answer(0, "", repr(error), time.monotonic())


class Clients:
    """Many clients of one Envoy, each with a connection of its own."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.address = address
        self._threads = ThreadPoolExecutor(AT_ONCE)

    def close(self) -> None:
        """Wait for the answers that are due."""
        self._threads.shutdown()

    def send(self, model: str, count: int = 1, max_tokens: int = 2) -> list[Future[Answer]]:
        """Send requests of one model at once."""
        return [self._threads.submit(ask, self.address, model, max_tokens) for _ in range(count)]

    @contextlib.contextmanager
    def holding(self, model: str, count: int) -> Iterator[None]:
        """Keep slots of model servers taken: answers that would last for hours."""
        body = {"model": model, "prompt": "hi", "max_tokens": HELD_TOKENS, "stream": True}
        with contextlib.ExitStack() as held:
            for _ in range(count):
                connection = _post(self.address, body)
                held.callback(connection.close)
                answer = connection.getresponse()
                # Also the response: it shares the socket.
                held.callback(answer.close)
                assert answer.status == 200, answer.read()
            yield

    @contextlib.contextmanager
    def trickle(self, model: str) -> Iterator[Trickle]:
        """Send requests one after the other, from a few clients, until the block ends."""
        trickle = Trickle(self.address, model)
        try:
            yield trickle
        finally:
            trickle.stop()


class Trickle:
    """What has come of the requests of a few clients."""

    def __init__(self, address: tuple[str, int], model: str) -> None:
        self._address, self._model = address, model
        self._stopping = threading.Event()
        self.answers: list[Answer] = []
        self._threads = [threading.Thread(target=self._run) for _ in range(TRICKLE_CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        for _ in range(TRICKLE_REQUESTS):
            self.answers.append(ask(self._address, self._model))
            if self._stopping.wait(TRICKLE_PAUSE_SECONDS):
                break

    def stop(self) -> None:
        """Let every client end with the answer that it waits for."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, count: int) -> None:
        """Wait for this many more answers."""
        wanted = len(self.answers) + count
        until(lambda: len(self.answers) >= wanted, PATIENCE_SECONDS)

    @property
    def failed(self) -> Counter[str]:
        """Everything but answers with 200, by what it was."""
        return Counter(str(answer) for answer in self.answers if answer.status != 200)
