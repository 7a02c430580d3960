"""Fills a part of the Plan from resources: what has one name in both needs no line of its own."""

from __future__ import annotations

import functools
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel

from forebay_control.fields import fields_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from _typeshed import DataclassInstance

    from forebay_control.fields import Field

T = TypeVar("T", bound="DataclassInstance")


def drawn(kind: type[T], *parts: BaseModel | None, **given: Any) -> T:
    """Return a part of the Plan, each field of which comes from the resources' field of its name.

    For a field inside an object the Plan joins both names, such as no_endpoints_ttl.
    The name of a duration also ends in _seconds.

    Args:
        kind: of the part.
        parts: of resources; of several that have a field the first that has a value counts.
        given: fields with another name there, and derived ones. A field that is set nowhere has
            the Plan's default.
    """
    for part in parts:
        if part is None:
            continue
        for field, get in _shared(kind, type(part)):
            value = None if field.name in given else get(part)
            if value is not None:
                given[field.name] = _converted(field, value)
    return kind(**given)


@functools.cache
def _shared(
    kind: type[DataclassInstance], part: type[BaseModel]
) -> tuple[tuple[Field, Callable[[BaseModel], Any]], ...]:
    """Return the fields of the Plan that a part of a resource has, and what gets their values."""
    paths = dict(_paths(part))
    names = ((field, field.name.removesuffix("_seconds")) for field in fields_of(kind))
    return tuple((field, attrgetter(paths[name])) for field, name in names if name in paths)


def _paths(part: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Yield for each field, and each of objects that are always there, its name and its path."""
    for name, info in part.model_fields.items():
        yield name, name
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            for inner in info.annotation.model_fields:
                yield f"{name}_{inner}", f"{name}.{inner}"


def _converted(field: Field, value: Any) -> Any:
    if not field.part:
        return tuple(value) if field.many else field.kind(value)
    if field.many:
        return tuple(drawn(field.kind, part) for part in value)
    return drawn(field.kind, value)
