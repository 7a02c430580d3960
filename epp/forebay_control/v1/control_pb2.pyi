from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FromPicker(_message.Message):
    __slots__ = ("hello", "ack", "nack", "stats", "bye", "ping", "demand")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    NACK_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    BYE_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    DEMAND_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    ack: Ack
    nack: Nack
    stats: Stats
    bye: Bye
    ping: Ping
    demand: Demand
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., nack: _Optional[_Union[Nack, _Mapping]] = ..., stats: _Optional[_Union[Stats, _Mapping]] = ..., bye: _Optional[_Union[Bye, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ..., demand: _Optional[_Union[Demand, _Mapping]] = ...) -> None: ...

class FromOperator(_message.Message):
    __slots__ = ("program", "not_leader", "ping", "close", "shares")
    PROGRAM_FIELD_NUMBER: _ClassVar[int]
    NOT_LEADER_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    program: Program
    not_leader: NotLeader
    ping: Ping
    close: Close
    shares: Shares
    def __init__(self, program: _Optional[_Union[Program, _Mapping]] = ..., not_leader: _Optional[_Union[NotLeader, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ..., close: _Optional[_Union[Close, _Mapping]] = ..., shares: _Optional[_Union[Shares, _Mapping]] = ...) -> None: ...

class Version(_message.Message):
    __slots__ = ("epoch", "revision")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    revision: int
    def __init__(self, epoch: _Optional[int] = ..., revision: _Optional[int] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "pool", "pod_namespace", "pod_name", "pod_uid", "boot_id", "build", "applied", "highest_epoch", "features")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    POD_NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    POD_NAME_FIELD_NUMBER: _ClassVar[int]
    POD_UID_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    BUILD_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    HIGHEST_EPOCH_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    pool: str
    pod_namespace: str
    pod_name: str
    pod_uid: str
    boot_id: str
    build: str
    applied: Applied
    highest_epoch: int
    features: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, protocol: _Optional[int] = ..., pool: _Optional[str] = ..., pod_namespace: _Optional[str] = ..., pod_name: _Optional[str] = ..., pod_uid: _Optional[str] = ..., boot_id: _Optional[str] = ..., build: _Optional[str] = ..., applied: _Optional[_Union[Applied, _Mapping]] = ..., highest_epoch: _Optional[int] = ..., features: _Optional[_Iterable[str]] = ...) -> None: ...

class Applied(_message.Message):
    __slots__ = ("version", "sha256", "source", "plan_sha256")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    PLAN_SHA256_FIELD_NUMBER: _ClassVar[int]
    version: Version
    sha256: bytes
    source: str
    plan_sha256: bytes
    def __init__(self, version: _Optional[_Union[Version, _Mapping]] = ..., sha256: _Optional[bytes] = ..., source: _Optional[str] = ..., plan_sha256: _Optional[bytes] = ...) -> None: ...

class Program(_message.Message):
    __slots__ = ("nonce", "version", "sha256", "snapshot")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    nonce: int
    version: Version
    sha256: bytes
    snapshot: bytes
    def __init__(self, nonce: _Optional[int] = ..., version: _Optional[_Union[Version, _Mapping]] = ..., sha256: _Optional[bytes] = ..., snapshot: _Optional[bytes] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("nonce", "version", "sha256", "apply_seconds", "plan_sha256")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    APPLY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PLAN_SHA256_FIELD_NUMBER: _ClassVar[int]
    nonce: int
    version: Version
    sha256: bytes
    apply_seconds: float
    plan_sha256: bytes
    def __init__(self, nonce: _Optional[int] = ..., version: _Optional[_Union[Version, _Mapping]] = ..., sha256: _Optional[bytes] = ..., apply_seconds: _Optional[float] = ..., plan_sha256: _Optional[bytes] = ...) -> None: ...

class Nack(_message.Message):
    __slots__ = ("nonce", "version", "code", "errors", "still_running", "highest_epoch", "applied")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    STILL_RUNNING_FIELD_NUMBER: _ClassVar[int]
    HIGHEST_EPOCH_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    nonce: int
    version: Version
    code: str
    errors: _containers.RepeatedCompositeFieldContainer[FieldError]
    still_running: Applied
    highest_epoch: int
    applied: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, nonce: _Optional[int] = ..., version: _Optional[_Union[Version, _Mapping]] = ..., code: _Optional[str] = ..., errors: _Optional[_Iterable[_Union[FieldError, _Mapping]]] = ..., still_running: _Optional[_Union[Applied, _Mapping]] = ..., highest_epoch: _Optional[int] = ..., applied: _Optional[_Iterable[str]] = ...) -> None: ...

class FieldError(_message.Message):
    __slots__ = ("path", "message")
    PATH_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    path: str
    message: str
    def __init__(self, path: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class Stats(_message.Message):
    __slots__ = ("saturation", "endpoints", "in_flight", "bands", "endpoints_out", "mode", "shadow")
    SATURATION_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    BANDS_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_OUT_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    saturation: float
    endpoints: int
    in_flight: int
    bands: _containers.RepeatedCompositeFieldContainer[BandStats]
    endpoints_out: int
    mode: str
    shadow: _containers.RepeatedCompositeFieldContainer[ShadowStats]
    def __init__(self, saturation: _Optional[float] = ..., endpoints: _Optional[int] = ..., in_flight: _Optional[int] = ..., bands: _Optional[_Iterable[_Union[BandStats, _Mapping]]] = ..., endpoints_out: _Optional[int] = ..., mode: _Optional[str] = ..., shadow: _Optional[_Iterable[_Union[ShadowStats, _Mapping]]] = ...) -> None: ...

class ShadowStats(_message.Message):
    __slots__ = ("band", "requests", "dispatched", "rejected", "evicted", "overtaken", "waited_seconds")
    BAND_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    DISPATCHED_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    OVERTAKEN_FIELD_NUMBER: _ClassVar[int]
    WAITED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    band: str
    requests: int
    dispatched: int
    rejected: int
    evicted: int
    overtaken: int
    waited_seconds: float
    def __init__(self, band: _Optional[str] = ..., requests: _Optional[int] = ..., dispatched: _Optional[int] = ..., rejected: _Optional[int] = ..., evicted: _Optional[int] = ..., overtaken: _Optional[int] = ..., waited_seconds: _Optional[float] = ...) -> None: ...

class BandStats(_message.Message):
    __slots__ = ("band", "requests", "bytes", "oldest_seconds", "dispatched", "rejected", "evicted")
    BAND_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    OLDEST_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DISPATCHED_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    band: str
    requests: int
    bytes: int
    oldest_seconds: float
    dispatched: int
    rejected: int
    evicted: int
    def __init__(self, band: _Optional[str] = ..., requests: _Optional[int] = ..., bytes: _Optional[int] = ..., oldest_seconds: _Optional[float] = ..., dispatched: _Optional[int] = ..., rejected: _Optional[int] = ..., evicted: _Optional[int] = ...) -> None: ...

class Demand(_message.Message):
    __slots__ = ("number", "seen", "shared", "full", "bands", "endpoints")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    FULL_FIELD_NUMBER: _ClassVar[int]
    BANDS_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    number: int
    seen: int
    shared: bool
    full: bool
    bands: _containers.RepeatedCompositeFieldContainer[BandDemand]
    endpoints: _containers.RepeatedCompositeFieldContainer[HeldSlots]
    def __init__(self, number: _Optional[int] = ..., seen: _Optional[int] = ..., shared: _Optional[bool] = ..., full: _Optional[bool] = ..., bands: _Optional[_Iterable[_Union[BandDemand, _Mapping]]] = ..., endpoints: _Optional[_Iterable[_Union[HeldSlots, _Mapping]]] = ...) -> None: ...

class BandDemand(_message.Message):
    __slots__ = ("band", "priority", "reserved_percent", "max_saturation_percent", "flows")
    BAND_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    RESERVED_PERCENT_FIELD_NUMBER: _ClassVar[int]
    MAX_SATURATION_PERCENT_FIELD_NUMBER: _ClassVar[int]
    FLOWS_FIELD_NUMBER: _ClassVar[int]
    band: str
    priority: int
    reserved_percent: int
    max_saturation_percent: int
    flows: _containers.RepeatedCompositeFieldContainer[FlowDemand]
    def __init__(self, band: _Optional[str] = ..., priority: _Optional[int] = ..., reserved_percent: _Optional[int] = ..., max_saturation_percent: _Optional[int] = ..., flows: _Optional[_Iterable[_Union[FlowDemand, _Mapping]]] = ...) -> None: ...

class FlowDemand(_message.Message):
    __slots__ = ("path", "weights", "waiting", "running")
    PATH_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    path: _containers.RepeatedScalarFieldContainer[str]
    weights: _containers.RepeatedScalarFieldContainer[int]
    waiting: int
    running: int
    def __init__(self, path: _Optional[_Iterable[str]] = ..., weights: _Optional[_Iterable[int]] = ..., waiting: _Optional[int] = ..., running: _Optional[int] = ...) -> None: ...

class HeldSlots(_message.Message):
    __slots__ = ("address", "slots", "running", "limit", "inside")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    INSIDE_FIELD_NUMBER: _ClassVar[int]
    address: str
    slots: int
    running: int
    limit: int
    inside: int
    def __init__(self, address: _Optional[str] = ..., slots: _Optional[int] = ..., running: _Optional[int] = ..., limit: _Optional[int] = ..., inside: _Optional[int] = ...) -> None: ...

class Shares(_message.Message):
    __slots__ = ("number", "alone", "total", "full", "epps", "rank", "shares")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ALONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    FULL_FIELD_NUMBER: _ClassVar[int]
    EPPS_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    number: int
    alone: bool
    total: int
    full: bool
    epps: int
    rank: int
    shares: _containers.RepeatedCompositeFieldContainer[Share]
    def __init__(self, number: _Optional[int] = ..., alone: _Optional[bool] = ..., total: _Optional[int] = ..., full: _Optional[bool] = ..., epps: _Optional[int] = ..., rank: _Optional[int] = ..., shares: _Optional[_Iterable[_Union[Share, _Mapping]]] = ...) -> None: ...

class Share(_message.Message):
    __slots__ = ("address", "slots", "at_most")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    AT_MOST_FIELD_NUMBER: _ClassVar[int]
    address: str
    slots: int
    at_most: bool
    def __init__(self, address: _Optional[str] = ..., slots: _Optional[int] = ..., at_most: _Optional[bool] = ...) -> None: ...

class Bye(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Ping(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NotLeader(_message.Message):
    __slots__ = ("hint",)
    HINT_FIELD_NUMBER: _ClassVar[int]
    hint: str
    def __init__(self, hint: _Optional[str] = ...) -> None: ...

class Close(_message.Message):
    __slots__ = ("retry_after_seconds",)
    RETRY_AFTER_SECONDS_FIELD_NUMBER: _ClassVar[int]
    retry_after_seconds: float
    def __init__(self, retry_after_seconds: _Optional[float] = ...) -> None: ...

class Snapshot(_message.Message):
    __slots__ = ("plan", "endpoints", "pool_uid", "sources", "deleted")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    POOL_UID_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    DELETED_FIELD_NUMBER: _ClassVar[int]
    plan: Plan
    endpoints: Endpoints
    pool_uid: str
    sources: _containers.RepeatedCompositeFieldContainer[Source]
    deleted: bool
    def __init__(self, plan: _Optional[_Union[Plan, _Mapping]] = ..., endpoints: _Optional[_Union[Endpoints, _Mapping]] = ..., pool_uid: _Optional[str] = ..., sources: _Optional[_Iterable[_Union[Source, _Mapping]]] = ..., deleted: _Optional[bool] = ...) -> None: ...

class Source(_message.Message):
    __slots__ = ("kind", "namespace", "name", "uid", "generation")
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    kind: str
    namespace: str
    name: str
    uid: str
    generation: int
    def __init__(self, kind: _Optional[str] = ..., namespace: _Optional[str] = ..., name: _Optional[str] = ..., uid: _Optional[str] = ..., generation: _Optional[int] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("pool", "bands", "models", "limits", "saturation", "unmatched", "no_endpoints_ttl_seconds", "objectives", "trust_objective_header", "metrics", "tenant_header", "tenants", "trust_deadline_headers", "selection", "mode", "shadow")
    POOL_FIELD_NUMBER: _ClassVar[int]
    BANDS_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    SATURATION_FIELD_NUMBER: _ClassVar[int]
    UNMATCHED_FIELD_NUMBER: _ClassVar[int]
    NO_ENDPOINTS_TTL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    OBJECTIVES_FIELD_NUMBER: _ClassVar[int]
    TRUST_OBJECTIVE_HEADER_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    TENANT_HEADER_FIELD_NUMBER: _ClassVar[int]
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    TRUST_DEADLINE_HEADERS_FIELD_NUMBER: _ClassVar[int]
    SELECTION_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    pool: str
    bands: _containers.RepeatedCompositeFieldContainer[Band]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    limits: Limits
    saturation: Saturation
    unmatched: Unmatched
    no_endpoints_ttl_seconds: float
    objectives: _containers.RepeatedCompositeFieldContainer[Objective]
    trust_objective_header: bool
    metrics: Metrics
    tenant_header: str
    tenants: _containers.RepeatedCompositeFieldContainer[Tenant]
    trust_deadline_headers: bool
    selection: Selection
    mode: str
    shadow: Plan
    def __init__(self, pool: _Optional[str] = ..., bands: _Optional[_Iterable[_Union[Band, _Mapping]]] = ..., models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., saturation: _Optional[_Union[Saturation, _Mapping]] = ..., unmatched: _Optional[_Union[Unmatched, _Mapping]] = ..., no_endpoints_ttl_seconds: _Optional[float] = ..., objectives: _Optional[_Iterable[_Union[Objective, _Mapping]]] = ..., trust_objective_header: _Optional[bool] = ..., metrics: _Optional[_Union[Metrics, _Mapping]] = ..., tenant_header: _Optional[str] = ..., tenants: _Optional[_Iterable[_Union[Tenant, _Mapping]]] = ..., trust_deadline_headers: _Optional[bool] = ..., selection: _Optional[_Union[Selection, _Mapping]] = ..., mode: _Optional[str] = ..., shadow: _Optional[_Union[Plan, _Mapping]] = ...) -> None: ...

class Selection(_message.Message):
    __slots__ = ("scorers", "picker")
    SCORERS_FIELD_NUMBER: _ClassVar[int]
    PICKER_FIELD_NUMBER: _ClassVar[int]
    scorers: _containers.RepeatedCompositeFieldContainer[Scorer]
    picker: str
    def __init__(self, scorers: _Optional[_Iterable[_Union[Scorer, _Mapping]]] = ..., picker: _Optional[str] = ...) -> None: ...

class Scorer(_message.Message):
    __slots__ = ("type", "weight")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    type: str
    weight: int
    def __init__(self, type: _Optional[str] = ..., weight: _Optional[int] = ...) -> None: ...

class Metrics(_message.Message):
    __slots__ = ("path", "port", "running", "waiting", "kv_cache_usage")
    PATH_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_USAGE_FIELD_NUMBER: _ClassVar[int]
    path: str
    port: int
    running: Series
    waiting: Series
    kv_cache_usage: Series
    def __init__(self, path: _Optional[str] = ..., port: _Optional[int] = ..., running: _Optional[_Union[Series, _Mapping]] = ..., waiting: _Optional[_Union[Series, _Mapping]] = ..., kv_cache_usage: _Optional[_Union[Series, _Mapping]] = ...) -> None: ...

class Series(_message.Message):
    __slots__ = ("name", "labels")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    name: str
    labels: _containers.RepeatedCompositeFieldContainer[SeriesLabel]
    def __init__(self, name: _Optional[str] = ..., labels: _Optional[_Iterable[_Union[SeriesLabel, _Mapping]]] = ...) -> None: ...

class SeriesLabel(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: str
    def __init__(self, name: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...

class Band(_message.Message):
    __slots__ = ("name", "priority", "fairness", "ordering", "ttl_seconds", "max_requests", "max_bytes", "flow_max_requests", "flow_max_bytes", "between", "inner", "when_full", "max_saturation_percent", "reserved_percent")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    FAIRNESS_FIELD_NUMBER: _ClassVar[int]
    ORDERING_FIELD_NUMBER: _ClassVar[int]
    TTL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    FLOW_MAX_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    FLOW_MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    BETWEEN_FIELD_NUMBER: _ClassVar[int]
    INNER_FIELD_NUMBER: _ClassVar[int]
    WHEN_FULL_FIELD_NUMBER: _ClassVar[int]
    MAX_SATURATION_PERCENT_FIELD_NUMBER: _ClassVar[int]
    RESERVED_PERCENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    priority: int
    fairness: str
    ordering: str
    ttl_seconds: float
    max_requests: int
    max_bytes: int
    flow_max_requests: int
    flow_max_bytes: int
    between: str
    inner: Inner
    when_full: str
    max_saturation_percent: int
    reserved_percent: int
    def __init__(self, name: _Optional[str] = ..., priority: _Optional[int] = ..., fairness: _Optional[str] = ..., ordering: _Optional[str] = ..., ttl_seconds: _Optional[float] = ..., max_requests: _Optional[int] = ..., max_bytes: _Optional[int] = ..., flow_max_requests: _Optional[int] = ..., flow_max_bytes: _Optional[int] = ..., between: _Optional[str] = ..., inner: _Optional[_Union[Inner, _Mapping]] = ..., when_full: _Optional[str] = ..., max_saturation_percent: _Optional[int] = ..., reserved_percent: _Optional[int] = ...) -> None: ...

class Inner(_message.Message):
    __slots__ = ("fairness",)
    FAIRNESS_FIELD_NUMBER: _ClassVar[int]
    fairness: str
    def __init__(self, fairness: _Optional[str] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "band", "targets", "weight", "time_to_first_token_seconds")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BAND_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    TIME_TO_FIRST_TOKEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    band: str
    targets: _containers.RepeatedCompositeFieldContainer[Target]
    weight: int
    time_to_first_token_seconds: float
    def __init__(self, name: _Optional[str] = ..., band: _Optional[str] = ..., targets: _Optional[_Iterable[_Union[Target, _Mapping]]] = ..., weight: _Optional[int] = ..., time_to_first_token_seconds: _Optional[float] = ...) -> None: ...

class Tenant(_message.Message):
    __slots__ = ("name", "weight")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    name: str
    weight: int
    def __init__(self, name: _Optional[str] = ..., weight: _Optional[int] = ...) -> None: ...

class Objective(_message.Message):
    __slots__ = ("name", "band")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BAND_FIELD_NUMBER: _ClassVar[int]
    name: str
    band: str
    def __init__(self, name: _Optional[str] = ..., band: _Optional[str] = ...) -> None: ...

class Target(_message.Message):
    __slots__ = ("name", "weight")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    name: str
    weight: int
    def __init__(self, name: _Optional[str] = ..., weight: _Optional[int] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_requests", "max_bytes", "max_body_bytes")
    MAX_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_BODY_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_requests: int
    max_bytes: int
    max_body_bytes: int
    def __init__(self, max_requests: _Optional[int] = ..., max_bytes: _Optional[int] = ..., max_body_bytes: _Optional[int] = ...) -> None: ...

class Saturation(_message.Message):
    __slots__ = ("mode", "max_concurrency", "kv_cache_usage_threshold", "time_to_first_token_seconds")
    MODE_FIELD_NUMBER: _ClassVar[int]
    MAX_CONCURRENCY_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_USAGE_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    TIME_TO_FIRST_TOKEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    mode: str
    max_concurrency: int
    kv_cache_usage_threshold: float
    time_to_first_token_seconds: float
    def __init__(self, mode: _Optional[str] = ..., max_concurrency: _Optional[int] = ..., kv_cache_usage_threshold: _Optional[float] = ..., time_to_first_token_seconds: _Optional[float] = ...) -> None: ...

class Unmatched(_message.Message):
    __slots__ = ("action", "band")
    ACTION_FIELD_NUMBER: _ClassVar[int]
    BAND_FIELD_NUMBER: _ClassVar[int]
    action: str
    band: str
    def __init__(self, action: _Optional[str] = ..., band: _Optional[str] = ...) -> None: ...

class Endpoints(_message.Message):
    __slots__ = ("endpoints",)
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    endpoints: _containers.RepeatedCompositeFieldContainer[Endpoint]
    def __init__(self, endpoints: _Optional[_Iterable[_Union[Endpoint, _Mapping]]] = ...) -> None: ...

class Endpoint(_message.Message):
    __slots__ = ("address", "name", "uid")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    address: str
    name: str
    uid: str
    def __init__(self, address: _Optional[str] = ..., name: _Optional[str] = ..., uid: _Optional[str] = ...) -> None: ...
