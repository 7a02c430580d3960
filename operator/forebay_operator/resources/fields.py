"""The building blocks of fields: durations, sizes, names and rules.

The fields of each kind belong in the modules beside this one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError, core_schema

from forebay_control.plan import (
    LABEL_NAME,
    MAX_BYTES,
    MAX_COUNT,
    MAX_MODEL_NAME_LENGTH,
    MAX_NAME_LENGTH,
    MAX_PATH_LENGTH,
    MAX_SECONDS,
    MAX_SERIES_LENGTH,
    METRIC_NAME,
    URL_PATH,
)
from forebay_operator.resources import messages

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
    from pydantic.config import JsonDict
    from pydantic.json_schema import JsonSchemaValue


_SUBDOMAIN = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
# A string of PromQL in either kind of quotes (\x27 is the single one) and the escapes of a page.
_STRING = r'(?:"(?:[^"\\\x00-\x1f]|\\["\\n])*"|\x27(?:[^\x27\\\x00-\x1f]|\\[\x27\\n])*\x27)'
_EQUALITY = f"(?: *{LABEL_NAME} *= *{_STRING} *)"
_SERIES = rf"{METRIC_NAME}(?: *\{{(?:{_EQUALITY}(?:,{_EQUALITY})*)?,? *\}})?"
_NUMBER = r"[0-9]{1,6}(?:\.[0-9]{1,3})?"
_DURATION = re.compile("".join(f"(?:({_NUMBER}){unit})?" for unit in ("h", "m", "s", "ms")))
_UNIT_SECONDS = (Decimal(3600), Decimal(60), Decimal(1), Decimal("0.001"))
_QUANTITY = re.compile(r"([0-9]{1,15})(Ki|Mi|Gi|Ti|k|M|G|T)?")
FACTORS = {
    "": 1,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "Ki": 1 << 10,
    "Mi": 1 << 20,
    "Gi": 1 << 30,
    "Ti": 1 << 40,
}
_RULES = "x-kubernetes-validations"


def misplaced(message: str, *place: int | str) -> PydanticCustomError:
    """Return an error of a field at a path below the value that is checked."""
    return PydanticCustomError("misplaced", "{message}", {"message": message, "place": place})


class Check:
    """A check beyond types and bounds, for the API server and for Python."""

    __slots__ = ()

    @property
    def schema(self) -> dict[str, Any]:
        """The check as part of the CRD's schema."""
        raise NotImplementedError

    def checked(self, value: Any) -> Any:
        """Return the value of a field.

        Raises:
            ValueError: the check fails.
        """
        raise NotImplementedError

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        """Run this check last."""
        return core_schema.no_info_after_validator_function(self.checked, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Add the check to the field's schema, and its rules to those of earlier checks."""
        earlier, mine = handler(schema), self.schema
        rules = [*earlier.get(_RULES, ()), *mine.get(_RULES, ())]
        return {**earlier, **mine, **({_RULES: rules} if rules else {})}


@dataclass(frozen=True, slots=True)
class Rule(Check):
    """A rule, once in CEL and once in Python.

    Attributes:
        message: what must hold; the same from both.
        cel: for the API server, over `self`.
        holds: the same in Python; None if reading the field checks it, or if only the API
            server can check it, because it compares with the previous object.
        at: the field of `self` that the error names, if not `self`.
    """

    message: str
    cel: str
    holds: Callable[[Any], object] | None = None
    at: str = ""

    @property
    def schema(self) -> dict[str, Any]:
        """A rule of the CRD."""
        place = {"fieldPath": f".{self.at}"} if self.at else {}
        return {_RULES: [{"rule": self.cel, "message": self.message, **place}]}

    def checked(self, value: Any) -> Any:
        """Return the value if the rule holds."""
        if self.holds is not None and not self.holds(value):
            raise misplaced(self.message, *([self.at] if self.at else []))
        return value


@dataclass(frozen=True, slots=True)
class Unique(Check):
    """No two entries of a list have the same values in these fields: they are its keys.

    Without fields the entries themselves are unique.
    """

    keys: tuple[str, ...] = ()

    @property
    def schema(self) -> dict[str, Any]:
        """A map by these keys, or a set, which the API server holds unique."""
        if not self.keys:
            return {"x-kubernetes-list-type": "set"}
        return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(self.keys)}

    def checked(self, value: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the entries; the error names the first duplicate."""
        seen = set()
        for index, entry in enumerate(value):
            key = tuple(getattr(entry, name) for name in self.keys) or (entry,)
            if key in seen:
                raise misplaced(f"{' '.join(map(str, key))} is duplicated", index)
            seen.add(key)
        return value


# A list that is replaced as a whole.
ATOMIC: JsonDict = {"x-kubernetes-list-type": "atomic"}

DURATION = Rule(
    'must be a duration of more than 0 and at most 1h, such as "30s", "1m30s" or "500ms"',
    f"self != '' && self.matches(r'^{_DURATION.pattern}$') "
    "&& duration(self) > duration('0s') && duration(self) <= duration('1h')",
)
SIZE = Rule(
    "must be a number of bytes from 1 to 1Ti, such as 1048576 or 512Mi",
    "type(self) == int ? self >= 1 && self <= 1099511627776 : "
    f"self.matches(r'^{_QUANTITY.pattern}$') && quantity(self).isGreaterThan(quantity('0')) "
    "&& quantity(self).compareTo(quantity('1Ti')) <= 0",
)


def _seconds(value: object) -> object:
    """Read a duration as Go and Kubernetes write it."""
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match:
        parts = zip(match.groups(), _UNIT_SECONDS, strict=True)
        seconds = sum(Decimal(number or 0) * unit for number, unit in parts)
        if 0 < seconds <= MAX_SECONDS:
            return float(seconds)
    raise ValueError(f"{DURATION.message}, not {messages.shown(value)}")


def _whole(value: object) -> object:
    """Take 5.0 for 5, as the API server does."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _bytes(value: object) -> object:
    """Read a quantity of bytes as Kubernetes writes it."""
    size = value if isinstance(value, int) and not isinstance(value, bool) else 0
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    if match:
        size = int(match[1]) * FACTORS[match[2] or ""]
    if not 1 <= size <= MAX_BYTES:
        raise ValueError(f"{SIZE.message}, not {messages.shown(value)}")
    return size


def _nothing(_: object) -> None:
    """Read nothing."""


def series(text: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Return the name of a `Series` and the values of its labels."""
    name, _, labels = text.partition("{")
    found = re.findall(f"({LABEL_NAME}) *= *({_STRING})", labels)
    return name.strip(), tuple((label, _unquoted(quoted)) for label, quoted in found)


def _unquoted(text: str) -> str:
    return re.sub(r"\\(.)", lambda escape: "\n" if escape[1] == "n" else escape[1], text[1:-1])


T = TypeVar("T")
# Part of the schema, but ignored when read: an invalid value does not invalidate the object.
Unread = Annotated[T | None, BeforeValidator(_nothing)]

Criticality = Literal["Critical", "Standard", "Sheddable"]
Seconds = Annotated[
    float,
    BeforeValidator(_seconds),
    WithJsonSchema({"type": "string", "maxLength": 45, **DURATION.schema}),
]
Bytes = Annotated[
    int,
    BeforeValidator(_bytes),
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "maxLength": 17,
            **SIZE.schema,
        }
    ),
]
WHOLE = BeforeValidator(_whole)
Count = Annotated[int, Field(ge=1, le=MAX_COUNT, strict=True), WHOLE]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_LENGTH)]
Label = Annotated[
    str, Field(max_length=63, pattern="^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$")
]
Labels = Annotated[dict[str, Label], Field(max_length=64)]
ObjectName = Annotated[
    str,
    Field(min_length=1, max_length=MAX_NAME_LENGTH),
    Rule(
        'must contain only lowercase letters, digits, "-" and ".", '
        "with a letter or digit at both ends",
        f"self.matches(r'^{_SUBDOMAIN}$')",
        re.compile(_SUBDOMAIN).fullmatch,
    ),
]
ModelName = Annotated[str, Field(min_length=1, max_length=MAX_MODEL_NAME_LENGTH)]
Namespace = Annotated[
    str, Field(min_length=1, max_length=63, pattern="^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
]
Group = Annotated[
    str,
    Field(
        max_length=253,
        pattern=f"^$|^{_SUBDOMAIN}$",
    ),
]
KindName = Annotated[
    str, Field(min_length=1, max_length=63, pattern="^[a-zA-Z]([-a-zA-Z0-9]*[a-zA-Z0-9])?$")
]
ControllerName = Annotated[
    str,
    Field(
        min_length=1,
        max_length=253,
        pattern=rf"^{_SUBDOMAIN}\/[A-Za-z0-9\/\-._~%!$&'()*+,;=:]+$",
    ),
]
Port = Annotated[int, Field(ge=1, le=65535, strict=True), WHOLE]
UrlPath = Annotated[
    str,
    Field(min_length=1, max_length=MAX_PATH_LENGTH),
    Rule(
        'must be an absolute path of a URL, such as "/metrics"',
        f"self.matches(r'^{URL_PATH}$')",
        re.compile(URL_PATH).fullmatch,
    ),
]
Series = Annotated[
    str,
    Field(min_length=1, max_length=MAX_SERIES_LENGTH),
    Rule(
        "must be a metric's name, "
        """optionally with labels compared by =: requests{state="running"}""",
        f"self.matches(r'^{_SERIES}$')",
        re.compile(_SERIES).fullmatch,
    ),
]


class Part(BaseModel):
    """A part of a resource. A field that is null counts as unset, as it does in Kubernetes."""

    model_config = ConfigDict(alias_generator=to_camel, frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_unset(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: item for key, item in value.items() if item is not None}
        return value


class Foreign(Part):
    """A part of a kind that another project owns; unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")


def _without_defaults(schema: dict[str, Any]) -> None:
    for field in schema["properties"].values():
        field.pop("default", None)


class Own(Part):
    """A part of forebay's own kind; unknown fields are errors.

    The API server writes no defaults into objects: what is unset follows a later default.
    """

    model_config = ConfigDict(extra="forbid", json_schema_extra=_without_defaults)


class Metadata(Foreign):
    """What identifies an object. The API server sets `uid` and `generation`."""

    name: ObjectName
    namespace: Namespace = "default"
    labels: dict[str, Label] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)
    uid: Annotated[str, Field(max_length=128)] = ""
    generation: int = 0
    creation_timestamp: AwareDatetime | None = None
    deletion_timestamp: AwareDatetime | None = None
