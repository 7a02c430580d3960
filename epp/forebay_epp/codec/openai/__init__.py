"""The parts of OpenAI-style HTTP bodies that an EPP reads and writes.

Requests: the model name, names for the beginnings of the prompt, and the same body under another
model name. Answers: usage, the client's model name put back. Refusals: OpenAI's error object. The
list of models. How bodies travel is codec/extproc.
"""

from forebay_epp.codec.openai.catalogue import (
    MAX_SERVED_MODELS,
    Catalogue,
    ServedModel,
    asked_model,
    read_served,
)
from forebay_epp.codec.openai.errors import HTTP_STATUS, BadRequestError, error_body
from forebay_epp.codec.openai.paths import ModelField, model_field
from forebay_epp.codec.openai.prompts import read_prefix
from forebay_epp.codec.openai.renaming import ModelRestorer
from forebay_epp.codec.openai.requests import read_asked, read_cut_model, with_model
from forebay_epp.codec.openai.usage import EventUsageReader, JSONUsageReader
from forebay_epp.core.terms import Usage

__all__ = [
    "HTTP_STATUS",
    "MAX_SERVED_MODELS",
    "BadRequestError",
    "Catalogue",
    "EventUsageReader",
    "JSONUsageReader",
    "ModelField",
    "ModelRestorer",
    "ServedModel",
    "Usage",
    "asked_model",
    "error_body",
    "model_field",
    "read_asked",
    "read_cut_model",
    "read_prefix",
    "read_served",
    "with_model",
]
