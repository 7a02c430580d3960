"""The model name in a request's body, JSON or a form: read, and replaced."""

from __future__ import annotations

import re
from typing import NamedTuple

import msgspec

from forebay_epp.codec.openai import forms
from forebay_epp.codec.openai.errors import BadRequestError

MAX_MODEL_LENGTH = 256
READ_CUT_BYTES = 64 << 10
_STRING = rb'"(?:[^"\\]|\\.)*+"'
# The last alternative is the quote of a string that was cut.
_TOKENS = re.compile(
    rb'"model"\s*+:\s*+(?P<model>' + _STRING + rb")|" + _STRING + rb'|[\[\]{}]|"', re.DOTALL
)
_TOO_DEEP = "the body is not accepted: it is nested too deeply"
_MISSING = "model not found in request body: name the model to use"


class _NotAnObjectError(BadRequestError):
    """The body is JSON that has no members."""


class Asked(NamedTuple):
    """What a body asks for: the name of the model, "" where it says none, and a stream or not."""

    model: str = ""
    streamed: bool = False


class _Fields(msgspec.Struct):
    model: str | None = None
    stream: msgspec.Raw = msgspec.Raw()  # a server judges what is neither true nor false


_fields = msgspec.json.Decoder(_Fields)
_members = msgspec.json.Decoder(dict[str, msgspec.Raw])


def read_asked(
    body: bytes, content_type: str = "", *, optional: bool = False, default: str | None = None
) -> Asked:
    """Return what a request asks for. Of a form only the model is known.

    Only these fields are decoded; the rest is checked to be JSON, or a form, and skipped.

    Args:
        body: the whole body.
        content_type: the header's value; a body that is not a form is read as JSON regardless.
        optional: the request need not name a model, nor be JSON if it does not say so.
        default: the model that is meant where none is named; None where there is none to mean.

    Raises:
        BadRequestError: not UTF-8, not JSON or not a form, too deeply nested, or no usable model.
    """
    if optional and not body:
        return Asked()
    streamed = False
    if forms.is_form(content_type):
        place = forms.find_field(body, content_type, "model")
        model = None if place is None else _decode(body[place], "model")
    else:
        try:
            model, streamed = _read_json(body)
        except BadRequestError as error:
            if optional and _without_model(error, content_type):
                return Asked()
            raise
    if model is not None:
        return Asked(_checked(model), streamed)
    if default is None and not optional:
        raise BadRequestError(_MISSING, "model")
    return Asked(default or "", streamed)


def read_cut_model(body: bytes, content_type: str = "") -> str:
    """Return the name of the model in the beginning of a body, or "" if it is not there.

    The first `READ_CUT_BYTES` are searched for a member `model` of the outermost object. A second
    one may follow in what was cut off, so a client can name one model here and another there.

    Raises:
        BadRequestError: the name is no usable one.
    """
    if forms.is_form(content_type):
        return ""
    depth = 0
    model = ""
    for token in _TOKENS.finditer(body[:READ_CUT_BYTES]):
        text = token[0]
        if text in (b"{", b"["):
            depth += 1
        elif text in (b"}", b"]"):
            depth -= 1
        elif text == b'"':
            break
        elif depth == 1 and token["model"] is not None:
            try:
                model = _checked(msgspec.json.decode(token["model"], type=str))
            except (msgspec.DecodeError, UnicodeDecodeError):
                return ""
    return model


def with_model(body: bytes, model: str, content_type: str = "") -> bytes:
    """Return the same JSON object or form under another model name; the rest keeps its bytes.

    Raises:
        BadRequestError: nested too deeply for what is left of the stack, which may be less than
            `read_asked` had; or the name cannot be written into a form.
    """
    if forms.is_form(content_type):
        return forms.with_field(body, content_type, "model", model)
    try:
        members = _members.decode(body)
    except RecursionError:
        raise BadRequestError(_TOO_DEEP) from None
    members["model"] = msgspec.Raw(msgspec.json.encode(model))
    return msgspec.json.encode(members)


def _checked(model: str) -> str:
    if not model:
        raise BadRequestError("model must not be empty", "model")
    if len(model) > MAX_MODEL_LENGTH:
        raise BadRequestError(
            f"model must be at most {MAX_MODEL_LENGTH} characters, has {len(model)}", "model"
        )
    if not model.isprintable():
        raise BadRequestError("model must not contain control characters", "model")
    return model


def _read_json(body: bytes) -> tuple[str | None, bool]:
    _decode(body, None)
    try:
        fields = _fields.decode(body)
    except msgspec.ValidationError as error:
        if "$.model" in str(error):
            raise BadRequestError("model must be a string", "model") from None
        raise _NotAnObjectError("the body must be a JSON object with a member model") from None
    except msgspec.DecodeError as error:
        reason = "it is empty" if not body else str(error)
        raise BadRequestError(f"the body is not valid JSON: {reason}") from None
    except RecursionError:
        raise BadRequestError(_TOO_DEEP) from None
    return fields.model, bytes(fields.stream) == b"true"


def _decode(text: bytes, param: str | None) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        what = param or "the body"
        raise BadRequestError(f"{what} is not UTF-8: {error.reason}", param) from None


def _without_model(error: BadRequestError, content_type: str) -> bool:
    """Return whether a body that cannot be read as a JSON object surely names no model.

    One that says it is JSON, or says nothing, may be read more leniently by a server.
    """
    kind = content_type.partition(";")[0].strip().lower()
    is_json = not kind or kind == "application/json" or kind.endswith("+json")
    return isinstance(error, _NotAnObjectError) or (error.param is None and not is_json)
