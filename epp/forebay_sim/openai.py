"""The OpenAI API as vLLM speaks it: request bodies read, answers and their chunks written.

Pure translation. Tokens are approximated: four characters are one. Sockets do not belong here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import blake2b
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from forebay_sim.terms import Usage

_T = TypeVar("_T")

CHARACTERS_PER_TOKEN = 4
DEFAULT_MAX_TOKENS = 50

# One word is one token of an answer. All have the same length, so chunks have as well.
WORDS = (" water", " river", " canal", " gates", " flows", " pools", " rapid", " basin")


class BadRequestError(ValueError):
    """The body is not a request that can be answered; `param` is the field at fault, if any."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """What the simulator takes from the body of a completion or chat completion.

    Attributes:
        chat: whether it came to /v1/chat/completions.
        model: name as the client wrote it; "" when absent.
        prompt: all text of the prompt, in order.
        max_tokens: length of the answer.
        finish_reason: "length" when the client bounded the answer, else "stop".
        stream: whether the answer is to be server-sent events.
        include_usage: whether the stream ends with a chunk of usage.
        schema_bytes: length of the JSON schema that the answer has to follow; 0 without one.
    """

    chat: bool
    model: str
    prompt: str
    max_tokens: int
    finish_reason: str
    stream: bool
    include_usage: bool
    schema_bytes: int

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt, at least 1."""
        return max(1, -(-len(self.prompt) // CHARACTERS_PER_TOKEN))


def parse_request(body: bytes, *, chat: bool) -> InferenceRequest:
    """Read the body of a chat completion (`chat`) or completion.

    Raises:
        BadRequestError: it is not JSON, or a field has a value that cannot be used.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise BadRequestError("the body must be a JSON object")
    if fields.get("n") not in {None, 1}:
        raise BadRequestError("only n=1 is simulated", "n")
    bound = _max_tokens(fields)
    options = _optional(fields, "stream_options", dict, {})
    schema = _optional(fields, "response_format", dict, {}).get("json_schema")
    return InferenceRequest(
        chat=chat,
        model=_optional(fields, "model", str, ""),
        prompt=_messages_text(fields) if chat else _prompt_text(fields),
        max_tokens=DEFAULT_MAX_TOKENS if bound is None else bound,
        finish_reason="stop" if bound is None else "length",
        stream=_optional(fields, "stream", bool, default=False),
        include_usage=_optional(options, "include_usage", bool, default=False),
        schema_bytes=len(json.dumps(schema)) if schema else 0,
    )


def block_hashes(prompt: str, block_size_tokens: int, adapter: str) -> tuple[int, ...]:
    """Name the prompt's full KV blocks, each by all text up to its end and the adapter."""
    size = block_size_tokens * CHARACTERS_PER_TOKEN
    chain = blake2b(adapter.encode(errors="surrogatepass"), digest_size=8)
    names = []
    for end in range(size, len(prompt) + 1, size):
        chain.update(prompt[end - size : end].encode(errors="surrogatepass"))
        names.append(int.from_bytes(chain.digest()))
    return tuple(names)


def error_body(status: int, message: str, kind: str, param: str | None = None) -> bytes:
    """Return an error in OpenAI's shape; `kind` is its type, as "NotFoundError"."""
    error = {"message": message, "type": kind, "param": param, "code": status}
    return json.dumps({"error": error}).encode()


class AnswerFormat:
    """Writes one request's answer. `name` becomes its id, `created` is UNIX seconds."""

    def __init__(self, request: InferenceRequest, name: str, model: str, created: int) -> None:
        self._request = request
        self._model = model
        kind = "chat.completion" if request.chat else "text_completion"
        self._head: dict[str, Any] = {
            "id": f"{'chatcmpl' if request.chat else 'cmpl'}-{name}",
            "object": kind + ".chunk" if request.chat and request.stream else kind,
            "created": created,
            "model": model,
        }

    def whole(self, usage: Usage) -> bytes:
        """Return the whole answer as one JSON body."""
        text = "".join(islice(cycle(WORDS), usage.completion_tokens))
        content: dict[str, Any] = {"text": text}
        if self._request.chat:
            content = {"message": {"role": "assistant", "content": text}}
        choice = {
            "index": 0,
            **content,
            "logprobs": None,
            "finish_reason": self._request.finish_reason,
        }
        return json.dumps(self._head | {"choices": [choice], "usage": _usage(usage)}).encode()

    def opening(self) -> bytes:
        """Return the event before the first token: the role, in a chat."""
        if not self._request.chat:
            return b""
        return self._event(self._choice({"delta": {"role": "assistant", "content": ""}}, None))

    def token_events(self) -> tuple[bytes, ...]:
        """Return the events of tokens; token number i is at i modulo their count."""
        return tuple(self._token(word, None) for word in WORDS)

    def closing(self, usage: Usage) -> bytes:
        """Return the last token's event, that of the usage if wanted, and the end mark."""
        last = WORDS[(usage.completion_tokens - 1) % len(WORDS)]
        events = self._token(last, self._request.finish_reason)
        if self._request.include_usage:
            events += self._event({"choices": [], "usage": _usage(usage)})
        return events + b"data: [DONE]\n\n"

    def _token(self, word: str, finish_reason: str | None) -> bytes:
        content = {"delta": {"content": word}} if self._request.chat else {"text": word}
        return self._event(self._choice(content, finish_reason))

    def _choice(self, content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}
        return {"choices": [choice]}

    def _event(self, fields: dict[str, Any]) -> bytes:
        return b"data: %b\n\n" % _COMPACT.encode(self._head | fields).encode()


_COMPACT = json.JSONEncoder(separators=(",", ":"))


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "completion_tokens": usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _optional(fields: dict[str, Any], name: str, kind: type[_T], default: _T) -> _T:
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise BadRequestError(f"{name} must be of type {kind.__name__}", name)
    return value


def _max_tokens(fields: dict[str, Any]) -> int | None:
    for name in ("max_completion_tokens", "max_tokens"):
        value = fields.get(name)
        if value is not None:
            if type(value) is not int or value < 1:
                raise BadRequestError(f"{name} must be an integer of at least 1", name)
            return value
    return None


def _messages_text(fields: dict[str, Any]) -> str:
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequestError("messages must be a list of at least one message", "messages")
    texts: list[str] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise BadRequestError(f"{where} must be an object", "messages")
        content = message.get("content")
        if isinstance(content, str):
            texts.append(content)
        elif isinstance(content, list):
            parts = [part.get("text", "") for part in content if isinstance(part, dict)]
            if not all(isinstance(part, str) for part in parts):
                raise BadRequestError(f"{where}.content: text must be a string", "messages")
            texts += parts
        elif content is not None:
            raise BadRequestError(f"{where}.content must be text or a list of parts", "messages")
    return "".join(texts)


def _prompt_text(fields: dict[str, Any]) -> str:
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]  # a batch of one
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        # Token ids, spelt so that each is as long as one token of text.
        return "".join(f"{token & 0xFFFF:04x}" for token in prompt)
    raise BadRequestError("prompt must be one string or one list of token ids", "prompt")
