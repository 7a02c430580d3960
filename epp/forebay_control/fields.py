"""Types and bounds of fields, as the annotations of the Plan's dataclasses declare them.

Validation and both mappings of the Plan, from resources and to protobuf, read a field's declaration
here, so it is made once. The fields themselves belong in plan.py.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import types
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import re
    from collections.abc import Iterable, Sequence

    from _typeshed import DataclassInstance

Problem = tuple[str, str]
"""A path, from where it was found, and what is wrong there and must be."""


class Bound(Protocol):
    """What a value must be besides its type."""

    def holds(self, values: Iterable[Any]) -> bool:
        """Return whether every one of several values is within the bound."""

    def problems(self, value: Any) -> Sequence[Problem]:
        """Return what is wrong with a value that is not; paths are relative to it."""


@dataclass(frozen=True, slots=True)
class Range:
    """A number from `least` to `most`; with `above`, `least` itself is too small."""

    least: float
    most: float
    above: bool = False

    def holds(self, values: Iterable[float]) -> bool:
        """Compare; what is not a number is outside."""
        least, most = self.least, self.most
        if self.above:
            return all(least < value <= most for value in set(values))
        return all(least <= value <= most for value in set(values))

    def problems(self, value: float) -> Sequence[Problem]:
        """Name the bounds."""
        if self.above:
            return (("", f"must be above {self.least} and at most {self.most}, is {value}"),)
        return (("", f"must be {self.least} to {self.most}, is {value}"),)


@dataclass(frozen=True, slots=True)
class Length:
    """A text or a list that has at least `least` and at most `most` characters or entries."""

    least: int
    most: int

    def holds(self, values: Iterable[Sequence[object]]) -> bool:
        """Count."""
        least, most = self.least, self.most
        return all(least <= length <= most for length in set(map(len, values)))

    def problems(self, value: Sequence[object]) -> Sequence[Problem]:
        """Name the bounds."""
        unit = "characters" if isinstance(value, str) else "entries"
        return (("", f"must have {self.least}-{self.most} {unit}, has {len(value)}"),)


@dataclass(frozen=True, slots=True)
class Matches:
    """A text of which all matches a pattern; `what` says in words what that is."""

    pattern: re.Pattern[str]
    what: str

    def holds(self, values: Iterable[str]) -> bool:
        """Match."""
        return all(map(self.pattern.fullmatch, values))

    def problems(self, value: str) -> Sequence[Problem]:
        """Describe the bound."""
        return (("", f"must be {self.what}, is {value!r}"),)


@dataclass(frozen=True, slots=True)
class Unique:
    """A list of which no two entries have the same value in this field."""

    name: str

    def holds(self, values: Iterable[Sequence[object]]) -> bool:
        """Count what is different in each list."""
        key = operator.attrgetter(self.name)
        return all(len(set(map(key, value))) == len(value) for value in values)

    def problems(self, value: Sequence[object]) -> Sequence[Problem]:
        """Name each entry that repeats an earlier one."""
        path, first = camel_case(self.name), dict[object, int]()
        return [
            (f"[{index}].{path}", f"must be unique, and {key!r} is that of [{first[key]}]")
            for index, key in enumerate(getattr(entry, self.name) for entry in value)
            if first.setdefault(key, index) != index
        ]


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a dataclass.

    Attributes:
        name: in Python and in the message.
        path: in errors and in JSON.
        kind: the type of the value, or of an entry where it is a list.
        many: the value is a list, as a tuple.
        optional: the value may be None, which is unset.
        bounds: of the value, not of each entry.
        part: `kind` is a dataclass itself.
        default: of the value; `dataclasses.MISSING` where it has to be given.
    """

    name: str
    path: str
    kind: type
    many: bool
    optional: bool
    bounds: tuple[Bound, ...]
    part: bool
    default: Any


@functools.cache
def fields_of(kind: type[DataclassInstance]) -> tuple[Field, ...]:
    """Return the fields of a dataclass in the order of its constructor's arguments.

    Raises:
        TypeError: an annotation is none of those that the Plan uses.
    """
    hints = typing.get_type_hints(kind, include_extras=True)
    return tuple(
        _field(field.name, hints[field.name], field.default) for field in dataclasses.fields(kind)
    )


def holds(kind: type[DataclassInstance], values: Sequence[Any]) -> bool:
    """Return whether every bound and rule holds in dataclasses of one kind and in their parts.

    They are checked field by field, each over all values: a plan has thousands of models.
    """
    for field in fields_of(kind):
        items = list(map(operator.attrgetter(field.name), values))
        if field.optional:
            items = [item for item in items if item is not None]
        if not all(bound.holds(items) for bound in field.bounds):
            return False
        if field.part:
            parts = list(itertools.chain.from_iterable(items)) if field.many else items
            if parts and not holds(field.kind, parts):
                return False
    return not hasattr(kind, "rules") or not any(value.rules() for value in values)


def problems_of(value: DataclassInstance) -> list[Problem]:
    """Return every violated bound and rule in a dataclass and in its parts.

    A class states what its fields must be together in a method `rules`, which returns problems.
    Of a field's bounds the first that is violated counts.
    """
    found: list[Problem] = []
    kind = type(value)
    for field in fields_of(kind):
        item = getattr(value, field.name)
        if item is None:
            continue
        broken = next((bound for bound in field.bounds if not bound.holds((item,))), None)
        if broken is not None:
            found += within(field.path, broken.problems(item))
        if not field.part:
            continue
        if field.many:
            for index, entry in enumerate(item):
                if inner := problems_of(entry):
                    found += within(f"{field.path}[{index}]", inner)
        elif inner := problems_of(item):
            found += within(field.path, inner)
    rules = getattr(value, "rules", None)
    return found if rules is None else [*found, *rules()]


def within(path: str, problems: Sequence[Problem]) -> list[Problem]:
    """Put a path before those of problems that were found inside it."""
    return [
        (f"{path}.{inner}" if inner and not inner.startswith("[") else path + inner, what)
        for inner, what in problems
    ]


def camel_case(name: str) -> str:
    """Write a name as JSON and Kubernetes do."""
    first, *others = name.split("_")
    return first + "".join(word.capitalize() for word in others)


def _field(name: str, hint: Any, default: Any) -> Field:
    bounds: tuple[Bound, ...] = ()
    many = optional = False
    while not isinstance(hint, type) or typing.get_origin(hint) is not None:
        arguments = typing.get_args(hint)
        match typing.get_origin(hint):
            case typing.Annotated if not many:
                hint, bounds = arguments[0], (*bounds, *hint.__metadata__)
            case types.UnionType if arguments[1:] == (types.NoneType,):
                hint, optional = arguments[0], True
            case origin if origin is tuple and arguments[1:] == (...,):
                hint, many = arguments[0], True
            case _:
                raise TypeError(f"{name}: {hint} is not a type that the Plan knows")
    part = dataclasses.is_dataclass(hint)
    return Field(name, camel_case(name), hint, many, optional, bounds, part, default)
