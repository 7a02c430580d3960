"""A request in the engine, and the way of its tokens to the client. Bodies belong in openai.py."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forebay_sim import openai
    from forebay_sim.terms import Usage


class Call:
    """A request in the engine, and where its tokens go."""

    __slots__ = (
        "connection",
        "done",
        "events",
        "first_at",
        "format",
        "max_tokens",
        "started_at",
        "tokens",
        "transport",
    )

    def __init__(self, answer: openai.AnswerFormat, max_tokens: int, now: float) -> None:
        self.format = answer
        self.max_tokens = max_tokens
        self.started_at = now
        self.first_at: float | None = None
        self.tokens = 0
        self.connection: asyncio.BaseTransport | None = None
        self.transport: asyncio.Transport | None = None
        self.events: tuple[bytes, ...] = ()
        self.done: asyncio.Future[Usage] = asyncio.get_running_loop().create_future()

    def stream_to(self, transport: asyncio.Transport) -> None:
        """Write tokens there from now on, and those that have come before."""
        self.transport = transport
        self.events = tuple(chunk(event) for event in self.format.token_events())
        produced, self.tokens = self.tokens, 0
        for _ in range(produced):
            self.token()

    def cut(self) -> None:
        """End the connection without a word, as a killed process does."""
        if isinstance(self.connection, asyncio.WriteTransport):
            self.connection.abort()

    def token(self) -> None:
        """Pass on one more token. The last one goes out with the end of the answer."""
        number = self.tokens
        self.tokens += 1
        if self.transport is None:
            return
        opening = self.format.opening() if number == 0 else b""
        if opening:
            self.transport.write(chunk(opening))
        if self.tokens < self.max_tokens:
            self.transport.write(self.events[number % len(self.events)])


def chunk(data: bytes) -> bytes:
    """Return data as a chunk of HTTP/1.1."""
    return b"%x\r\n%b\r\n" % (len(data), data)
