"""What is read of model servers' answers, and the one thing that is put back: the model's name."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass

import msgspec

MAX_USAGE_BYTES = 1 << 20
MAX_EVENT_BYTES = 16 << 10


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _UsageFields(msgspec.Struct):
    prompt_tokens: int | None = None
    input_tokens: int | None = None
    completion_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Response(msgspec.Struct):
    usage: _UsageFields | None = None


class _Answer(msgspec.Struct):
    usage: _UsageFields | None = None
    response: _Response | None = None  # the Responses API wraps its last event


_answer = msgspec.json.Decoder(_Answer)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as the model server counted them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class ModelRestorer:
    """Puts the client's model name back into an answer that comes in chunks.

    A chunk may end inside the text to replace; such an end is held back until the next one.
    """

    __slots__ = ("_held", "_patterns", "_replacements")

    def __init__(self, target: str, name: str) -> None:
        # ensure_ascii and not: servers write non-ASCII names either way.
        spellings = {json.dumps(target), json.dumps(target, ensure_ascii=False)}
        self._patterns = [
            f'"model":{space}{spelling}'.encode() for spelling in spellings for space in ("", " ")
        ]
        self._replacements = [
            f'"model":{space}{json.dumps(name)}'.encode() for _ in spellings for space in ("", " ")
        ]
        self._held = b""

    def feed(self, chunk: bytes, *, last: bool) -> bytes:
        """Return what can be passed on after this chunk."""
        text = self._held + chunk
        for pattern, replacement in zip(self._patterns, self._replacements, strict=True):
            text = text.replace(pattern, replacement)
        keep = 0 if last else max(_overlap(text, pattern) for pattern in self._patterns)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: bytes, pattern: bytes) -> int:
    """Length of the longest end of `text` that is a proper beginning of `pattern`."""
    start = text.rfind(b'"', max(0, len(text) - len(pattern) + 1))
    best = 0
    while start >= 0:
        if pattern.startswith(text[start:]):
            best = len(text) - start
        start = text.rfind(b'"', max(0, len(text) - len(pattern) + 1), start)
    return best


class UsageReader:
    """Finds the usage of an answer that comes in chunks.

    Of a JSON body it keeps everything up to `MAX_USAGE_BYTES`; of an event stream only the end,
    because the last event that has usage is the one that counts.
    """

    __slots__ = ("_chunks", "_events", "_size_bytes")

    def __init__(self, *, events: bool) -> None:
        self._events = events
        self._chunks: deque[bytes] = deque()
        self._size_bytes = 0

    def feed(self, chunk: bytes) -> None:
        """Take the next chunk."""
        chunks = self._chunks
        self._size_bytes += len(chunk)
        if self._events:
            chunks.append(chunk)
            while self._size_bytes - len(chunks[0]) > MAX_EVENT_BYTES:
                self._size_bytes -= len(chunks.popleft())
        elif self._size_bytes <= MAX_USAGE_BYTES:
            chunks.append(chunk)
        else:
            chunks.clear()

    def usage(self) -> Usage | None:
        """Return the usage, or None where the answer has none that can be read."""
        text = b"".join(self._chunks)
        if not self._events:
            return _read_usage(text)
        return next(
            (
                usage
                for line in reversed(text.splitlines())
                if line.startswith(b"data:") and b'"usage"' in line
                if (usage := _read_usage(line[5:])) is not None
            ),
            None,
        )


def _read_usage(text: bytes) -> Usage | None:
    try:
        answer = _answer.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    fields = answer.usage or (answer.response.usage if answer.response else None)
    if fields is None:
        return None
    details = fields.prompt_tokens_details
    return Usage(
        fields.prompt_tokens or fields.input_tokens or 0,
        fields.completion_tokens or fields.output_tokens or 0,
        (details.cached_tokens or 0) if details else 0,
    )
