"""The tokens that a model server says an answer took, read while the answer passes.

The usage is a member of the answer's object, or of events of a stream, before or behind text of any
length. What is short is held and decoded as a whole; of what is long nothing is held but the usage
itself, so that memory does not depend on what servers answer.
"""

from __future__ import annotations

import re

import msgspec

from forebay_epp.core.terms import Usage

MAX_HELD_BYTES = 16 << 10
MAX_USAGE_BYTES = 8 << 10
MAX_NAME_BYTES = 256

_KEY = b'"usage"'
_EVENT = b"data:"

# Objects around a usage: `response` in the Responses API's events, `message` in Anthropic's.
_WRAPPERS = (b"response", b"message")


class _Fields(msgspec.Struct):
    prompt_tokens: int | None = None
    input_tokens: int | None = None
    completion_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_details: msgspec.Raw = msgspec.Raw()
    input_tokens_details: msgspec.Raw = msgspec.Raw()


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Answer(msgspec.Struct):
    usage: _Fields | None = None
    response: msgspec.Raw = msgspec.Raw()
    message: msgspec.Raw = msgspec.Raw()


_fields = msgspec.json.Decoder(_Fields)
_details = msgspec.json.Decoder(_Details | None)
_answer = msgspec.json.Decoder(_Answer)


class JSONUsageReader:
    """Finds the usage of an answer that is one JSON object and comes in chunks.

    Attributes:
        tokens: that have come, which cannot be told before the end.
    """

    __slots__ = ("_held", "_scanner")

    tokens = 0

    def __init__(self) -> None:
        self._held = b""
        self._scanner: UsageScanner | None = None

    def feed(self, chunk: bytes) -> None:
        """Take the next chunk."""
        if self._scanner is not None:
            self._scanner.feed(chunk)
            return
        self._held += chunk
        if len(self._held) > MAX_HELD_BYTES:
            self._scanner = UsageScanner()
            self._scanner.feed(self._held)
            self._held = b""

    def usage(self) -> Usage | None:
        """Return the usage, or None where none has been seen that can be read."""
        return self._scanner.usage if self._scanner is not None else _decoded(self._held)


class EventUsageReader:
    """Finds the usage of an answer that is a stream of events and comes in chunks.

    Several events may carry a part of it (Anthropic's API: the prompt's tokens in the first one,
    the answer's in the last one) or what it is so far. Counts only grow, so the largest are taken.

    Attributes:
        tokens: that have come, about: model servers send an event for each, and a few more.
    """

    __slots__ = ("_held", "_scanner", "_usage", "tokens")

    def __init__(self) -> None:
        self.tokens = 0
        self._held = b""  # of a line that has not ended
        self._scanner: UsageScanner | None = None  # of such a line when it is long
        self._usage: Usage | None = None

    def feed(self, chunk: bytes) -> None:
        """Take the next chunk. Most are whole events without a usage, one per token."""
        if self._scanner is not None:
            chunk = self._feed_long(self._scanner, chunk)
        if self._held or chunk[-1:] != b"\n":
            chunk = self._hold(chunk)
        self.tokens += chunk.count(_EVENT)  # where an answer has that text, its end corrects it
        if chunk.rfind(_KEY) >= 0:  # half the time of `in`
            for line in chunk.splitlines():
                if _KEY in line and line.startswith(_EVENT):
                    self._add(_decoded(line[len(_EVENT) :]))

    def _hold(self, chunk: bytes) -> bytes:
        """Keep the beginning of a line that has not ended, and return the lines that have."""
        text = self._held + chunk
        end = text.rfind(b"\n") + 1
        held = text[end:]
        if len(held) > MAX_HELD_BYTES:
            self._scanner = UsageScanner()
            if held.startswith(_EVENT):
                self._scanner.feed(held[len(_EVENT) :])
            else:
                self._scanner.end()
            held = b""
        self._held = held
        return text[:end]

    def _feed_long(self, scanner: UsageScanner, chunk: bytes) -> bytes:
        """Feed what belongs to a long line, and return what is behind it."""
        line, newline, rest = chunk.partition(b"\n")
        scanner.feed(line)
        if newline:
            self._add(scanner.usage)
            self._scanner = None
        return rest

    def _add(self, usage: Usage | None) -> None:
        so_far = self._usage
        if usage is not None and so_far is not None:
            usage = Usage(
                max(usage.prompt_tokens, so_far.prompt_tokens),
                max(usage.completion_tokens, so_far.completion_tokens),
                _most(usage.cached_tokens, so_far.cached_tokens),
            )
        self._usage = usage or so_far

    def usage(self) -> Usage | None:
        """Return the usage so far, or None where none has been seen that can be read."""
        if self._held.startswith(_EVENT):  # a last line need not end
            self._add(_decoded(self._held[len(_EVENT) :]))
        if self._scanner is not None:
            self._add(self._scanner.usage)
        return self._usage


# The bytes of a block of JSON but brackets.
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"{}[]")
_BLOCK_BYTES = 4096
_BRACKET_OR_QUOTE = re.compile(rb'[{}\[\]"]')
_NAME = re.compile(rb'[ \t\r\n]*+"([^"]*+)"[ \t\r\n]*+:')
_SPACE = re.compile(rb"[ \t\r\n:]*+")
_SCALAR = re.compile(rb'[^ \t\r\n,:"{}\[\]]*+')
_QUOTE, _COMMA, _OBJECT = b'",{'


class UsageScanner:
    """Finds the member `usage` of a JSON object of any length, fed in pieces, and forgets the rest.

    It looks at the members of the object and of the objects in `_WRAPPERS`, and passes over all
    other values: block by block, because brackets outside of strings show how deep a block goes.
    JSON is not checked: in what is none anything may be found, but nothing is raised.

    Attributes:
        usage: the last one that was found and could be read.
    """

    __slots__ = (
        "_depth",
        "_ended",
        "_escaped",
        "_in_string",
        "_key",
        "_level",
        "_tail",
        "_want_name",
        "usage",
    )

    def __init__(self) -> None:
        self.usage: Usage | None = None
        self._depth = 0  # how many objects and arrays are open
        self._level = 0  # the depth at which members are looked at
        self._want_name = False
        self._key = b""  # of the member whose value comes
        self._in_string = False
        self._escaped = False  # the last byte was a backslash that escapes the next one
        self._ended = False
        self._tail = b""  # cannot be understood without what follows: a name, or a usage

    def feed(self, piece: bytes) -> None:
        """Take the next piece."""
        if self._ended or not piece:
            return
        data = self._tail + self._without_escapes(piece)
        at, end = 0, len(data)
        while at < end and not self._ended:
            if self._depth != self._level:
                at = self._pass_value(data, at)
            elif self._in_string:
                at = self._pass_string(data, at)
            else:
                step = self._read_name if self._want_name else self._read_value
                after = step(data, at)
                if after is None:
                    break
                at = after
        self._tail = data[at:]

    def end(self) -> None:
        """Look at nothing that comes."""
        self._ended = True

    def _without_escapes(self, piece: bytes) -> bytes:
        """Blank what could be taken for the end of a string. Backslashes are in strings only."""
        if self._escaped:
            piece = b" " + piece[1:]
            self._escaped = False
        if b"\\" in piece:
            piece = piece.replace(rb"\\", b"  ").replace(rb"\"", b"  ")
            if piece.endswith(b"\\"):
                piece = piece[:-1] + b" "
                self._escaped = True
        return piece

    def _pass_string(self, data: bytes, at: int) -> int:
        after = data.find(b'"', at) + 1
        self._in_string = not after
        return after or len(data)

    def _pass_value(self, data: bytes, at: int) -> int:
        """Pass over a block, or over what is left of the value if it ends in it."""
        block = data[at : at + _BLOCK_BYTES]
        texts = block.split(b'"')
        brackets = b"".join(texts[self._in_string :: 2]).translate(None, _NO_BRACKETS)
        length = -1
        while length != len(brackets):
            length = len(brackets)
            brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
        closing = length - len(brackets.lstrip(b"]}"))
        if closing >= self._depth - self._level:
            return self._leave_value(data, at)
        self._depth += length - 2 * closing
        self._in_string ^= len(texts) % 2 == 0
        return at + len(block)

    def _leave_value(self, data: bytes, at: int) -> int:
        for match in _BRACKET_OR_QUOTE.finditer(data, at):
            byte = match[0]
            if byte == b'"':
                self._in_string = not self._in_string
            elif not self._in_string:
                self._depth += 1 if byte in b"{[" else -1
                if self._depth == self._level:
                    return match.end()
        return len(data)

    def _read_name(self, data: bytes, at: int) -> int | None:
        if match := _NAME.match(data, at):
            self._key = match[1]
            self._want_name = False
            return match.end()
        at = _after(_SPACE, data, at)
        if at == len(data):
            return at
        if data[at] != _QUOTE:  # the object ends, or is none
            self._want_name = False
            return at
        if len(data) - at <= MAX_NAME_BYTES:
            return None
        self._key = b""
        self._want_name = False
        self._in_string = True
        return at + 1

    def _read_value(self, data: bytes, at: int) -> int | None:
        """Read up to the value of a member, into it, or behind it."""
        at = _after(_SPACE, data, at)
        if at == len(data):
            return at
        byte = data[at]
        if byte == _QUOTE:
            self._in_string = True
        elif byte == _COMMA:
            self._want_name = True
        elif byte in b"{[":
            return self._read_container(data, at)
        elif byte in b"}]":
            self._depth -= 1
            self._level = self._depth
        else:
            at = _after(_SCALAR, data, at) - 1
        self._ended = self._depth <= 0
        return at + 1

    def _read_container(self, data: bytes, at: int) -> int | None:
        is_object = data[at] == _OBJECT
        if is_object and self._level and self._key == b"usage":
            after = _after_object(data, at)
            if after:
                self.usage = _counts(data[at:after])
                return after
            if len(data) - at <= MAX_USAGE_BYTES:
                return None
        self._depth += 1
        if is_object and (not self._level or (self._level == 1 and self._key in _WRAPPERS)):
            self._level = self._depth
            self._want_name = True
        return at + 1


def _after(pattern: re.Pattern[bytes], data: bytes, at: int) -> int:
    match = pattern.match(data, at)
    return match.end() if match else at


def _after_object(data: bytes, at: int) -> int:
    """Return where the object that begins at `at` has ended, or 0 where it has not."""
    depth, in_string = 0, False
    for match in _BRACKET_OR_QUOTE.finditer(data, at, at + MAX_USAGE_BYTES):
        byte = match[0]
        if byte == b'"':
            in_string = not in_string
        elif not in_string:
            depth += 1 if byte in b"{[" else -1
            if not depth:
                return match.end()
    return 0


def _decoded(text: bytes) -> Usage | None:
    """Read the usage of a whole JSON text."""
    if _KEY not in text:
        return None
    try:
        answer = _answer.decode(text)
        fields = answer.usage
        for inner in (bytes(answer.response), bytes(answer.message)):
            if fields is None and inner.lstrip().startswith(b"{"):
                fields = _answer.decode(inner).usage
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return None if fields is None else _usage(fields)


def _counts(text: bytes) -> Usage | None:
    try:
        return _usage(_fields.decode(text))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _usage(fields: _Fields) -> Usage:
    prompt_tokens = fields.prompt_tokens or fields.input_tokens or 0
    cached_tokens = _cached(fields.prompt_tokens_details or fields.input_tokens_details)
    return Usage(
        prompt_tokens,
        fields.completion_tokens or fields.output_tokens or 0,
        cached_tokens if cached_tokens is None else min(prompt_tokens, cached_tokens),
    )


def _cached(details: msgspec.Raw) -> int | None:
    """Return the tokens of a prompt that were in the server's cache; None where it does not say."""
    text = bytes(details)
    if not text:
        return None
    try:
        found = _details.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    cached_tokens: int | None = None if found is None else found.cached_tokens
    return cached_tokens if cached_tokens is None else max(0, cached_tokens)


def _most(one: int | None, other: int | None) -> int | None:
    """Return the greater of two counts that are known, or the one that is."""
    return max((count for count in (one, other) if count is not None), default=None)
