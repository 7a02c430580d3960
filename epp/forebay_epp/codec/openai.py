"""What an endpoint picker reads and writes of OpenAI-style HTTP bodies.

Requests: the model name, and the same body under another name. Answers: usage, the client's model
name put back. Refusals: OpenAI's error object. How bodies travel is extproc.py's business.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import unquote

import msgspec

from forebay_epp.core.terms import Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_MODEL_LENGTH = 256
MAX_USAGE_BYTES = 1 << 20
MAX_EVENT_BYTES = 16 << 10
_TOO_DEEP = "the body is not accepted: it is nested too deeply"

# Paths whose POST body names a model; matched as suffixes, so that prefixes of gateways pass.
_MODEL_PATHS = (
    "/completions",
    "/chat/completions",
    "/embeddings",
    "/responses",
    "/messages",
    "/messages/count_tokens",
    "/completions/render",
    "/images/generations",
)

HTTP_STATUS = {
    Outcome.REJECTED_BAD_REQUEST: 400,
    Outcome.REJECTED_UNKNOWN_MODEL: 404,
    Outcome.REJECTED_INCOMPLETE: 408,
    Outcome.REJECTED_TOO_LARGE: 413,
    Outcome.REJECTED_UNSUPPORTED_ENCODING: 415,
    Outcome.REJECTED_QUEUE_FULL: 429,
    Outcome.REJECTED_NO_ENDPOINTS: 503,
    Outcome.REJECTED_SHUTTING_DOWN: 503,
    Outcome.EVICTED_TTL: 429,
    Outcome.EVICTED_CANCELLED: 503,
    Outcome.EVICTED_NO_ENDPOINTS: 503,
    Outcome.EVICTED_SHUTTING_DOWN: 503,
}


class BadRequestError(ValueError):
    """A body that cannot be read; the text is for the client. `param` names the field, if one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class _RequestFields(msgspec.Struct):
    model: str


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


_request = msgspec.json.Decoder(_RequestFields)
_members = msgspec.json.Decoder(dict[str, msgspec.Raw])
_answer = msgspec.json.Decoder(_Answer)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as the model server counted them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


def names_model(method: str, path: str) -> bool:
    """Tell whether a request to this path must name a model in a JSON body.

    A client that shows no path (NGINX Gateway Fabric) is taken to send completions.
    """
    if not path:
        return True
    if method != "POST":
        return False
    path = path.partition("?")[0]
    if "%" in path:  # servers decode it, so an escaped letter must not hide the model
        path = unquote(path)
    return path.rstrip("/").endswith(_MODEL_PATHS)


def read_model(body: bytes) -> str:
    """Return the model name of a request body.

    Only that field is decoded; the rest is checked to be JSON and skipped.

    Raises:
        BadRequestError: not UTF-8, not JSON, too deeply nested, or no usable model.
    """
    try:
        body.decode()
        model = _request.decode(body).model
    except UnicodeDecodeError as error:
        raise BadRequestError(f"the body is not UTF-8: {error.reason}") from None
    except msgspec.ValidationError as error:
        raise _invalid_field(str(error)) from None
    except msgspec.DecodeError as error:
        reason = "it is empty" if not body else str(error)
        raise BadRequestError(f"the body is not valid JSON: {reason}") from None
    except RecursionError:
        raise BadRequestError(_TOO_DEEP) from None
    if not model:
        raise BadRequestError("model must not be empty", "model")
    if len(model) > MAX_MODEL_LENGTH:
        raise BadRequestError(
            f"model must be at most {MAX_MODEL_LENGTH} characters, has {len(model)}", "model"
        )
    if not model.isprintable():
        raise BadRequestError("model must not contain control characters", "model")
    return model


def _invalid_field(problem: str) -> BadRequestError:
    if "missing required field" in problem:
        return BadRequestError("model not found in request body: name the model to use", "model")
    if "$.model" in problem:
        return BadRequestError("model must be a string", "model")
    return BadRequestError("the body must be a JSON object with a member model")


def with_model(body: bytes, model: str) -> bytes:
    """Return the same JSON object under another model name; other members keep their bytes.

    Raises:
        BadRequestError: nested too deeply for what is left of the stack, which may be less than
            `read_model` had.
    """
    try:
        members = _members.decode(body)
    except RecursionError:
        raise BadRequestError(_TOO_DEEP) from None
    members["model"] = msgspec.Raw(msgspec.json.encode(model))
    return msgspec.json.encode(members)


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


def error_body(outcome: Outcome, message: str, param: str | None = None) -> bytes:
    """Return OpenAI's error object for a refusal."""
    status = HTTP_STATUS[outcome]
    if status < 429:
        kind = "invalid_request_error"
    elif status == 429:
        kind = "rate_limit_error"
    else:
        kind = "service_unavailable_error"
    error = {"message": message, "type": kind, "param": param, "code": str(outcome)}
    return msgspec.json.encode({"error": error})


def split(body: bytes, size_bytes: int) -> Sequence[bytes]:
    """Cut a body into pieces of at most `size_bytes`; an empty body is one empty piece."""
    if len(body) <= size_bytes:
        return (body,)
    return [body[start : start + size_bytes] for start in range(0, len(body), size_bytes)]
