"""Counts an EPP's traffic since it started: the first observer of the data plane.

The data-plane thread calls the methods. Other threads only read, and copy a container before they
walk through it; a copy may be one event ahead of another. How figures are published
(adapters/prometheus.py) does not belong here, and what is queued right now is in the controller's
snapshot.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from typing import TYPE_CHECKING

from forebay_epp.core.classification import UNMATCHED_FLOW
from forebay_epp.core.health import CAUSES
from forebay_epp.core.terms import Dispatched, Outcome
from forebay_epp.observers import Observer, Watch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from forebay_control.plan import Plan
    from forebay_epp.codec.extproc.events import Arrived, Finished
    from forebay_epp.core.terms import Decision, HealthChange, Request, Shadowed, Usage

MAX_MODEL_LABELS = 100
MAX_LABEL_LENGTH = 128
OTHER_MODEL = "other"
UNMATCHED_MODEL = "unmatched"
NO_STATUS = "none"
MAX_TOKENS = 100_000_000

SECONDS_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0),
)
STALL_BUCKETS = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


# A rejected request never waited; its 0 s would hide how long the queue takes.
_AFTER_QUEUEING = frozenset(
    outcome
    for outcome in Outcome
    if outcome is Outcome.DISPATCHED or outcome.value.startswith("Evicted")
)


class Histogram:
    """Counts of values by upper bound; the last count is of values above every bound.

    Args:
        bounds: inclusive upper bounds, ascending.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...] = SECONDS_BUCKETS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class ModelLabels:
    """Turns flows into a bounded set of printable labels of metrics.

    `MAX_MODEL_LABELS` models of the plan have their own, what matches none has `UNMATCHED_MODEL`,
    and the rest shares `OTHER_MODEL`: so does a model whose name is one of these two. Names that
    clients make up take no label.
    """

    __slots__ = ("_labels",)

    def __init__(self) -> None:
        self._labels: dict[str, str] = {UNMATCHED_FLOW: UNMATCHED_MODEL}

    def label(self, flow: str) -> str:
        """Return the label of a flow. Any thread."""
        return self._labels.get(flow, OTHER_MODEL)

    def configure(self, models: Iterable[str]) -> set[str]:
        """Give labels to these models, and take them from all others.

        A model keeps the label it has; free ones are given in the order of `models`.

        Returns:
            Labels that no model has any more.
        """
        names = list(models)
        kept = [name for name in names if name in self._labels]
        new = [name for name in names if name not in self._labels]
        labels = {UNMATCHED_FLOW: UNMATCHED_MODEL}
        for name in (kept + new)[:MAX_MODEL_LABELS]:
            label = printable(name)
            if label not in (UNMATCHED_MODEL, OTHER_MODEL):
                labels[name] = label
        gone = set(self._labels.values()) - set(labels.values())
        self._labels = labels
        return gone


class ShadowCounts:
    """What a plan that is computed beside the traffic would have done. Keys are label values.

    Attributes:
        outcomes: requests by (band, model label, outcome).
        waits: seconds that dispatched requests would have waited, by band.
        waited: their sum by (band, model label).
        overtaken: requests that would have been sent after a later one, by (band, model label).
    """

    __slots__ = ("outcomes", "overtaken", "waited", "waits")

    def __init__(self) -> None:
        self.outcomes: defaultdict[tuple[str, str, Outcome], int] = defaultdict(int)
        self.waits: defaultdict[str, Histogram] = defaultdict(Histogram)
        self.waited: defaultdict[tuple[str, str], float] = defaultdict(float)
        self.overtaken: defaultdict[tuple[str, str], int] = defaultdict(int)

    def add(self, shadowed: Shadowed, label: str) -> None:
        """Count a decision about a request of this model label."""
        band, decision = shadowed.request.band, shadowed.decision
        if shadowed.overtaken:
            self.overtaken[band, label] += 1
        if isinstance(decision, Dispatched):
            self.outcomes[band, label, Outcome.DISPATCHED] += 1
            self.waits[band].add(decision.waited_seconds)
            self.waited[band, label] += decision.waited_seconds
        else:
            self.outcomes[band, label, decision.outcome] += 1

    def merge(self, gone: set[str]) -> None:
        """Count what has one of these labels under `OTHER_MODEL` from now on."""
        self.outcomes = _merged_outcomes(self.outcomes, gone)
        waited, overtaken = self.waited, self.overtaken
        self.waited, self.overtaken = defaultdict(float), defaultdict(int)
        for (band, label), seconds in waited.items():
            self.waited[band, OTHER_MODEL if label in gone else label] += seconds
        for (band, label), count in overtaken.items():
            self.overtaken[band, OTHER_MODEL if label in gone else label] += count


class Traffic(Observer):
    """The counters. Attributes are for reading; their keys are label values.

    Attributes:
        models: the labels of models.
        outcomes: requests by (band, model label, outcome).
        waits: seconds in the queue by band, of requests that were queued and have left it.
        wait_errors: seconds by which dispatched requests waited more or less than predicted when
            they were queued, by band.
        first_tokens: seconds from dispatch to the first chunk of a streamed answer, by band.
        starts: seconds from arrival to the same, which is what a client sees, by band.
        durations: seconds from arrival to the end of the answer, by band.
        ejections: endpoints that were left out because they failed, by cause.
        responses: answers by class of HTTP status, "2xx"; `NO_STATUS` when none was seen.
        prompt_tokens: as the model servers counted them, by model label.
        completion_tokens: likewise.
        estimated_tokens: completion tokens of answers without usage, by residency, by model label.
        body_bytes: of request bodies.
        plan_reloads: plans that were offered while running, by "taken" or "refused".
        streams_opened: ext_proc streams, ever.
        streams_refused: streams that were one too many; they are among the opened ones.
        streams_open: streams open now.
        watches: streams that show answers, by what became of them (`Watch`).
        shadow: what a plan that is computed beside the traffic would have done.
        stalls: seconds by which turns of the data plane came late.
    """

    __slots__ = (
        "_worst_stall",
        "body_bytes",
        "completion_tokens",
        "durations",
        "ejections",
        "estimated_tokens",
        "first_tokens",
        "models",
        "outcomes",
        "plan_reloads",
        "prompt_tokens",
        "responses",
        "shadow",
        "stalls",
        "starts",
        "streams_open",
        "streams_opened",
        "streams_refused",
        "wait_errors",
        "waits",
        "watches",
    )

    def __init__(self) -> None:
        self.models = ModelLabels()
        self._worst_stall = 0.0
        self.outcomes: defaultdict[tuple[str, str, Outcome], int] = defaultdict(int)
        self.waits: defaultdict[str, Histogram] = defaultdict(Histogram)
        self.wait_errors: defaultdict[str, Histogram] = defaultdict(Histogram)
        self.first_tokens: defaultdict[str, Histogram] = defaultdict(Histogram)
        self.starts: defaultdict[str, Histogram] = defaultdict(Histogram)
        self.durations: defaultdict[str, Histogram] = defaultdict(Histogram)
        self.responses: defaultdict[str, int] = defaultdict(int)
        self.prompt_tokens: defaultdict[str, int] = defaultdict(int)
        self.completion_tokens: defaultdict[str, int] = defaultdict(int)
        self.estimated_tokens: defaultdict[str, int] = defaultdict(int)
        self.ejections = dict.fromkeys(CAUSES, 0)
        self.plan_reloads = {"taken": 0, "refused": 0}
        self.body_bytes = 0
        self.streams_opened = 0
        self.streams_refused = 0
        self.streams_open = 0
        self.watches = {str(kind): 0 for kind in Watch}
        self.shadow = ShadowCounts()
        self.stalls = Histogram(STALL_BUCKETS)

    def reconfigured(self, plan: Plan) -> None:
        """Count the plan's models by their own labels, as far as there are enough."""
        self.configure(model.name for model in plan.models)

    def configure(self, models: Iterable[str]) -> None:
        """Count these models by their own labels, as far as there are enough.

        What was counted for a model that has lost its label is `OTHER_MODEL`'s from now on, so that
        models that come and go leave no series behind and no sum goes down.
        """
        gone = self.models.configure(models)
        if not gone:
            return
        self.outcomes = _merged_outcomes(self.outcomes, gone)
        self.shadow.merge(gone)
        self.prompt_tokens = _merged(self.prompt_tokens, gone)
        self.completion_tokens = _merged(self.completion_tokens, gone)
        self.estimated_tokens = _merged(self.estimated_tokens, gone)

    def arrived(self, request_id: int, event: Arrived, now: float) -> None:  # noqa: ARG002
        """Count the bytes of a request body."""
        self.body_bytes += event.size_bytes

    def answered(self, request_id: int, outcome: Outcome, now: float) -> None:  # noqa: ARG002
        """Count a request that was not classified: it has neither band nor model."""
        self.outcomes["", "", outcome] += 1

    def decided(self, request: Request, decision: Decision, now: float) -> None:  # noqa: ARG002
        """Count a request that has left flow control, one way or another."""
        band = request.band
        label = self.models.label(request.flow)
        outcome = Outcome.DISPATCHED if isinstance(decision, Dispatched) else decision.outcome
        self.outcomes[band, label, outcome] += 1
        if outcome in _AFTER_QUEUEING:
            self.waits[band].add(decision.waited_seconds)
            if request.predicted_seconds is not None and outcome is Outcome.DISPATCHED:
                error = abs(decision.waited_seconds - request.predicted_seconds)
                self.wait_errors[band].add(error)

    def shadowed(self, shadowed: Shadowed) -> None:
        """Count what a plan that only observes would have done."""
        self.shadow.add(shadowed, self.models.label(shadowed.request.flow))

    def first_token(self, request: Request, now: float) -> None:
        """Count the first chunk of a streamed answer."""
        self.first_tokens[request.band].add(now - request.dispatched_at)
        self.starts[request.band].add(now - request.enqueued_at)

    def completed(self, request: Request, event: Finished, now: float) -> None:
        """Count the end of an answer.

        Token counts are the model server's word; a number that no request can have is not counted.
        """
        self.durations[request.band].add(now - request.enqueued_at)
        status = event.status
        self.responses[f"{status // 100}xx" if 100 <= status < 600 else NO_STATUS] += 1
        usage = event.usage
        if usage is None:
            return
        label = self.models.label(request.flow)
        if 0 < usage.prompt_tokens <= MAX_TOKENS:
            self.prompt_tokens[label] += usage.prompt_tokens
        if 0 < usage.completion_tokens <= MAX_TOKENS:
            self.completion_tokens[label] += usage.completion_tokens

    def estimated(self, request: Request, usage: Usage) -> None:
        """Count the tokens that an answer without usage is taken to have."""
        self.estimated_tokens[self.models.label(request.flow)] += usage.completion_tokens

    def stream_opened(self) -> None:
        """Count a new ext_proc stream."""
        self.streams_opened += 1
        self.streams_open += 1

    def stream_refused(self) -> None:
        """Count a stream that was opened beyond the limit, in addition to `stream_opened`."""
        self.streams_refused += 1

    def stream_closed(self) -> None:
        """Count the end of a stream."""
        self.streams_open -= 1

    def watched(self, kind: Watch) -> None:
        """Count a stream that shows an answer, or one that did not come."""
        self.watches[kind] += 1

    def health_changed(self, change: HealthChange) -> None:
        """Count an endpoint that is left out from now on; one that is back counts nothing."""
        if change.out:
            self.ejections[change.cause] += 1

    def plan_reloaded(self, *, ok: bool) -> None:
        """Count a plan that was offered; one that is refused changes nothing. Any one thread."""
        self.plan_reloads["taken" if ok else "refused"] += 1

    def stalled(self, seconds: float) -> None:
        """Count by how much a turn of the data plane came late."""
        self.stalls.add(seconds)
        self._worst_stall = max(self._worst_stall, seconds)

    def take_worst_stall(self) -> float:
        """Return the longest stall since the last call, in seconds."""
        worst, self._worst_stall = self._worst_stall, 0.0
        return worst


def _merged(counts: defaultdict[str, int], gone: set[str]) -> defaultdict[str, int]:
    """Return the counts, with those of labels that have gone under `OTHER_MODEL`."""
    merged: defaultdict[str, int] = defaultdict(int)
    for label, count in counts.items():
        merged[OTHER_MODEL if label in gone else label] += count
    return merged


def _merged_outcomes(
    counts: Mapping[tuple[str, str, Outcome], int], gone: set[str]
) -> defaultdict[tuple[str, str, Outcome], int]:
    """Likewise, of counts by (band, model label, outcome)."""
    merged: defaultdict[tuple[str, str, Outcome], int] = defaultdict(int)
    for (band, label, outcome), count in counts.items():
        merged[band, OTHER_MODEL if label in gone else label, outcome] += count
    return merged


def printable(text: str) -> str:
    """Return the text as a label value: short, and encodable as UTF-8."""
    return text[:MAX_LABEL_LENGTH].encode(errors="replace").decode()
