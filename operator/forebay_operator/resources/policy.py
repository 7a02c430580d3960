"""FlowControlPolicy, forebay's own kind: an unknown field is an error."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from forebay_control.plan import (
    DEFAULT_BANDS,
    FairnessName,
    OrderingName,
    Plan,
    SaturationMode,
    UnmatchedAction,
)
from forebay_operator.resources.fields import (
    Bytes,
    Count,
    Criticality,
    Flag,
    Metadata,
    ModelName,
    Name,
    Own,
    Port,
    Rule,
    Seconds,
    Series,
    Unique,
    Unread,
    UrlPath,
)
from forebay_operator.resources.status import (
    PolicyStatus,
)

PLAN = Plan()  # its defaults
BAND = DEFAULT_BANDS[0]


class TargetRef(Own):
    """A pool that the policy applies to, in the policy's own namespace."""

    group: Literal["inference.networking.k8s.io", "inference.networking.x-k8s.io"] = (
        "inference.networking.k8s.io"
    )
    """The pool's API group."""
    kind: Literal["InferencePool"] = "InferencePool"
    """The pool's kind."""
    name: Name
    """The pool's name."""


class Fairness(Own):
    """How the models of a band share it."""

    policy: FairnessName = BAND.fairness
    """FCFS serves in order of arrival; RoundRobin lets the models take turns. FCFS by default."""


class FlowLimits(Own):
    """Caps on what one model may have waiting in a band; the band's own caps by default."""

    max_requests: Count | None = None
    """The number of requests of one model that may wait."""
    max_bytes: Bytes | None = None
    """The total size of one model's waiting requests, such as 64Mi."""


class Queue(Own):
    """How many requests may wait in a band, and for how long."""

    max_requests: Count = BAND.max_requests
    """The number of requests that may wait; more are refused with 429. 5000 by default."""
    max_bytes: Bytes = BAND.max_bytes
    """The total size of waiting requests, such as 512Mi, which is the default; more get 429."""
    ttl: Seconds = BAND.ttl_seconds
    """How long a request may wait before it gets 429, such as 30s. 60s by default."""
    per_flow: FlowLimits = FlowLimits()


class Band(Own):
    """The queue of one criticality."""

    criticality: Criticality
    """The criticality of the requests that wait here; Critical is served first, Sheddable last."""
    fairness: Fairness = Fairness()
    ordering: OrderingName = BAND.ordering
    """The order of one model's requests: FCFS, first come, first served."""
    queue: Queue = Queue()


class ModelPolicy(Own):
    """A policy's setting for one model, overriding its InferenceModel."""

    name: ModelName
    """The model that requests name."""
    criticality: Criticality
    """The band that its requests join."""


class Limits(Own):
    """Caps on what the whole pool may have waiting, and on a request's body."""

    max_requests: Count = PLAN.limits.max_requests
    """The number of requests that may wait, over all bands. 10000 by default."""
    max_bytes: Bytes = PLAN.limits.max_bytes
    """The total size of waiting requests, over all bands, such as 1Gi, which is the default."""
    max_body_bytes: Bytes = PLAN.limits.max_body_bytes
    """The largest request body, such as 8Mi, which is the default; larger ones get 413."""


class Saturation(Own):
    """How each endpoint's limit, the number of requests it runs at once, is determined."""

    mode: SaturationMode = PLAN.saturation.mode
    """Adaptive, the default, learns from the servers' metrics; Concurrency uses maxConcurrency."""
    max_concurrency: Count = PLAN.saturation.max_concurrency
    """The limit of each server in mode Concurrency. 100 by default."""
    kv_cache_usage_threshold: Annotated[float, Field(gt=0, le=1, strict=True)] = (
        PLAN.saturation.kv_cache_usage_threshold
    )
    """The share of its KV cache in use above which a server gets no requests. 0.95 by default."""


class ModelServerMetrics(Own):
    """Where the servers publish their load as Prometheus or OpenMetrics text, for mode Adaptive.

    By default the series of vLLM, SGLang, trtllm-serve, Triton with TensorRT-LLM and
    text-generation-inference are recognized.
    """

    path: UrlPath | None = None
    """The page. By default /metrics, or /prometheus/metrics if the first has no load."""
    port: Port | None = None
    """The page's port, if it is not the one that serves requests; Triton's is 8002."""
    running: Series | None = None
    """The series of requests in the batch, such as jobs{state="running"}; matches are summed."""
    waiting: Series | None = None
    """The series of requests that wait in the server to join the batch; matches are summed."""
    kv_cache_usage: Series | None = None
    """The series of the share of KV cache in use, 0 to 1; the greatest match counts."""


class Unmatched(Own):
    """What happens to requests without an InferenceModel in the pool; they are one flow."""

    action: UnmatchedAction = PLAN.unmatched.action
    """Queue, the default, lets them wait; Reject refuses them with 404."""
    criticality: Criticality = "Standard"
    """The band that they join. Standard by default."""


class NoEndpoints(Own):
    """How long requests wait while the pool has no server."""

    ttl: Seconds = PLAN.no_endpoints_ttl_seconds
    """How long a request may wait before it gets 503, such as 120s. 60s by default."""


class Trust(Own):
    """Which headers from callers are trusted. None by default."""

    objective_header: Flag = PLAN.trust_objective_header
    """Whether the header x-gateway-inference-objective may choose an InferenceObjective."""


class PolicySpec(Own):
    """How the queue behaves. Every field but targetRefs has a default."""

    target_refs: Annotated[
        tuple[TargetRef, ...],
        Field(min_length=1, max_length=16),
        Unique(("group", "kind", "name")),
    ]
    """The pools that the policy applies to."""
    bands: Annotated[tuple[Band, ...], Field(max_length=3), Unique(("criticality",))] = ()
    """The queues by criticality. One that is not listed has a queue with the defaults."""
    models: Annotated[tuple[ModelPolicy, ...], Field(max_length=1024), Unique(("name",))] = ()
    """Models whose criticality differs from their InferenceModel's."""
    limits: Limits = Limits()
    saturation: Saturation = Saturation()
    model_server_metrics: (
        Annotated[
            ModelServerMetrics,
            Rule(
                "running and waiting must be set together, and kvCacheUsage only with them",
                "has(self.running) == has(self.waiting) "
                "&& (has(self.running) || !has(self.kvCacheUsage))",
                lambda metrics: (
                    (metrics.running is None) == (metrics.waiting is None)
                    and (metrics.running is not None or metrics.kv_cache_usage is None)
                ),
            ),
        ]
        | None
    ) = None
    unmatched: Unmatched = Unmatched()
    no_endpoints: NoEndpoints = NoEndpoints()
    trust: Trust = Trust()


class FlowControlPolicy(Own):
    """How the queue in front of a pool behaves (forebay.dev/v1alpha1)."""

    api_version: str = "forebay.dev/v1alpha1"
    kind: str = "FlowControlPolicy"
    metadata: Metadata
    spec: PolicySpec
    status: Unread[PolicyStatus] = None
