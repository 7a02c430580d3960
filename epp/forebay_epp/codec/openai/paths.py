"""Which requests name a model, by method and path.

The paths are those of OpenAI's, Anthropic's and Cohere's APIs and of the model servers' own (vLLM,
SGLang, TGI, Ollama). How a body names its model is requests.py.
"""

from __future__ import annotations

from enum import Enum, auto
from urllib.parse import unquote


class ModelField(Enum):
    """Whether a request to a path names a model in its body."""

    NONE = auto()
    OPTIONAL = auto()
    REQUIRED = auto()


# Matched as suffixes, so that prefixes of gateways and versions pass.
_REQUIRED = (
    "/completions",
    "/chat/completions",
    "/chat/completions/batch",
    "/completions/render",
    "/embeddings",
    "/responses",
    "/messages",
    "/messages/count_tokens",
    "/audio/transcriptions",
    "/audio/translations",
    "/audio/speech",
)
_OPTIONAL = (
    "/images/generations",
    "/images/edits",
    "/images/variations",
    "/videos",
    "/moderations",
    "/responses/input_tokens",
    "/invocations",
    "/generate",
    "/generate_stream",
    "/generative_scoring",
    "/rerank",
    "/score",
    "/pooling",
    "/classify",
    "/embed",
    "/encode",
    "/tokenize",
    "/detokenize",
    "/infill",
    "/api/chat",
)


def model_field(method: str, path: str) -> ModelField:
    """Return whether a request to this path names a model in its body.

    A client that shows no path (NGINX Gateway Fabric) is taken to send completions.
    """
    if not path:
        return ModelField.REQUIRED
    if method != "POST":
        return ModelField.NONE
    path = decoded(path)
    if path.endswith(_REQUIRED):
        return ModelField.REQUIRED
    return ModelField.OPTIONAL if path.endswith(_OPTIONAL) else ModelField.NONE


def decoded(path: str) -> str:
    """Return the path as servers see it: an escaped letter must not hide the model."""
    path = path.partition("?")[0]
    if "%" in path:
        path = unquote(path)
    return path.rstrip("/")
