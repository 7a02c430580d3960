"""FlowControlPolicy, forebay's own kind: an unknown field is an error."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from forebay_control.plan import (
    DEFAULT_BANDS,
    HEADER_NAME,
    MAX_HEADER_LENGTH,
    MAX_PRIORITY,
    MAX_SCORERS,
    MAX_TENANT_LENGTH,
    MAX_TENANTS,
    MAX_WEIGHT,
    MIN_PRIORITY,
    Between,
    Mode,
    OrderingName,
    PickerName,
    Plan,
    SaturationMode,
    ScorerName,
    UnmatchedAction,
    WhenFull,
)
from forebay_operator.resources import rules
from forebay_operator.resources.fields import (
    ATOMIC,
    WHOLE,
    Bytes,
    Count,
    Metadata,
    ModelName,
    Name,
    Own,
    Port,
    Seconds,
    Series,
    Unique,
    Unread,
    UrlPath,
)
from forebay_operator.resources.status import PolicyStatus

PLAN = Plan()  # its defaults
BAND = DEFAULT_BANDS[0]
TENANT_HEADER = "x-llm-d-inference-fairness-id"

TrustedHeader = Literal["Objective", "Tenant", "Deadline"]
FairnessPolicy = Literal["FCFS", "RoundRobin", "WeightedFair", "TokenFair"]
FairnessCost = Literal["Requests", "Tokens"]
Weight = Annotated[int, Field(ge=1, le=MAX_WEIGHT, strict=True), WHOLE]
BandName = Annotated[
    str, Field(min_length=1, max_length=63, pattern="^[A-Za-z]([-A-Za-z0-9]*[A-Za-z0-9])?$")
]


class TargetRef(Own):
    """A pool that the policy applies to, in the policy's own namespace."""

    group: Literal["inference.networking.k8s.io", "inference.networking.x-k8s.io"]
    """The pool's API group."""
    kind: Literal["InferencePool"]
    """The pool's kind."""
    name: Name
    """The pool's name."""


class WeightedFair(Own):
    """What WeightedFair counts."""

    cost: FairnessCost = "Requests"
    """Requests, the default, or Tokens, estimated from earlier answers of the model."""


class FairnessLevel(Own):
    """Between what a band is shared, and how."""

    between: Between
    """What takes part: Models, or Tenants, which takes the trusted header Tenant."""
    policy: FairnessPolicy
    """FCFS serves in order of arrival.

    RoundRobin lets all take turns, WeightedFair serves in proportion to weights, and TokenFair
    shares the tokens of prompts and answers in proportion to weights.
    """
    weighted_fair: WeightedFair | None = None
    """Settings of policy WeightedFair; refused with another policy."""


class Ordering(Own):
    """Which request of a flow is next: of a model, or of a tenant where tenants share the band."""

    policy: OrderingName
    """FCFS, the default, serves in order of arrival.

    EarliestDeadline serves what is due first: by a trusted header, the model's timeToFirstToken,
    or the TTL. ShortestPrompt serves short prompts before longer ones, which wait about a
    millisecond longer for each token.
    """


class FlowLimits(Own):
    """Caps on what one flow, a model or a tenant, may have waiting; the band's caps by default."""

    max_requests: Count | None = None
    """The number of requests of one flow that may wait."""
    max_bytes: Bytes | None = None
    """The total size of one flow's waiting requests, such as 64Mi."""


class Queue(Own):
    """How many requests may wait in a band, and for how long."""

    max_requests: Count = BAND.max_requests
    """The number of requests that may wait; more are refused with 429. 5000 by default."""
    max_bytes: Bytes = BAND.max_bytes
    """The total size of waiting requests, such as 512Mi, which is the default; more get 429."""
    ttl: Seconds = BAND.ttl_seconds
    """How long a request may wait before it gets 429, such as 30s. 60s by default."""
    when_full: WhenFull = BAND.when_full
    """What happens when spec.limits are reached: Reject, the default, refuses the new request.

    DisplaceLower takes the place of a request that waits in a band of lower priority.
    """
    per_flow: FlowLimits = FlowLimits()


class Band(Own):
    """A queue and its priority; a band is served before those of lower priority."""

    name: BandName
    """The band's name; InferenceModels join Critical, Standard or Sheddable by criticality."""
    priority: Annotated[int, Field(ge=MIN_PRIORITY, le=MAX_PRIORITY, strict=True)] | None = None
    """The priority, not set for Critical (100), Standard (0) and Sheddable (-100).

    InferenceObjectives join the nearest band at or below their priority.
    """
    fairness: Annotated[
        tuple[Annotated[FairnessLevel, rules.OWN_SETTINGS], ...],
        Field(max_length=2, json_schema_extra=ATOMIC),
    ] = ()
    """How the band is shared, the outer level first. FCFS between models by default."""
    ordering: Ordering = Ordering(policy=BAND.ordering)
    queue: Queue = Queue()
    max_saturation_percent: Annotated[int, Field(ge=1, le=100, strict=True), WHOLE] = (
        BAND.max_saturation_percent
    )
    """The percentage of the pool's slots up to which the band may fill it. 100 by default."""
    reserved_percent: Annotated[int, Field(ge=0, le=100, strict=True), WHOLE] = (
        BAND.reserved_percent
    )
    """The least percentage of dispatches while the band waits, against starvation. 0 by default."""


class ModelPolicy(Own):
    """A policy's settings for one model, above what its InferenceModel says."""

    name: ModelName
    """The model that requests name."""
    band: BandName | None = None
    """The band that its requests join: one of the policy's, or Critical, Standard or Sheddable.

    By default that of the InferenceModel's criticality, or Standard.
    """
    weight: Weight = 1
    """Its share relative to other models' where WeightedFair or TokenFair is. 1 by default."""
    time_to_first_token: Seconds | None = None
    """How soon its answers should begin, such as 2s, for EarliestDeadline. The TTL by default."""


class TenantWeight(Own):
    """A tenant's weight."""

    name: Annotated[str, Field(min_length=1, max_length=MAX_TENANT_LENGTH)]
    """The tenant, as in the header."""
    weight: Weight
    """Its share relative to other tenants' where WeightedFair or TokenFair is; they have 1."""


class Tenants(Own):
    """Who sends requests, for fairness between tenants."""

    header: Annotated[
        str, Field(min_length=1, max_length=MAX_HEADER_LENGTH, pattern=f"^{HEADER_NAME}$")
    ] = TENANT_HEADER
    """The header that names the tenant, in lower case, where the header Tenant is trusted.

    x-llm-d-inference-fairness-id by default, with its alias x-gateway-inference-fairness-id.
    """
    weights: Annotated[
        tuple[TenantWeight, ...], Field(max_length=MAX_TENANTS), Unique(("name",))
    ] = ()
    """Tenants whose weight is not 1."""


class Limits(Own):
    """Caps on what the whole pool may have waiting, and on a request's body."""

    max_requests: Count = PLAN.limits.max_requests
    """The number of requests that may wait, over all bands. 10000 by default."""
    max_bytes: Bytes = PLAN.limits.max_bytes
    """The total size of waiting requests, over all bands, such as 1Gi, which is the default."""
    max_body_bytes: Bytes = PLAN.limits.max_body_bytes
    """The largest request body, such as 8Mi, which is the default; larger ones get 413."""


class AdaptiveLimit(Own):
    """Limits that are learned from the servers' metrics."""

    max_kv_cache_usage_percent: Annotated[
        int, Field(alias="maxKVCacheUsagePercent", ge=1, le=100, strict=True), WHOLE
    ] = round(PLAN.saturation.kv_cache_usage_threshold * 100)
    """The percentage of its KV cache in use above which a server gets nothing. 95 by default."""
    time_to_first_token: Seconds = PLAN.saturation.time_to_first_token_seconds
    """How long a prompt may wait in a server to be prefilled, such as 500ms, which is the default.

    A server in which it would wait longer gets no more prompts, once its speed is known.
    """


class ConcurrencyLimit(Own):
    """The same fixed limit for every server."""

    max_requests_per_endpoint: Count = PLAN.saturation.max_concurrency
    """The number of requests that each server runs at once. 100 by default."""


class Saturation(Own):
    """How each endpoint's limit, the number of requests it runs at once, is determined.

    By default it is learned (Adaptive).
    """

    type: SaturationMode
    """Adaptive learns limits from the servers' metrics; Concurrency takes a fixed one."""
    adaptive: AdaptiveLimit | None = None
    """Settings of type Adaptive; refused with another type."""
    concurrency: ConcurrencyLimit | None = None
    """Settings of type Concurrency; refused with another type."""


class Scorer(Own):
    """A point of view from which servers are rated, from 0 to 1."""

    type: ScorerName
    """Load prefers the server of which the smallest part is occupied.

    KVCacheUsage prefers the one whose KV cache is the emptiest. PrefixCache prefers the one that
    has the most of the prompt in its prefix cache, while waiting there takes less than it saves.
    """
    weight: Weight = 1
    """How much it counts relative to the other scorers. 1 by default."""


class Selection(Own):
    """How a server is chosen among those that can take a request."""

    scorers: Annotated[
        tuple[Scorer, ...], Field(min_length=1, max_length=MAX_SCORERS), Unique(("type",))
    ] = tuple(Scorer(type=each.type, weight=each.weight) for each in PLAN.choice.scorers)
    """The points of view, added up by weight. PrefixCache 3 and Load 2 by default."""
    picker: PickerName = PLAN.choice.picker
    """MaxScore, the default, takes the server that is rated best, at random among equals.

    PowerOfTwo takes the better one of two that are drawn at random.
    """


class ModelServerMetrics(Own):
    """Where the servers publish their load as Prometheus or OpenMetrics text, for type Adaptive.

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
    band: BandName = PLAN.unmatched.band
    """The band that they join. Standard by default."""


class NoEndpoints(Own):
    """How long requests wait while the pool has no server."""

    ttl: Seconds = PLAN.no_endpoints_ttl_seconds
    """How long a request may wait before it gets 503, such as 120s. 60s by default."""


class PolicySpec(Own):
    """How the queue behaves. Every field but targetRefs has a default."""

    target_refs: Annotated[
        tuple[TargetRef, ...],
        Field(min_length=1, max_length=16),
        Unique(("group", "kind", "name")),
    ]
    """The pools that the policy applies to."""
    mode: Mode = PLAN.mode
    """Enforce, the default, lets requests wait; Observe sends each at once and refuses none.

    Observe computes beside the traffic what Enforce would do: waits, refusals, overtaking.
    """
    bands: Annotated[
        tuple[
            Annotated[Band, rules.BUILT_IN_PRIORITY, rules.OWN_PRIORITY, rules.DIFFERENT_LEVELS],
            ...,
        ],
        Field(max_length=16),
        Unique(("name",)),
        rules.DIFFERENT_PRIORITIES,
        rules.RESERVED_IN_SUM,
    ] = ()
    """The queues. Critical, Standard and Sheddable exist even if not listed, with the defaults."""
    models: Annotated[tuple[ModelPolicy, ...], Field(max_length=1024), Unique(("name",))] = ()
    """Settings of single models."""
    tenants: Tenants = Tenants()
    limits: Limits = Limits()
    saturation: Annotated[Saturation, rules.OWN_TYPE] = Saturation(type=PLAN.saturation.mode)
    selection: Selection = Selection()
    model_server_metrics: (
        Annotated[
            ModelServerMetrics,
            rules.LOAD_SERIES,
        ]
        | None
    ) = None
    unmatched: Unmatched = Unmatched()
    no_endpoints: NoEndpoints = NoEndpoints()
    trusted_headers: Annotated[tuple[TrustedHeader, ...], Field(max_length=8), Unique()] = ()
    """The headers of callers that count, none by default.

    Objective: x-llm-d-inference-objective chooses an InferenceObjective. Tenant: the header of
    spec.tenants names the tenant. Deadline: x-llm-d-slo-ttft-ms says when the answer should begin,
    and x-forebay-ttl-ms how long the request may wait.
    """


class FlowControlPolicy(Own):
    """How the queue in front of a pool behaves (forebay.dev/v1alpha1)."""

    api_version: str = "forebay.dev/v1alpha1"
    kind: str = "FlowControlPolicy"
    metadata: Metadata
    spec: Annotated[
        PolicySpec,
        rules.BandsExist(
            "models",
            "(has(self.models) ? self.models.map(m, has(m.band), m.band) : [])",
            lambda spec: (model.band for model in spec.models if model.band is not None),
        ),
        rules.BandsExist(
            "unmatched.band",
            "(has(self.unmatched) && has(self.unmatched.band) ? [self.unmatched.band] : [])",
            lambda spec: (spec.unmatched.band,),
        ),
    ]
    status: Unread[PolicyStatus] = None

    # What fields of an earlier shape are called now; [] is an entry of a list.
    renamed: ClassVar[dict[str, str]] = {
        "spec.bands[].criticality": "spec.bands[].name",
        "spec.bands[].fairness": "spec.bands[].fairness[0].policy",
        "spec.bands[].ordering": "spec.bands[].ordering.policy",
        "spec.models[].criticality": "spec.models[].band",
        "spec.saturation.mode": "spec.saturation.type",
        "spec.saturation.maxConcurrency": "spec.saturation.concurrency.maxRequestsPerEndpoint",
        "spec.saturation.kvCacheUsageThreshold": "spec.saturation.adaptive.maxKVCacheUsagePercent",
        "spec.unmatched.criticality": "spec.unmatched.band",
        "spec.trust": "spec.trustedHeaders",
    }
