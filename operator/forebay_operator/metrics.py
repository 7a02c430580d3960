"""The operator's counters, for its /metrics page. What they mean is in operator/README.md."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

STREAMS = Gauge("forebay_control_streams", "Open control streams", ["pool"])
REFUSALS = Counter("forebay_control_refusals", "Control streams refused or ended", ["reason"])
PROGRAMS = Counter("forebay_control_programs", "Programs sent to endpoint pickers")
ANSWERS = Counter("forebay_control_answers", "Answers to programs", ["answer"])
POOL_PROBLEMS = Gauge(
    "forebay_pool_problems", "1 for each problem that a pool has now", ["pool", "reason"]
)
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
    "When the served certificate runs out, where the operator issues it itself",
)
DENIED = Gauge(
    "forebay_denied_namespaces",
    "Namespaces in which the API server denies the operator a resource it needs",
    ["resource"],
)
