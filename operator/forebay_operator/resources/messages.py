"""Describes what is wrong with a manifest, for the author of the YAML.

Declaring fields does not belong here: the models beside this module do.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import BaseModel, ValidationError

MAX_PROBLEMS = 10
MAX_CHARACTERS = 60
MAX_BITS = 128

_WANTED = {
    "model_type": "must be an object",
    "dict_type": "must be an object",
    "tuple_type": "must be a list",
    "string_type": "must be a string",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "invalid_key": "the name of a field must be a string",
}
_OF_ANOTHER_SHAPE = {"extra_forbidden", "tuple_type", "model_type"}


def problems(kind: type[BaseModel], error: ValidationError) -> list[tuple[str, str]]:
    """Return (field path, what is wrong) pairs, the first ten and how many more there are."""
    details = error.errors(include_url=False)
    renamed = {path: now for detail in details for path, now in _renamed(kind, detail)}
    details = [
        detail
        for detail in details
        # A list is not empty because all its entries were refused.
        if not (detail["type"] == "too_short" and _entries_refused(detail["loc"], details))
        # What has the name of earlier is not missing.
        and not (detail["type"] == "missing" and _path(detail["loc"]) in renamed.values())
    ]
    found = []
    for detail in details[:MAX_PROBLEMS]:
        path, what = _path(_place(detail)), _problem(kind, detail)
        found.append((path, f"is {renamed[path]} now" if path in renamed else what))
    if more := details[MAX_PROBLEMS:]:
        found.append(("...", f"and {len(more)} more problems"))
    return found


def _renamed(kind: type[BaseModel], detail: Any) -> Iterator[tuple[str, str]]:
    """Yield the path of a field that is written as in an earlier shape, and its path of today."""
    if detail["type"] not in _OF_ANOTHER_SHAPE:
        return
    path = _path(detail["loc"])
    now = getattr(kind, "renamed", {}).get(re.sub(r"\[\d+\]", "[]", path))
    if now is not None:
        for index in re.findall(r"\[\d+\]", path):
            now = now.replace("[]", index, 1)
        yield path, now


def _place(detail: Any) -> tuple[int | str, ...]:
    """Return the path to the invalid value, which a check of what is around it may have found."""
    location: tuple[int | str, ...] = detail["loc"]
    return (*location, *detail["ctx"]["place"]) if detail["type"] == "misplaced" else location


def _entries_refused(location: tuple[int | str, ...], details: list[Any]) -> bool:
    depth = len(location)
    return any(len(d["loc"]) > depth and d["loc"][:depth] == location for d in details)


def printable(text: str) -> str:
    """Escape what would move a terminal's cursor or cannot be encoded."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: object) -> str:
    """Write a manifest's value for an error message: short, and as in YAML."""
    match value:
        case dict():
            return "an object"
        case list() | tuple():
            return "a list"
        case int() if value.bit_length() > MAX_BITS:
            return "a huge number"
        case str() | int() | float() | None:
            text = json.dumps(value, ensure_ascii=False)
        case _:
            text = str(value)
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}..."


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.lstrip(".")


def _problem(kind: type[BaseModel], detail: Any) -> str:
    """Describe what is wrong with a field, for the author of the YAML."""
    context = detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden":
            return f"unknown field; known fields are {', '.join(_fields(kind, detail['loc'][:-1]))}"
        case "literal_error" | "enum":
            expected = context["expected"].replace("'", "").replace(" or ", ", ")
            return f"{shown(detail['input'])} is not one of {expected}"
        case "missing":
            return "is required"
        case "value_error":
            return str(context["error"])
        case "misplaced":
            return str(detail["msg"])
        case "too_long":
            return f"must have at most {context['max_length']} entries"
        case "too_short":
            return "must not be empty"
    wanted = _WANTED.get(detail["type"]) or re.sub("^(Input|String) should", "must", detail["msg"])
    return f"{wanted}, not {shown(detail['input'])}"


def _fields(kind: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Return the field names at a path of a resource, as they are written in YAML."""
    model: type[BaseModel] = kind
    for part in location:
        if isinstance(part, int):
            continue
        annotation: Any = next(
            field.annotation for field in model.model_fields.values() if field.alias == part
        )
        arguments = getattr(annotation, "__args__", ())
        model = arguments[0] if arguments else annotation
    return sorted(field.alias or name for name, field in model.model_fields.items())
