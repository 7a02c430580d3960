"""The Plan as the contract's message, and back: by the names and types of the two declarations.

A dataclass is a message with the same fields, a tuple a repeated field, None an unset message and a
StrEnum a string. An `optional` field of the message is absent where the value is the default, so
that a release without it can be told from one that says the same. Reading a plan ends with its
bounds and rules, so that what comes out is valid.
"""

from __future__ import annotations

import functools
import operator
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

from forebay_control.fields import Length, fields_of, within
from forebay_control.plan import Plan, PlanError
from forebay_control.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from _typeshed import DataclassInstance
    from google.protobuf.descriptor import Descriptor
    from google.protobuf.message import Message

    from forebay_control.fields import Field, Problem

    _Convert = Callable[[Any, list[Problem]], Any]

T = TypeVar("T", bound="DataclassInstance")


def plan_to_message(plan: Plan) -> pb.Plan:
    """Return a plan as the channel carries it.

    Raises:
        PlanError: the plan is not valid; with the path of every field that is wrong.
    """
    plan.validate()
    message = pb.Plan()
    write(plan, message)
    return message


def plan_from_message(message: pb.Plan) -> Plan:
    """Return the plan that a message holds, which is valid.

    Raises:
        PlanError: with the path of every field that is wrong, as in plan.bands[0].fairness.
    """
    problems: list[Problem] = []
    plan = read(Plan, message, problems)
    try:
        plan.validate()
    except PlanError as error:
        problems += error.problems
    if problems:
        raise PlanError(within("plan", problems))
    return plan


def write(value: DataclassInstance, message: Message) -> None:
    """Write a dataclass into an empty message of the same fields.

    Raises:
        PlanError: a value does not fit into its field of the message.
        TypeError: the two do not have the same fields.
    """
    for field in _fields(type(value), message.DESCRIPTOR):
        item, path = getattr(value, field.name), field.path
        try:
            if field.many and field.part:
                entries = getattr(message, field.name)
                for index, entry in enumerate(item):
                    path = f"{field.path}[{index}]"
                    write(entry, entries.add())
            elif field.many:
                getattr(message, field.name).extend(item)
            elif not field.part:
                if item != field.default or not _may_be_absent(field, message.DESCRIPTOR):
                    setattr(message, field.name, item)
            elif item is not None:
                part = getattr(message, field.name)
                part.SetInParent()
                write(item, part)
        except PlanError as error:
            raise PlanError(within(path, error.problems)) from None
        except (TypeError, ValueError) as error:
            raise PlanError([(path, f"does not fit into the message: {error}")]) from None


def read(kind: type[T], message: Message, problems: list[Problem]) -> T:
    """Return the dataclass that a message of the same fields holds; its bounds are not checked.

    Args:
        kind: the dataclass.
        message: to read. What is unset in it is zero or empty.
        problems: takes what cannot be read: an unknown word, a list that is too long. The value
            has a stand-in for it.

    Raises:
        TypeError: the two do not have the same fields.
    """
    value: T = _reader(kind, message.DESCRIPTOR).one(message, problems)
    return value


@functools.cache
def _fields(kind: type[DataclassInstance], descriptor: Descriptor) -> tuple[Field, ...]:
    """Return the fields of both.

    Raises:
        TypeError: one has a field that the other has not.
    """
    fields = fields_of(kind)
    if different := {field.name for field in fields} ^ set(descriptor.fields_by_name):
        text = f"{kind.__name__} and {descriptor.full_name} differ in {sorted(different)}"
        raise TypeError(text)
    return fields


def _may_be_absent(field: Field, descriptor: Any) -> bool:
    """Return whether messages of this type tell an absent value of a field from an empty one."""
    return not field.part and bool(descriptor.fields_by_name[field.name].has_presence)


class _Reader:
    """Reads messages of one type as dataclasses of one kind.

    A plan has thousands of some, so whatever can be looked up once is.
    """

    def __init__(self, kind: type[DataclassInstance], descriptor: Descriptor) -> None:
        fields = _fields(kind, descriptor)
        names = [field.name for field in fields]
        self._kind = kind
        self._values: Callable[[Message], tuple[Any, ...]] = (
            operator.attrgetter(*names)
            if len(names) > 1
            else lambda message: (getattr(message, names[0]),)
        )
        self._converted = [
            (index, field, _converter(field, descriptor))
            for index, field in enumerate(fields)
            if field.many or field.part or issubclass(field.kind, StrEnum)
        ]
        self._absent = [
            (index, field.name, field.default)
            for index, field in enumerate(fields)
            if _may_be_absent(field, descriptor)
        ]

    def one(self, message: Message, problems: list[Problem]) -> Any:
        """Read a message."""
        values = [*self._values(message)]
        for index, name, default in self._absent:
            if not message.HasField(name):
                values[index] = default
        for index, field, convert in self._converted:
            if field.optional and not message.HasField(field.name):
                values[index] = None
                continue
            before = len(problems)
            values[index] = convert(values[index], problems)
            if len(problems) > before:
                problems[before:] = within(field.path, problems[before:])
        return self._kind(*values)

    def many(self, messages: Sequence[Message], problems: list[Problem]) -> tuple[Any, ...]:
        """Read a repeated field."""
        if not self._converted and not self._absent:
            return tuple([self._kind(*self._values(message)) for message in messages])
        values = []
        for index, message in enumerate(messages):
            before = len(problems)
            values.append(self.one(message, problems))
            if len(problems) > before:
                problems[before:] = within(f"[{index}]", problems[before:])
        return tuple(values)


_reader = functools.cache(_Reader)


def _converter(field: Field, descriptor: Descriptor) -> _Convert:
    """Return what converts the value of a field that is more than a number, a text or a truth."""
    if not field.part:
        return (lambda items, _: tuple(items)) if field.many else _word_reader(field.kind)
    part = descriptor.fields_by_name[field.name].message_type
    if not field.many:  # looked up when it is read, for a plan may hold another
        return lambda message, problems: _reader(field.kind, part).one(message, problems)
    reader = _reader(field.kind, part)
    lengths = [bound for bound in field.bounds if isinstance(bound, Length)]

    def read_list(messages: Sequence[Message], problems: list[Problem]) -> tuple[Any, ...]:
        if not messages:
            return ()
        for length in lengths:
            if len(messages) > length.most:  # half a million take a second, to be refused then
                problems += length.problems(messages)
                messages = messages[: length.most]
        return reader.many(messages, problems)

    return read_list


def _word_reader(words: type[StrEnum]) -> _Convert:
    known = {word.value: word for word in words}  # also finds a word that is one already

    def read_word(text: str, problems: list[Problem]) -> StrEnum:
        word = known.get(text)
        if word is not None:
            return word
        problems.append(("", f"{text!r} is not one of {', '.join(words)}"))
        return next(iter(words))

    return read_word
