"""Requests that wait and run at an EPP for as long as the test wants, and what became of each.

The test is their proxy. It buffers bodies, so the EPP says when a request has been queued, and a
request that was dispatched runs until the test ends it.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import TYPE_CHECKING

from ext_proc_peer import Stream, http_headers, until
from ext_proc_queue import CONFIG

from forebay_extproc.v3 import external_processor_pb2 as pb

if TYPE_CHECKING:
    from typing import Self

    import grpc
    from control_plane import EPPProcess

SECONDS = 60.0
MAX_REQUESTS = 32
DISPATCHED = "Dispatched"


class HeldRequest:
    """One request, on a stream of its own.

    Attributes:
        name: in the events.
        outcome: how it left flow control; "" while it waits.
        settled: set once it is queued, or has left flow control.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.outcome = ""
        self.settled = Event()
        self._may_end = Event()

    def run(self, stream: Stream, headers: dict[str, str], body: bytes, left) -> None:
        """Send it, take its one decision, and answer it once that is allowed.

        Args:
            stream: its own.
            headers: beside method and path.
            body: as JSON.
            left: told when it leaves flow control, and how.
        """
        head = {":method": "POST", ":path": "/v1/completions", **headers}
        stream.send(request_headers=http_headers(head), protocol_config=CONFIG)
        answer = stream.answer()
        if answer.HasField("request_headers"):
            stream.send(request_body=pb.HttpBody(body=body, end_of_stream=True))
            answer = stream.answer()
        if answer.HasField("override_message_timeout"):
            self.settled.set()
            answer = stream.answer()
        outcome = DISPATCHED
        if answer.HasField("immediate_response"):
            outcome = next(
                header.header.raw_value.decode()
                for header in answer.immediate_response.headers.set_headers
                if header.header.key == "x-forebay-outcome"
            )
        left(self.name if outcome == DISPATCHED else f"{self.name}:{outcome}")
        self.outcome = outcome
        self.settled.set()
        if outcome == DISPATCHED:
            assert answer.HasField("request_body"), answer
            assert self._may_end.wait(SECONDS), "the test did not end it"
            stream.respond()
        stream.half_close()
        assert next(stream.call, None) is None, "a second answer"

    @property
    def runs(self) -> bool:
        return self.outcome == DISPATCHED and not self._may_end.is_set()

    def end(self) -> None:
        """Have it answered."""
        self._may_end.set()


class Held:
    """The requests of one story.

    Attributes:
        log: names of requests in the order in which they left flow control, those that were not
            dispatched with their outcome, as in `a1:EvictedTTL`; what the test marked; and when
            each came, in monotonic seconds.
    """

    def __init__(self, epp: EPPProcess, channel: grpc.Channel) -> None:
        self.log: list[tuple[str, float]] = []
        self._epp, self._channel = epp, channel
        self._requests: list[HeldRequest] = []
        self._threads = ThreadPoolExecutor(MAX_REQUESTS)
        self._work = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for request in self._requests:
            request.end()
        self._threads.shutdown(wait=False)  # with the channel the last of them end

    def mark(self, event: str) -> None:
        """Note that something has happened."""
        self.log.append((event, time.monotonic()))

    def send(self, name: str, model: str, size_bytes: int, headers: dict[str, str]) -> None:
        """Send a request; return once it is queued or has left flow control."""
        body = json.dumps({"model": model, "prompt": ""})
        body = body[:-2] + "x" * (size_bytes - len(body)) + body[-2:]
        request = HeldRequest(name)
        self._requests.append(request)
        stream = Stream(self._channel)
        work = self._threads.submit(request.run, stream, headers, body.encode(), self.mark)
        work.add_done_callback(lambda _: request.settled.set())
        self._work.append(work)
        assert request.settled.wait(SECONDS), f"{name} is not queued"
        if work.done():
            work.result()

    @property
    def events(self) -> list[str]:
        return [event for event, _ in self.log]

    @property
    def waiting(self) -> list[str]:
        return [request.name for request in self._requests if not request.outcome]

    @property
    def running(self) -> list[HeldRequest]:
        return [request for request in self._requests if request.runs]

    def until_known(self) -> None:
        """Wait until all that the EPP has decided is among the events."""

        def known() -> bool:
            found = self._epp.queues()
            return (found["requests"], found["in_flight"]) == (
                len(self.waiting),
                len(self.running),
            )

        until(known, SECONDS)

    def end_all(self) -> None:
        """End what runs, one after another in the order of sending, until nothing does."""
        self.until_known()
        while running := self.running:
            running[0].end()
            self.until_known()

    def outcomes(self) -> Counter[str]:
        """How many left flow control, by outcome; each had one decision and nothing after it."""
        for work in self._work:
            work.result(SECONDS)
        return Counter(request.outcome for request in self._requests)
