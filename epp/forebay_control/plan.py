"""The queue topology of one pool, as the controller takes it.

Plain frozen data and its own validation. Where a plan comes from does not belong here.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from enum import StrEnum

MAX_BANDS = 64
MAX_MODELS = 4096
MAX_TARGETS = 10
MAX_OBJECTIVES = 1024

_PATH = re.compile(r"/[!-~]*")
_METRIC = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


class SaturationMode(StrEnum):
    """How an endpoint's limit is found: learned from its metrics, or given."""

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


class OrderingName(StrEnum):
    """Ordering policies a band may name."""

    FCFS = "FCFS"


class PlanError(ValueError):
    """A plan that cannot be applied; `problems` are (field path, what is wrong) pairs."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{path}: {what}" for path, what in problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class BandPlan:
    """All flows of one priority: how they share, and how much may wait for how long.

    `flow_max_requests` and `flow_max_bytes` bound one flow; the band's own caps bound them all.
    """

    name: str
    priority: int
    fairness: FairnessName = FairnessName.FCFS
    ordering: OrderingName = OrderingName.FCFS
    ttl_seconds: float = 60.0
    max_requests: int = 5000
    max_bytes: int = 512 << 20
    flow_max_requests: int = 5000
    flow_max_bytes: int = 512 << 20


@dataclass(frozen=True, slots=True)
class TargetPlan:
    """A model name to send upstream instead, in proportion to `weight`."""

    name: str
    weight: int = 1


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """Requests for `name` join `band`; `targets`, if any, replace the name on the way out."""

    name: str
    band: str
    targets: tuple[TargetPlan, ...] = ()


@dataclass(frozen=True, slots=True)
class ObjectivePlan:
    """Requests whose trusted header names the objective `name` join `band`."""

    name: str
    band: str


@dataclass(frozen=True, slots=True)
class LimitsPlan:
    """What the whole pool may hold, and the largest single request body."""

    max_requests: int = 10_000
    max_bytes: int = 1 << 30
    max_body_bytes: int = 8 << 20


@dataclass(frozen=True, slots=True)
class SaturationPlan:
    """How endpoint limits are found.

    `max_concurrency` is the limit of every endpoint in mode Concurrency and unused otherwise;
    `kv_cache_usage_threshold` closes a busy endpoint in mode Adaptive.
    """

    mode: SaturationMode = SaturationMode.ADAPTIVE
    max_concurrency: int = 100
    kv_cache_usage_threshold: float = 0.95


@dataclass(frozen=True, slots=True)
class UnmatchedPlan:
    """What happens to a request whose model the plan does not name; Queue puts it into `band`."""

    action: UnmatchedAction = UnmatchedAction.QUEUE
    band: str = "Standard"


@dataclass(frozen=True, slots=True)
class SeriesLabelPlan:
    """A label that a sample must have, with this value."""

    name: str
    value: str = ""


@dataclass(frozen=True, slots=True)
class SeriesPlan:
    """Samples of a metric whose labels have these values, as PromQL's `name{label="value"}`."""

    name: str
    labels: tuple[SeriesLabelPlan, ...] = ()


@dataclass(frozen=True, slots=True)
class MetricsPlan:
    """Where model servers publish their load; the default finds it at every known kind of server.

    `path` "" tries the known ones and `port` 0 is the endpoint's own. `running` and `waiting` go
    together; without them the series of the known servers are looked for.
    """

    path: str = ""
    port: int = 0
    running: SeriesPlan | None = None
    waiting: SeriesPlan | None = None
    kv_cache_usage: SeriesPlan | None = None


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
    """

    pool: str = "default/default"
    bands: tuple[BandPlan, ...] = DEFAULT_BANDS
    models: tuple[ModelPlan, ...] = ()
    limits: LimitsPlan = field(default_factory=LimitsPlan)
    saturation: SaturationPlan = field(default_factory=SaturationPlan)
    unmatched: UnmatchedPlan = field(default_factory=UnmatchedPlan)
    no_endpoints_ttl_seconds: float = 60.0
    objectives: tuple[ObjectivePlan, ...] = ()
    trust_objective_header: bool = False
    metrics: MetricsPlan | None = None

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

    def validate(self) -> None:
        """Check everything a controller relies on.

        Raises:
            PlanError: with every problem found, not only the first.
        """
        problems = [
            *self._band_problems(),
            *self._model_problems(),
            *self._objective_problems(),
            *self._metrics_problems(),
        ]
        if self.unmatched.band not in {band.name for band in self.bands}:
            problems.append(("unmatched.band", f"no band is named {self.unmatched.band!r}"))
        for path, value in (
            ("limits.maxRequests", self.limits.max_requests),
            ("limits.maxBytes", self.limits.max_bytes),
            ("limits.maxBodyBytes", self.limits.max_body_bytes),
            ("saturation.maxConcurrency", self.saturation.max_concurrency),
            ("noEndpointsTtlSeconds", self.no_endpoints_ttl_seconds),
        ):
            if not 0 < value < math.inf:
                problems.append((path, f"must be greater than 0, is {value}"))
        if not 0 < self.saturation.kv_cache_usage_threshold <= 1:
            problems.append(
                (
                    "saturation.kvCacheUsageThreshold",
                    f"must be above 0 and at most 1, is {self.saturation.kv_cache_usage_threshold}",
                )
            )
        if problems:
            raise PlanError(problems)

    def _band_problems(self) -> list[tuple[str, str]]:
        problems: list[tuple[str, str]] = []
        if not 1 <= len(self.bands) <= MAX_BANDS:
            problems.append(("bands", f"must have 1-{MAX_BANDS} entries, has {len(self.bands)}"))
        names: set[str] = set()
        priorities: set[int] = set()
        for index, band in enumerate(self.bands):
            path = f"bands[{index}]"
            if not band.name or band.name in names:
                problems.append((f"{path}.name", f"must be unique and not empty: {band.name!r}"))
            if band.priority in priorities:
                problems.append((f"{path}.priority", f"{band.priority} is another band's"))
            names.add(band.name)
            priorities.add(band.priority)
            for name, value in (
                ("ttlSeconds", band.ttl_seconds),
                ("maxRequests", band.max_requests),
                ("maxBytes", band.max_bytes),
                ("flowMaxRequests", band.flow_max_requests),
                ("flowMaxBytes", band.flow_max_bytes),
            ):
                if not 0 < value < math.inf:
                    problems.append((f"{path}.{name}", f"must be greater than 0, is {value}"))
        return problems

    def _model_problems(self) -> list[tuple[str, str]]:
        problems: list[tuple[str, str]] = []
        if len(self.models) > MAX_MODELS:
            problems.append(("models", f"must be at most {MAX_MODELS}, are {len(self.models)}"))
        bands = {band.name for band in self.bands}
        names: set[str] = set()
        for index, model in enumerate(self.models):
            path = f"models[{index}]"
            if not model.name or model.name in names:
                problems.append((f"{path}.name", f"must be unique and not empty: {model.name!r}"))
            names.add(model.name)
            if model.band not in bands:
                problems.append((f"{path}.band", f"no band is named {model.band!r}"))
            if len(model.targets) > MAX_TARGETS:
                problems.append((f"{path}.targets", f"must be at most {MAX_TARGETS}"))
            for number, target in enumerate(model.targets):
                if not target.name or target.weight < 1:
                    problems.append(
                        (f"{path}.targets[{number}]", "needs a name and a weight of at least 1")
                    )
        return problems

    def _metrics_problems(self) -> list[tuple[str, str]]:
        metrics = self.metrics
        problems: list[tuple[str, str]] = []
        if metrics is None:
            return problems
        if metrics.path and not _PATH.fullmatch(metrics.path):
            problems.append(("metrics.path", f"must be an absolute path: {metrics.path!r}"))
        if not 0 <= metrics.port <= 65535:
            problems.append(("metrics.port", f"must be at most 65535, is {metrics.port}"))
        if (metrics.running is None) != (metrics.waiting is None):
            problems.append(("metrics", "running and waiting must be set together"))
        if metrics.kv_cache_usage is not None and metrics.running is None:
            problems.append(("metrics.kvCacheUsage", "needs running and waiting"))
        for path, series in (
            ("metrics.running", metrics.running),
            ("metrics.waiting", metrics.waiting),
            ("metrics.kvCacheUsage", metrics.kv_cache_usage),
        ):
            if series is not None and not (
                _METRIC.fullmatch(series.name)
                and all(_LABEL.fullmatch(label.name) for label in series.labels)
            ):
                problems.append((path, f"is not a metric with labels: {series.name!r}"))
        return problems

    def _objective_problems(self) -> list[tuple[str, str]]:
        problems: list[tuple[str, str]] = []
        count = len(self.objectives)
        if count > MAX_OBJECTIVES:
            problems.append(("objectives", f"must be at most {MAX_OBJECTIVES}, are {count}"))
        bands = {band.name for band in self.bands}
        names: set[str] = set()
        for index, objective in enumerate(self.objectives):
            name, band, path = objective.name, objective.band, f"objectives[{index}]"
            if not name or name in names:
                problems.append((f"{path}.name", f"must be unique and not empty: {name!r}"))
            names.add(name)
            if band not in bands:
                problems.append((f"{path}.band", f"no band is named {band!r}"))
        return problems
