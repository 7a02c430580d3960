from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Snapshot(_message.Message):
    __slots__ = ("plan", "endpoints")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    plan: Plan
    endpoints: Endpoints
    def __init__(self, plan: _Optional[_Union[Plan, _Mapping]] = ..., endpoints: _Optional[_Union[Endpoints, _Mapping]] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("pool", "bands", "models", "limits", "saturation", "unmatched", "no_endpoints_ttl_seconds")
    POOL_FIELD_NUMBER: _ClassVar[int]
    BANDS_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    SATURATION_FIELD_NUMBER: _ClassVar[int]
    UNMATCHED_FIELD_NUMBER: _ClassVar[int]
    NO_ENDPOINTS_TTL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    pool: str
    bands: _containers.RepeatedCompositeFieldContainer[Band]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    limits: Limits
    saturation: Saturation
    unmatched: Unmatched
    no_endpoints_ttl_seconds: float
    def __init__(self, pool: _Optional[str] = ..., bands: _Optional[_Iterable[_Union[Band, _Mapping]]] = ..., models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., saturation: _Optional[_Union[Saturation, _Mapping]] = ..., unmatched: _Optional[_Union[Unmatched, _Mapping]] = ..., no_endpoints_ttl_seconds: _Optional[float] = ...) -> None: ...

class Band(_message.Message):
    __slots__ = ("name", "priority", "fairness", "ordering", "ttl_seconds", "max_requests", "max_bytes", "flow_max_requests", "flow_max_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    FAIRNESS_FIELD_NUMBER: _ClassVar[int]
    ORDERING_FIELD_NUMBER: _ClassVar[int]
    TTL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    FLOW_MAX_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    FLOW_MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    priority: int
    fairness: str
    ordering: str
    ttl_seconds: float
    max_requests: int
    max_bytes: int
    flow_max_requests: int
    flow_max_bytes: int
    def __init__(self, name: _Optional[str] = ..., priority: _Optional[int] = ..., fairness: _Optional[str] = ..., ordering: _Optional[str] = ..., ttl_seconds: _Optional[float] = ..., max_requests: _Optional[int] = ..., max_bytes: _Optional[int] = ..., flow_max_requests: _Optional[int] = ..., flow_max_bytes: _Optional[int] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "band", "targets")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BAND_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    name: str
    band: str
    targets: _containers.RepeatedCompositeFieldContainer[Target]
    def __init__(self, name: _Optional[str] = ..., band: _Optional[str] = ..., targets: _Optional[_Iterable[_Union[Target, _Mapping]]] = ...) -> None: ...

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
    __slots__ = ("mode", "max_concurrency", "kv_cache_usage_threshold")
    MODE_FIELD_NUMBER: _ClassVar[int]
    MAX_CONCURRENCY_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_USAGE_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    mode: str
    max_concurrency: int
    kv_cache_usage_threshold: float
    def __init__(self, mode: _Optional[str] = ..., max_concurrency: _Optional[int] = ..., kv_cache_usage_threshold: _Optional[float] = ...) -> None: ...

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
    __slots__ = ("address", "name")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    address: str
    name: str
    def __init__(self, address: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...
