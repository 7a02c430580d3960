"""What fields of FlowControlPolicy must be together: each rule as CEL and as Python.

The API server judges by CEL, our own readers by Python. Rules hold where a required field is
missing: a stored policy of an earlier shape gets a status. What a field alone may be is declared
with it, in policy.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forebay_control.plan import DEFAULT_BANDS
from forebay_operator.resources.fields import Check, Rule, misplaced

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# The bands that every pool has: a criticality is the name of one of them.
BUILT_IN = {band.name: band.priority for band in DEFAULT_BANDS}
_NAMES, _PRIORITIES = list(BUILT_IN), list(BUILT_IN.values())
_NO_BAND = f"no band is named {{}}: write {', '.join(_NAMES)} or the name of one in spec.bands"


@dataclass(frozen=True, slots=True)
class BandsExist(Check):
    """Every band that a field of the spec names exists.

    Attributes:
        field: the path of the field below the spec.
        cel: the names in it, as a list in CEL.
        names: the same in Python.
    """

    field: str
    cel: str
    names: Callable[[Any], Iterable[str]]

    @property
    def schema(self) -> dict[str, Any]:
        """A rule whose message has the first name that no band has."""
        bands = f"({_NAMES} + (has(self.bands) ? self.bands.map(b, has(b.name), b.name) : []))"
        rule = {
            "rule": f"{self.cel}.all(name, name in {bands})",
            "message": _NO_BAND.format("that name"),
            "messageExpression": "'"
            + _NO_BAND.format(f"' + {self.cel}.filter(name, !(name in {bands}))[0] + '")
            + "'",
            "fieldPath": f".{self.field}",
        }
        return {"x-kubernetes-validations": [rule]}

    def checked(self, value: Any) -> Any:
        """Return the spec; the error has the first name that no band has."""
        bands = BUILT_IN.keys() | {band.name for band in value.bands}
        for name in self.names(value):
            if name not in bands:
                raise misplaced(_NO_BAND.format(name), *self.field.split("."))
        return value


def _different(priorities: list[int | None]) -> bool:
    given = [priority for priority in priorities if priority is not None]
    return len(set(given)) == len(given)


OWN_SETTINGS = Rule(
    "must not be set with another policy than WeightedFair",
    "!has(self.policy) || self.policy == 'WeightedFair' || !has(self.weightedFair)",
    lambda level: level.policy == "WeightedFair" or level.weighted_fair is None,
    at="weightedFair",
)
BUILT_IN_PRIORITY = Rule(
    "must not be set for Critical, Standard and Sheddable: they have 100, 0 and -100",
    f"!(self.name in {_NAMES}) || !has(self.priority)",
    lambda band: band.name not in BUILT_IN or band.priority is None,
    at="priority",
)
OWN_PRIORITY = Rule(
    f"is required for a band with another name than {', '.join(_NAMES)}",
    f"!has(self.name) || self.name in {_NAMES} || has(self.priority)",
    lambda band: band.name in BUILT_IN or band.priority is not None,
    at="priority",
)
# Of a band: a rule of the list itself would fail where an earlier shape has an object there.
DIFFERENT_LEVELS = Rule(
    "the levels must be between different things: one between Models, one between Tenants",
    "!has(self.name) || !has(self.fairness) || self.fairness.size() < 2 "
    "|| !has(self.fairness[0].between) || !has(self.fairness[1].between) "
    "|| self.fairness[0].between != self.fairness[1].between",
    lambda band: len({level.between for level in band.fairness}) == len(band.fairness),
    at="fairness",
)
DIFFERENT_PRIORITIES = Rule(
    "priorities must be unique; Critical, Standard and Sheddable have 100, 0 and -100",
    f"self.all(band, band.name in {_NAMES} || !has(band.priority) "
    f"|| !(band.priority in {_PRIORITIES}) "
    "&& self.exists_one(other, has(other.priority) && other.priority == band.priority))",
    lambda bands: _different([*_PRIORITIES, *(band.priority for band in bands)]),
)
RESERVED_IN_SUM = Rule(
    "reservedPercent must be at most 100 in sum",
    "self.map(band, has(band.reservedPercent) ? band.reservedPercent : 0).sum() <= 100",
    lambda bands: sum(band.reserved_percent for band in bands) <= 100,
)
OWN_TYPE = Rule(
    "must not set adaptive with type Concurrency, nor concurrency with type Adaptive",
    "(self.type == 'Adaptive' || !has(self.adaptive)) "
    "&& (self.type == 'Concurrency' || !has(self.concurrency))",
    lambda saturation: (
        saturation.concurrency is None
        if saturation.type == "Adaptive"
        else saturation.adaptive is None
    ),
)
LOAD_SERIES = Rule(
    "running and waiting must be set together, and kvCacheUsage only with them",
    "has(self.running) == has(self.waiting) && (has(self.running) || !has(self.kvCacheUsage))",
    lambda metrics: (
        (metrics.running is None) == (metrics.waiting is None)
        and (metrics.running is not None or metrics.kv_cache_usage is None)
    ),
)
