"""The Plan: the queue topology of one pool, with its bounds, defaults and rules.

The operator, the command line and the EPP judge a plan by this one declaration. A new field is
declared in the resource, here and in control.proto, under one name; nowhere else. Defaults and caps
are declared here, and the resources refer to them. Where plans come from and how they travel does
not belong here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

from forebay_control.fields import Length, Matches, Range, Unique, holds, problems_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forebay_control.fields import Problem

MAX_BANDS = 64
MAX_MODELS = 4096
MAX_TARGETS = 10
MAX_OBJECTIVES = 1024
MAX_TENANTS = 1024
MAX_SCORERS = 8
MAX_COUNT = 1_000_000
MAX_WEIGHT = 1000
MAX_BYTES = 1 << 40
MAX_SECONDS = 3600
MAX_NAME_LENGTH = 253  # of a Kubernetes object
MAX_MODEL_NAME_LENGTH = 256
MAX_TENANT_LENGTH = 128
MAX_HEADER_LENGTH = 128
MAX_PATH_LENGTH = 256
MAX_SERIES_LENGTH = 512  # as PromQL
MIN_PRIORITY, MAX_PRIORITY = -(2**31), 2**31 - 1

URL_PATH = r'/[!-"$-&(-~]*'  # printable but "#" and, for the sake of CEL, the single quote
HEADER_NAME = r"[a-z0-9][a-z0-9_-]*"
METRIC_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL_NAME = r"[a-zA-Z_][a-zA-Z0-9_]*"

Name = Annotated[str, Length(1, MAX_NAME_LENGTH)]
ModelName = Annotated[str, Length(1, MAX_MODEL_NAME_LENGTH)]
Count = Annotated[int, Range(1, MAX_COUNT)]
Bytes = Annotated[int, Range(1, MAX_BYTES)]
Seconds = Annotated[float, Range(0, MAX_SECONDS, above=True)]
Weight = Annotated[int, Range(1, MAX_WEIGHT)]


class Mode(StrEnum):
    """Whether a plan decides about requests, or only tells what it would decide."""

    ENFORCE = "Enforce"
    OBSERVE = "Observe"


class SaturationMode(StrEnum):
    """How an endpoint's limit is determined: learned from its metrics, or given."""

    ADAPTIVE = "Adaptive"
    CONCURRENCY = "Concurrency"


class UnmatchedAction(StrEnum):
    """What happens to a request whose model the plan does not name."""

    QUEUE = "Queue"
    REJECT = "Reject"


class FairnessName(StrEnum):
    """Fairness policies a band may name."""

    FCFS = "FCFS"
    ROUND_ROBIN = "RoundRobin"
    WEIGHTED_FAIR = "WeightedFair"
    WEIGHTED_FAIR_TOKENS = "WeightedFairTokens"
    TOKEN_FAIR = "TokenFair"  # noqa: S105  # no password


class Between(StrEnum):
    """What a level of fairness is between."""

    MODELS = "Models"
    TENANTS = "Tenants"


class OrderingName(StrEnum):
    """Ordering policies a band may name."""

    FCFS = "FCFS"
    EARLIEST_DEADLINE = "EarliestDeadline"
    SHORTEST_PROMPT = "ShortestPrompt"


class ScorerName(StrEnum):
    """Points of view from which endpoints are rated."""

    LOAD = "Load"
    KV_CACHE_USAGE = "KVCacheUsage"
    PREFIX_CACHE = "PrefixCache"


class PickerName(StrEnum):
    """How an endpoint is taken, given the ratings of all."""

    MAX_SCORE = "MaxScore"
    POWER_OF_TWO = "PowerOfTwo"


class WhenFull(StrEnum):
    """What becomes of a request that comes when the pool's queue is full."""

    REJECT = "Reject"
    DISPLACE_LOWER = "DisplaceLower"


class PlanError(ValueError):
    """A plan that cannot be applied; `problems` are (field path, what is wrong) pairs."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(f"{path}: {what}" for path, what in problems))
        self.problems = list(problems)


@dataclass(frozen=True, slots=True)
class InnerPlan:
    """How the flows inside one flow of the outer level share what it gets."""

    fairness: FairnessName = FairnessName.FCFS


@dataclass(frozen=True, slots=True)
class BandPlan:
    """All flows of one priority: how they share, and how much may wait for how long.

    Attributes:
        name: of the band.
        priority: the highest is served first.
        fairness: how the flows of the outer level share the band.
        ordering: of the requests of one flow.
        ttl_seconds: how long a request may wait.
        max_requests: that may wait in the band.
        max_bytes: that these may have.
        flow_max_requests: that may wait of one flow, of the innermost level.
        flow_max_bytes: that these may have.
        between: what the outer level's flows are.
        inner: how the others, models or tenants, share inside one of them. Without it they do not.
        when_full: what becomes of a request that comes when the pool's queue is full.
        max_saturation_percent: how full the pool may become by the band's requests.
        reserved_percent: of the dispatches that the band gets whatever waits in higher ones.
    """

    name: Name
    priority: Annotated[int, Range(MIN_PRIORITY, MAX_PRIORITY)]
    fairness: FairnessName = FairnessName.FCFS
    ordering: OrderingName = OrderingName.FCFS
    ttl_seconds: Seconds = 60.0
    max_requests: Count = 5000
    max_bytes: Bytes = 512 << 20
    flow_max_requests: Count = 5000
    flow_max_bytes: Bytes = 512 << 20
    between: Between = Between.MODELS
    inner: InnerPlan | None = None
    when_full: WhenFull = WhenFull.REJECT
    max_saturation_percent: Annotated[int, Range(1, 100)] = 100
    reserved_percent: Annotated[int, Range(0, 100)] = 0


@dataclass(frozen=True, slots=True)
class TargetPlan:
    """A model name to send upstream instead, in proportion to `weight`."""

    name: Name
    weight: Count = 1


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """Requests for `name` join `band`; `targets`, if any, replace the name on the way out.

    `weight` is its share relative to others' where the fairness policy knows weights. A request is
    due `time_to_first_token_seconds` after it came; 0: when its band's TTL ends.
    """

    name: ModelName
    band: str
    targets: Annotated[tuple[TargetPlan, ...], Length(0, MAX_TARGETS)] = ()
    weight: Weight = 1
    time_to_first_token_seconds: Annotated[float, Range(0, MAX_SECONDS)] = 0.0


@dataclass(frozen=True, slots=True)
class TenantPlan:
    """A tenant whose share relative to others' is not 1."""

    name: Annotated[str, Length(1, MAX_TENANT_LENGTH)]
    weight: Weight = 1


@dataclass(frozen=True, slots=True)
class ObjectivePlan:
    """Requests whose trusted header names the objective `name` join `band`."""

    name: Name
    band: str


@dataclass(frozen=True, slots=True)
class LimitsPlan:
    """What the whole pool may hold, and the largest single request body."""

    max_requests: Count = 10_000
    max_bytes: Bytes = 1 << 30
    max_body_bytes: Bytes = 8 << 20


@dataclass(frozen=True, slots=True)
class SaturationPlan:
    """How endpoint limits are determined.

    `max_concurrency` is the limit of every endpoint in mode Concurrency and unused otherwise;
    `kv_cache_usage_threshold` closes a busy endpoint in mode Adaptive, and there prompts go only to
    endpoints in which they are expected to wait `time_to_first_token_seconds` at most.
    """

    mode: SaturationMode = SaturationMode.ADAPTIVE
    max_concurrency: Count = 100
    kv_cache_usage_threshold: Annotated[float, Range(0, 1, above=True)] = 0.95
    time_to_first_token_seconds: Seconds = 0.5


@dataclass(frozen=True, slots=True)
class ScorerPlan:
    """A point of view, and its weight relative to the others'."""

    type: ScorerName
    weight: Weight = 1


@dataclass(frozen=True, slots=True)
class SelectionPlan:
    """How an endpoint is chosen among those that can take a request."""

    scorers: Annotated[tuple[ScorerPlan, ...], Length(1, MAX_SCORERS), Unique("type")] = (
        ScorerPlan(ScorerName.PREFIX_CACHE, 3),
        ScorerPlan(ScorerName.LOAD, 2),
    )
    picker: PickerName = PickerName.MAX_SCORE

    def rates(self, name: ScorerName) -> bool:
        """Return whether endpoints are rated from this point of view."""
        return any(scorer.type is name for scorer in self.scorers)


@dataclass(frozen=True, slots=True)
class UnmatchedPlan:
    """What happens to a request whose model the plan does not name; Queue puts it into `band`."""

    action: UnmatchedAction = UnmatchedAction.QUEUE
    band: str = "Standard"


@dataclass(frozen=True, slots=True)
class SeriesLabelPlan:
    """A label that a sample must have, with this value."""

    name: Annotated[
        str,
        Length(1, MAX_SERIES_LENGTH),
        Matches(re.compile(LABEL_NAME), "a label of letters, digits and underscores"),
    ]
    value: Annotated[str, Length(0, MAX_SERIES_LENGTH)] = ""


@dataclass(frozen=True, slots=True)
class SeriesPlan:
    """Samples of a metric whose labels have these values, as PromQL's `name{label="value"}`."""

    name: Annotated[
        str,
        Length(1, MAX_SERIES_LENGTH),
        Matches(re.compile(METRIC_NAME), "a metric's name, without labels"),
    ]
    labels: Annotated[tuple[SeriesLabelPlan, ...], Length(0, MAX_SERIES_LENGTH)] = ()


@dataclass(frozen=True, slots=True)
class MetricsPlan:
    """Where model servers publish their load; the default finds it at every known kind of server.

    `path` "" tries the known ones and `port` 0 is the endpoint's own. `running` and `waiting` go
    together; without them the series of the known servers are looked for.
    """

    path: Annotated[
        str,
        Length(0, MAX_PATH_LENGTH),
        Matches(re.compile(f"({URL_PATH})?"), 'an absolute path of a URL, such as "/metrics"'),
    ] = ""
    port: Annotated[int, Range(0, 65535)] = 0
    running: SeriesPlan | None = None
    waiting: SeriesPlan | None = None
    kv_cache_usage: SeriesPlan | None = None

    def rules(self) -> list[Problem]:
        """Return what the fields do not fit together in."""
        if (self.running is None) != (self.waiting is None):
            return [("", "running and waiting must be set together")]
        if self.kv_cache_usage is not None and self.running is None:
            return [("kvCacheUsage", "needs running and waiting")]
        return []


DEFAULT_BANDS = (
    BandPlan("Critical", 100),
    BandPlan("Standard", 0),
    BandPlan("Sheddable", -100),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """The topology of one pool. The default is what a pool without any policy gets.

    Where the header that names one of `objectives` is trusted, it decides the band and the model
    only the flow. Without `metrics` the series of the known model servers are looked for.
    `tenant_header` names the header that says whose a request is; "": no header is trusted to.
    `trust_deadline_headers`: callers may say when a request is due and how long it may wait.
    In mode Observe requests are sent at once, and what the rest would do is computed beside them.
    `shadow` is a plan that is computed beside this one and decides nothing; its own mode is no
    matter, and of requests it sees what this plan has read.
    """

    pool: Annotated[str, Length(0, MAX_NAME_LENGTH + 64)] = "default/default"
    bands: Annotated[
        tuple[BandPlan, ...], Length(1, MAX_BANDS), Unique("name"), Unique("priority")
    ] = DEFAULT_BANDS
    models: Annotated[tuple[ModelPlan, ...], Length(0, MAX_MODELS), Unique("name")] = ()
    limits: LimitsPlan = field(default_factory=LimitsPlan)
    saturation: SaturationPlan = field(default_factory=SaturationPlan)
    unmatched: UnmatchedPlan = field(default_factory=UnmatchedPlan)
    no_endpoints_ttl_seconds: Seconds = 60.0
    objectives: Annotated[tuple[ObjectivePlan, ...], Length(0, MAX_OBJECTIVES), Unique("name")] = ()
    trust_objective_header: bool = False
    metrics: MetricsPlan | None = None
    tenant_header: Annotated[
        str,
        Length(0, MAX_HEADER_LENGTH),
        Matches(re.compile(f"({HEADER_NAME})?"), "a header's name in lower case"),
    ] = ""
    tenants: Annotated[tuple[TenantPlan, ...], Length(0, MAX_TENANTS), Unique("name")] = ()
    trust_deadline_headers: bool = False
    selection: SelectionPlan | None = None
    mode: Mode = Mode.ENFORCE
    shadow: Plan | None = None

    @property
    def choice(self) -> SelectionPlan:
        """How endpoints are chosen: by the default where the plan does not say."""
        return self.selection or SelectionPlan()

    @property
    def default_model(self) -> str | None:
        """The model meant by a request that names none: the plan's only one.

        "" where the plan has none, so that the request is unmatched; None where it has several.
        """
        match self.models:
            case ():
                return ""
            case (model,):
                return model.name
        return None

    def rules(self) -> list[Problem]:
        """Return what the fields do not fit together in."""
        bands = {band.name for band in self.bands}
        used: dict[str, Sequence[ModelPlan | ObjectivePlan]] = {
            "models": self.models,
            "objectives": self.objectives,
        }
        problems = [
            (f"{path}[{index}].band", f"no band is named {part.band!r}")
            for path, parts in used.items()
            for index, part in enumerate(parts)
            if part.band not in bands
        ]
        if self.unmatched.band not in bands:
            problems.append(("unmatched.band", f"no band is named {self.unmatched.band!r}"))
        if (reserved := sum(band.reserved_percent for band in self.bands)) > 100:
            problems.append(("bands", f"reservedPercent must be at most 100 in sum, is {reserved}"))
        if self.shadow is not None:
            if self.shadow.shadow is not None:
                problems.append(("shadow.shadow", "a shadow has none of its own"))
            if self.mode is Mode.OBSERVE:
                problems.append(("shadow", "a plan in mode Observe is its own shadow"))
        return problems

    def validate(self) -> None:
        """Check everything a controller relies on.

        Raises:
            PlanError: with every problem found, not only the first.
        """
        if not holds(Plan, (self,)):
            raise PlanError(problems_of(self))
