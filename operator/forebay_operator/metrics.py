"""The operator's metrics. operator/README.md explains them."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge, Histogram

if TYPE_CHECKING:
    from collections.abc import Mapping


class Series:
    """The series of a gauge by namespace; series that are no longer set are removed."""

    def __init__(self, gauge: Gauge) -> None:
        self._gauge = gauge
        self._shown: defaultdict[str, set[tuple[str, ...]]] = defaultdict(set)

    def show(self, namespace: str, values: Mapping[tuple[str, ...], float]) -> None:
        """Replace the series of a namespace by these values by labels."""
        for labels in self._shown.pop(namespace, set()) - values.keys():
            self._gauge.remove(*labels)
        for labels, value in values.items():
            self._gauge.labels(*labels).set(value)
        if values:
            self._shown[namespace] = set(values)

    def clear(self) -> None:
        """Remove all series."""
        for namespace in list(self._shown):
            self.show(namespace, {})


STREAMS = Gauge("forebay_control_streams", "Open control streams", ["pool"])
REFUSALS = Counter("forebay_control_refusals", "Control streams refused or ended", ["reason"])
PROGRAMS = Counter("forebay_control_programs", "Programs sent to EPPs")
ANSWERS = Counter("forebay_control_answers", "Answers to programs", ["answer"])
SHARE_SLOTS = Series(
    Gauge("forebay_share_slots", "Slots of a pool that an EPP of several holds", ["pool", "epp"])
)
SHARE_MOVES = Counter("forebay_share_moves", "Slots given to one of several EPPs", ["pool"])
POOL_PROBLEMS = Gauge(
    "forebay_pool_problems", "1 for each current problem of a pool", ["pool", "reason"]
)
DESIRED = Series(
    Gauge("forebay_pool_endpoint_pickers_desired", "EPPs that a pool should have", ["pool"])
)
CONNECTED = Series(
    Gauge("forebay_pool_endpoint_pickers_connected", "Of those, EPPs with a stream", ["pool"])
)
PROGRAMMED = Series(
    Gauge(
        "forebay_pool_endpoint_pickers_programmed",
        "Of those, EPPs that run the latest program",
        ["pool"],
    )
)
CONDITIONS = Series(
    Gauge(
        "forebay_policy_condition",
        "1 for the current status of each condition of a FlowControlPolicy",
        ["namespace", "name", "type", "status"],
    )
)
PLANNING_FAILURES = Counter("forebay_planning_failures", "Pools that could not be planned")
PLANNING = Histogram(
    "forebay_reconcile_seconds",
    "Time of one planning pass",
    buckets=(0.001, 0.005, 0.025, 0.1, 0.5, 2.5),
)
STATUS_WRITES = Counter("forebay_status_writes", "Statuses written", ["kind", "result"])
SWEEPS = Counter("forebay_sweeps", "LISTs that corrected the store", ["result"])
SWEPT_AT = Gauge("forebay_last_sweep_timestamp_seconds", "When all kinds were last listed")
LEADING = Gauge("forebay_leader_epoch", "Epoch of this replica's leadership, 0 when it does not")
EVENTS = Counter("forebay_watch_events", "Events that watches delivered", ["kind"])
CERTIFICATE_EXPIRES = Gauge(
    "forebay_control_certificate_expiry_timestamp_seconds",
    "When the served certificate expires, if the operator issues it itself",
)
DENIED = Gauge(
    "forebay_denied_namespaces",
    "Namespaces in which the API server denies the operator a resource it needs",
    ["resource"],
)
