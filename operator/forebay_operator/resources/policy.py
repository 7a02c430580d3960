"""FlowControlPolicy: the kind that is ours, and strict."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

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


class TargetRef(Own):
    """A pool the policy is for, in the policy's own namespace."""

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

    policy: Literal["FCFS", "RoundRobin"] = "FCFS"
    """FCFS serves in order of arrival, RoundRobin lets the models take turns."""


class FlowLimits(Own):
    """What one model may have waiting in a band; the band's own caps where unset."""

    max_requests: Count | None = None
    """Requests of one model that may wait."""
    max_bytes: Bytes | None = None
    """Bytes of the waiting requests of one model, such as 64Mi."""


class Queue(Own):
    """What may wait in a band, and for how long."""

    max_requests: Count = 5000
    """Requests that may wait; more are refused with 429."""
    max_bytes: Bytes = 512 << 20
    """Bytes of the requests that may wait, such as 512Mi; more are refused with 429."""
    ttl: Seconds = 60.0
    """How long a request may wait, such as 30s, before it is refused with 429."""
    per_flow: FlowLimits = FlowLimits()


class Band(Own):
    """The queue of one criticality."""

    criticality: Criticality
    """Whose requests wait here; Critical is served first, Sheddable last."""
    fairness: Fairness = Fairness()
    ordering: Literal["FCFS"] = "FCFS"
    """The order within one model: FCFS, first come, first served."""
    queue: Queue = Queue()


class ModelPolicy(Own):
    """What a policy says of one model, above what its InferenceModel says."""

    name: ModelName
    """The model that requests name."""
    criticality: Criticality
    """Which queue its requests join."""


class Limits(Own):
    """What the whole pool may have waiting, and the largest request body."""

    max_requests: Count = 10_000
    """Requests that may wait, over all bands."""
    max_bytes: Bytes = 1 << 30
    """Bytes of the requests that may wait, over all bands, such as 1Gi."""
    max_body_bytes: Bytes = 8 << 20
    """The largest request body, such as 8Mi; larger ones are refused with 413."""


class Saturation(Own):
    """How it is found out how many requests a server takes at once."""

    mode: Literal["Adaptive", "Concurrency"] = "Adaptive"
    """Adaptive learns from the servers' metrics; Concurrency takes maxConcurrency."""
    max_concurrency: Count = 100
    """Requests at once per server, for mode Concurrency."""
    kv_cache_usage_threshold: Annotated[float, Field(gt=0, le=1, strict=True)] = 0.95
    """The share of its KV cache above which a server gets no more requests."""


class ModelServerMetrics(Own):
    """Where the servers publish their load, for mode Adaptive.

    Unset, it is found at vLLM, SGLang, trtllm-serve, Triton with TensorRT-LLM and
    text-generation-inference. The text there is that of Prometheus or OpenMetrics.
    """

    path: UrlPath | None = None
    """The page, such as /metrics; where unset, /metrics or else /prometheus/metrics."""
    port: Port | None = None
    """The page's port, where it is not the one that requests go to; Triton's is 8002."""
    running: Series | None = None
    """The series of requests in the batch, such as jobs{state="running"}; it is summed."""
    waiting: Series | None = None
    """The series of requests that wait in the server for room in the batch; it is summed."""
    kv_cache_usage: Series | None = None
    """The series of the share of KV cache in use, 0 to 1; the greatest counts."""


class Unmatched(Own):
    """What happens to requests that no InferenceModel of the pool is for; they are one flow."""

    action: Literal["Queue", "Reject"] = "Queue"
    """Queue lets them wait, Reject refuses them with 404."""
    criticality: Criticality = "Standard"
    """Which queue they join."""


class NoEndpoints(Own):
    """How long requests wait while the pool has no servers."""

    ttl: Seconds = 60.0
    """How long a request may wait, such as 120s, before it is refused with 503."""


class Trust(Own):
    """Which headers of callers count."""

    objective_header: Flag = False
    """Whether x-gateway-inference-objective may choose an InferenceObjective."""


class PolicySpec(Own):
    """How the queue behaves. Everything has a default but the pool."""

    target_refs: Annotated[
        tuple[TargetRef, ...],
        Field(min_length=1, max_length=16),
        Unique(("group", "kind", "name")),
    ]
    """The pools the policy is for."""
    bands: Annotated[tuple[Band, ...], Field(max_length=3), Unique(("criticality",))] = ()
    """The queues. A criticality that is not listed has one too, with the defaults."""
    models: Annotated[tuple[ModelPolicy, ...], Field(max_length=1024), Unique(("name",))] = ()
    """Models that are to have another criticality than their InferenceModel's."""
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
