"""The resources as typed objects: the only place where a field of a resource is declared.

Our own kind is strict: an unknown field is an error that names the allowed ones. Foreign kinds are
read leniently, since their owners add fields. How an error is worded is wording.py's business, what
a resource leads to is planning.py's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError, core_schema

from forebay_operator import wording

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
    from pydantic.json_schema import JsonSchemaValue

POOL_LABEL = "forebay.dev/inference-pool"
MAX_SECONDS = 3600.0
MAX_COUNT = 1_000_000
MAX_BYTES = 1 << 40

_NUMBER = r"[0-9]{1,6}(?:\.[0-9]{1,3})?"
_DURATION = re.compile("".join(f"(?:({_NUMBER}){unit})?" for unit in ("h", "m", "s", "ms")))
_UNIT_SECONDS = (Decimal(3600), Decimal(60), Decimal(1), Decimal("0.001"))
_QUANTITY = re.compile(r"([0-9]{1,15})(Ki|Mi|Gi|Ti|k|M|G|T)?")
FACTORS = {
    "": 1,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "Ki": 1 << 10,
    "Mi": 1 << 20,
    "Gi": 1 << 30,
    "Ti": 1 << 40,
}


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule beyond types and bounds, once for each reader of a field.

    Attributes:
        message: what must be; the same from both.
        cel: for the API server, over `self`.
        holds: the same in Python; None for what only the API server can tell.
    """

    message: str
    cel: str
    holds: Callable[[Any], bool] | None

    @property
    def schema(self) -> dict[str, Any]:
        """As a CRD writes it."""
        return {"x-kubernetes-validations": [{"rule": self.cel, "message": self.message}]}

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        """Check after everything else has been."""
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Add the rule to the field's schema."""
        return {**handler(schema), **self.schema}

    def _checked(self, value: Any) -> Any:
        if self.holds is not None and not self.holds(value):
            raise ValueError(self.message)
        return value


@dataclass(frozen=True, slots=True)
class Unique:
    """No two entries of a list have the same values in these fields: they are its keys."""

    keys: tuple[str, ...]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        """Check after everything else has been."""
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Make it a map by these keys, which the API server holds unique."""
        keys = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(self.keys)}
        return {**handler(schema), **keys}

    def _checked(self, entries: tuple[Any, ...]) -> tuple[Any, ...]:
        seen = set()
        for index, entry in enumerate(entries):
            key = tuple(getattr(entry, name) for name in self.keys)
            if key in seen:
                what = " ".join(map(str, key))
                raise PydanticCustomError(
                    "duplicate", "{what} is listed twice", {"what": what, "index": index}
                )
            seen.add(key)
        return entries


def _atomic(schema: dict[str, Any]) -> None:
    schema["x-kubernetes-list-type"] = "atomic"


DURATION = Rule(
    'must be a duration of more than 0 and at most 1h, such as "30s", "1m30s" or "500ms"',
    f"self != '' && self.matches(r'^{_DURATION.pattern}$') "
    "&& duration(self) > duration('0s') && duration(self) <= duration('1h')",
    None,
)
SIZE = Rule(
    "must be a number of bytes from 1 to 1Ti, such as 1048576 or 512Mi",
    "type(self) == int ? self >= 1 && self <= 1099511627776 : "
    f"self.matches(r'^{_QUANTITY.pattern}$') && quantity(self).isGreaterThan(quantity('0')) "
    "&& quantity(self).compareTo(quantity('1Ti')) <= 0",
    None,
)


def _seconds(value: object) -> object:
    """Read a duration as Go and Kubernetes write it."""
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match:
        parts = zip(match.groups(), _UNIT_SECONDS, strict=True)
        seconds = sum(Decimal(number or 0) * unit for number, unit in parts)
        if 0 < seconds <= MAX_SECONDS:
            return float(seconds)
    raise ValueError(f"{DURATION.message}, is {wording.shown(value)}")


def _bytes(value: object) -> object:
    """Read a quantity of bytes as Kubernetes writes it."""
    size = value if isinstance(value, int) and not isinstance(value, bool) else 0
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    if match:
        size = int(match[1]) * FACTORS[match[2] or ""]
    if not 1 <= size <= MAX_BYTES:
        raise ValueError(f"{SIZE.message}, is {wording.shown(value)}")
    return size


def _nothing(_: object) -> None:
    """Read nothing."""


T = TypeVar("T")
# Part of the schema, and thrown away when read: whatever is in it, the object counts.
Unread = Annotated[T | None, BeforeValidator(_nothing)]

Criticality = Literal["Critical", "Standard", "Sheddable"]
Seconds = Annotated[
    float,
    BeforeValidator(_seconds),
    WithJsonSchema({"type": "string", "maxLength": 45, **DURATION.schema}),
]
Bytes = Annotated[
    int,
    BeforeValidator(_bytes),
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "maxLength": 17,
            **SIZE.schema,
        }
    ),
]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT, strict=True)]
Name = Annotated[str, Field(min_length=1, max_length=253)]
Label = Annotated[str, Field(max_length=63)]
Labels = Annotated[dict[str, Label], Field(max_length=64)]
ModelName = Annotated[str, Field(min_length=1, max_length=256)]
Namespace = Annotated[
    str, Field(min_length=1, max_length=63, pattern="^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
]
Group = Annotated[
    str,
    Field(
        max_length=253,
        pattern=r"^$|^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$",
    ),
]
KindName = Annotated[
    str, Field(min_length=1, max_length=63, pattern="^[a-zA-Z]([-a-zA-Z0-9]*[a-zA-Z0-9])?$")
]
ControllerName = Annotated[
    str,
    Field(
        min_length=1,
        max_length=253,
        pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
        r"\/[A-Za-z0-9\/\-._~%!$&'()*+,;=:]+$",
    ),
]
Port = Annotated[int, Field(ge=1, le=65535, strict=True)]


class _Part(BaseModel):
    """A part of a resource. A field that is null counts as unset, as it does in Kubernetes."""

    model_config = ConfigDict(alias_generator=to_camel, frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_unset(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: item for key, item in value.items() if item is not None}
        return value


class _Foreign(_Part):
    """A part of a kind that somebody else owns."""

    model_config = ConfigDict(extra="ignore")


class _Own(_Part):
    """A part of a kind that is ours."""

    model_config = ConfigDict(extra="forbid")


class Metadata(_Foreign):
    """What identifies an object. `uid` and `generation` are the API server's."""

    name: Name
    namespace: Name = "default"
    labels: Labels = {}
    annotations: dict[str, str] = {}
    uid: Annotated[str, Field(max_length=128)] = ""
    generation: int = 0
    creation_timestamp: AwareDatetime | None = None
    deletion_timestamp: AwareDatetime | None = None


class Condition(_Foreign):
    """One aspect of the object's state."""

    type: Annotated[str, Field(max_length=316)]
    """What it is about."""
    status: Literal["True", "False", "Unknown"]
    """Whether it is so."""
    observed_generation: Annotated[int, Field(ge=0)] | None = None
    """The metadata.generation it was found for."""
    last_transition_time: AwareDatetime
    """When the status last changed."""
    reason: Annotated[
        str,
        Field(min_length=1, max_length=1024, pattern="^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"),
    ]
    """Why, in one word."""
    message: Annotated[str, Field(max_length=32768)]
    """Why, and what to do, for people."""


Conditions = Annotated[tuple[Condition, ...], Field(max_length=8), Unique(("type",))]


class _ConditionsStatus(_Foreign):
    """What was found out about the object."""

    conditions: Annotated[
        Conditions,
        Field(
            json_schema_extra={
                "default": [
                    {
                        "type": "Ready",
                        "status": "Unknown",
                        "reason": "Pending",
                        "message": "Waiting for controller",
                        "lastTransitionTime": "1970-01-01T00:00:00Z",
                    }
                ]
            }
        ),
    ] = ()
    """Accepted says whether the object counts."""


class _ParentReference(_Foreign):
    """The Gateway."""

    group: Group = "gateway.networking.k8s.io"
    """The parent's API group."""
    kind: KindName = "Gateway"
    """The parent's kind."""
    name: Name
    """The parent's name."""
    namespace: Namespace | None = None
    """The parent's namespace; the pool's own where unset."""


class _Parent(_Foreign):
    """What one Gateway makes of the pool."""

    parent_ref: _ParentReference
    controller_name: ControllerName | None = None
    """The controller that writes this entry."""
    conditions: Conditions = ()
    """Accepted and ResolvedRefs."""


class _PoolStatus(_Foreign):
    """What gateways make of the pool."""

    parents: Annotated[tuple[_Parent, ...], Field(max_length=32, json_schema_extra=_atomic)] = ()
    """One entry for each Gateway, written by its controller."""


class _PoolSelector(_Foreign):
    """The pods that are the pool's members."""

    match_labels: Labels = Field(min_length=1)
    """Labels a pod must have, all of them."""


class _PortNumber(_Foreign):
    """A port."""

    number: Port
    """The number of the port."""


FailureMode = Annotated[
    Unread[Literal["FailOpen", "FailClose"]], Field(json_schema_extra={"default": "FailClose"})
]


class _PickerReference(_Foreign):
    """Whom a gateway asks for an endpoint."""

    group: Group = ""
    """The API group of the endpoint picker; empty for a Service."""
    kind: KindName = "Service"
    """The kind of the endpoint picker."""
    name: Name
    """The name of the endpoint picker."""
    port: _PortNumber | None = None
    failure_mode: FailureMode = None
    """What a gateway does when the endpoint picker fails."""


class _PoolSpec(_Foreign):
    """What the pool consists of."""

    selector: _PoolSelector
    target_ports: Annotated[
        tuple[_PortNumber, ...],
        Field(min_length=1, max_length=8, json_schema_extra=_atomic),
        Rule(
            "port number must be unique",
            "self.all(p1, self.exists_one(p2, p1.number==p2.number))",
            lambda ports: len({port.number for port in ports}) == len(ports),
        ),
    ]
    """The ports on which each member serves."""
    app_protocol: Annotated[
        Unread[Literal["http", "kubernetes.io/h2c"]],
        Field(json_schema_extra={"default": "http"}),
    ] = None
    """What the members speak."""
    endpoint_picker_ref: (
        Annotated[
            _PickerReference,
            Rule(
                "port is required when kind is 'Service' or unspecified (defaults to 'Service')",
                "self.kind != 'Service' || has(self.port)",
                lambda reference: reference.kind != "Service" or reference.port is not None,
            ),
        ]
        | None
    ) = None


class InferencePool(_Foreign):
    """Servers of the same models (inference.networking.k8s.io/v1)."""

    metadata: Metadata
    spec: _PoolSpec
    status: Unread[_PoolStatus] = None

    @property
    def ports(self) -> tuple[int, ...]:
        """The ports on which each member serves."""
        return tuple(port.number for port in self.spec.target_ports)

    @property
    def selector(self) -> dict[str, str]:
        """The labels of the pods that are its members."""
        return self.spec.selector.match_labels

    @property
    def picker_service(self) -> str | None:
        """The Service whose pods are its endpoint pickers."""
        reference = self.spec.endpoint_picker_ref
        return reference.name if reference and reference.kind == "Service" else None


class _ExtensionReference(_Foreign):
    """Whom a gateway asks for an endpoint."""

    group: Group = ""
    """The API group of the endpoint picker; empty for a Service."""
    kind: KindName = "Service"
    """The kind of the endpoint picker."""
    name: Name
    """The name of the endpoint picker."""
    port_number: Unread[Port] = None
    """The port of the endpoint picker; 9002 where unset."""
    failure_mode: FailureMode = None
    """What a gateway does when the endpoint picker fails."""


class _OldPoolSpec(_Foreign):
    """What the pool consists of."""

    selector: Labels = Field(min_length=1)
    """Labels a pod must have, all of them."""
    target_port_number: Port
    """The port on which each member serves."""
    extension_ref: _ExtensionReference


class _OldPoolStatus(_Foreign):
    """What gateways make of the pool."""

    parent: Annotated[
        tuple[_Parent, ...],
        Field(
            max_length=32,
            json_schema_extra={
                "x-kubernetes-list-type": "atomic",
                "default": [
                    {
                        "parentRef": {"kind": "Status", "name": "default"},
                        "conditions": [
                            {
                                "type": "Accepted",
                                "status": "Unknown",
                                "reason": "Pending",
                                "message": "Waiting for controller",
                                "lastTransitionTime": "1970-01-01T00:00:00Z",
                            }
                        ],
                    }
                ],
            },
        ),
    ] = ()
    """One entry for each Gateway, written by its controller."""


class InferencePoolV1Alpha2(_Foreign):
    """Servers of the same models, before the pool became v1."""

    metadata: Metadata
    spec: _OldPoolSpec
    status: Unread[_OldPoolStatus] = None

    @property
    def ports(self) -> tuple[int, ...]:
        """The port on which each member serves."""
        return (self.spec.target_port_number,)

    @property
    def selector(self) -> dict[str, str]:
        """The labels of the pods that are its members."""
        return self.spec.selector

    @property
    def picker_service(self) -> str | None:
        """The Service whose pods are its endpoint pickers."""
        reference = self.spec.extension_ref
        return reference.name if reference and reference.kind == "Service" else None


class _TargetModel(_Foreign):
    """A model on the servers."""

    name: Name
    """What the servers call it."""
    weight: Annotated[int, Field(ge=1, le=1_000_000, strict=True)] | None = None
    """Its share of the requests, in proportion to the other weights."""


class _PoolReference(_Foreign):
    """The pool, in the same namespace."""

    group: Group = "inference.networking.x-k8s.io"
    """The pool's API group."""
    kind: KindName = "InferencePool"
    """The pool's kind."""
    name: Name
    """The pool's name."""


class _ModelSpec(_Foreign):
    """Which requests it is for, and what they matter."""

    model_name: Annotated[ModelName, Rule("modelName is immutable", "self == oldSelf", None)]
    """The model that requests name."""
    criticality: Criticality | None = None
    """Which queue its requests join; Standard where unset."""
    pool_ref: _PoolReference
    target_models: Annotated[
        tuple[_TargetModel, ...],
        Field(max_length=10, json_schema_extra=_atomic),
        Rule(
            "Weights should be set for all models, or none of the models.",
            "self.all(model, has(model.weight)) || self.all(model, !has(model.weight))",
            lambda targets: len({target.weight is None for target in targets}) < 2,
        ),
    ] = ()
    """What requests are turned into; the model itself where empty."""


class InferenceModel(_Foreign):
    """A model name, its pool and its criticality (inference.networking.x-k8s.io/v1alpha2)."""

    metadata: Metadata
    spec: _ModelSpec
    status: Unread[_ConditionsStatus] = None


class _ObjectivePoolReference(_PoolReference):
    """The pool, in the same namespace."""

    group: Group = "inference.networking.k8s.io"
    """The pool's API group."""


class _ObjectiveSpec(_Foreign):
    """What requests that name it matter."""

    pool_ref: _ObjectivePoolReference
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1, strict=True)] | None = None
    """Higher is served first; 0 where unset, and below 0 may be shed."""


class InferenceObjective(_Foreign):
    """A priority that requests name in a header (v1alpha2, groups x-k8s.io and llm-d.ai)."""

    metadata: Metadata
    spec: _ObjectiveSpec
    status: Unread[_ConditionsStatus] = None


class _PodCondition(_Foreign):
    type: str = ""
    status: str = ""


class _PodStatus(_Foreign):
    phase: str = ""
    pod_ip: Annotated[str, Field(alias="podIP")] = ""
    conditions: tuple[_PodCondition, ...] = ()


class Pod(_Foreign):
    """v1: a member of a pool, or one of its endpoint pickers."""

    metadata: Metadata
    status: _PodStatus = _PodStatus()

    @property
    def ready(self) -> bool:
        """Whether it takes requests: Ready, and not about to go."""
        return not self.metadata.deletion_timestamp and any(
            condition.type == "Ready" and condition.status == "True"
            for condition in self.status.conditions
        )

    @property
    def running(self) -> bool:
        """Whether its containers run and it is not about to go."""
        return not self.metadata.deletion_timestamp and self.status.phase == "Running"


class _ServiceSpec(_Foreign):
    selector: dict[str, str] = {}


class Service(_Foreign):
    """v1: what a pool's endpointPickerRef names."""

    metadata: Metadata
    spec: _ServiceSpec = _ServiceSpec()


class _Conditions(_Foreign):
    ready: bool | None = None


class _TargetPod(_Foreign):
    name: Annotated[str, Field(max_length=253)] = ""


class _SliceEndpoint(_Foreign):
    addresses: tuple[Name, ...] = Field(min_length=1, max_length=100)
    conditions: _Conditions = _Conditions()
    target_ref: _TargetPod = _TargetPod()


class _SlicePort(_Foreign):
    port: Port | None = None


class EndpointSlice(_Foreign):
    """discovery.k8s.io/v1: the servers of a pool where there are no pods to select.

    The pool is named by the label `forebay.dev/inference-pool`. The slice's ports count; without
    any, each address serves on the pool's.
    """

    metadata: Metadata
    endpoints: tuple[_SliceEndpoint, ...] = Field((), max_length=1000)
    ports: tuple[_SlicePort, ...] = Field((), max_length=100)


class TargetRef(_Own):
    """A pool the policy is for, in the policy's own namespace."""

    group: Literal["inference.networking.k8s.io", "inference.networking.x-k8s.io"] = (
        "inference.networking.k8s.io"
    )
    """The pool's API group."""
    kind: Literal["InferencePool"] = "InferencePool"
    """The pool's kind."""
    name: Name
    """The pool's name."""


class Fairness(_Own):
    """How the models of a band share it."""

    policy: Literal["FCFS", "RoundRobin"] = "FCFS"
    """FCFS serves in order of arrival, RoundRobin lets the models take turns."""


class FlowLimits(_Own):
    """What one model may have waiting in a band; the band's own caps where unset."""

    max_requests: Count | None = None
    """Requests of one model that may wait."""
    max_bytes: Bytes | None = None
    """Bytes of the waiting requests of one model, such as 64Mi."""


class Queue(_Own):
    """What may wait in a band, and for how long."""

    max_requests: Count = 5000
    """Requests that may wait; more are refused with 429."""
    max_bytes: Bytes = 512 << 20
    """Bytes of the requests that may wait, such as 512Mi; more are refused with 429."""
    ttl: Seconds = 60.0
    """How long a request may wait, such as 30s, before it is refused with 429."""
    per_flow: FlowLimits = FlowLimits()


class Band(_Own):
    """The queue of one criticality."""

    criticality: Criticality
    """Whose requests wait here; Critical is served first, Sheddable last."""
    fairness: Fairness = Fairness()
    ordering: Literal["FCFS"] = "FCFS"
    """The order within one model: FCFS, first come, first served."""
    queue: Queue = Queue()


class ModelPolicy(_Own):
    """What a policy says of one model, above what its InferenceModel says."""

    name: ModelName
    """The model that requests name."""
    criticality: Criticality
    """Which queue its requests join."""


class Limits(_Own):
    """What the whole pool may have waiting, and the largest request body."""

    max_requests: Count = 10_000
    """Requests that may wait, over all bands."""
    max_bytes: Bytes = 1 << 30
    """Bytes of the requests that may wait, over all bands, such as 1Gi."""
    max_body_bytes: Bytes = 8 << 20
    """The largest request body, such as 8Mi; larger ones are refused with 413."""


class Saturation(_Own):
    """How it is found out how many requests a server takes at once."""

    mode: Literal["Adaptive", "Concurrency"] = "Adaptive"
    """Adaptive learns from the servers' metrics; Concurrency takes maxConcurrency."""
    max_concurrency: Count = 100
    """Requests at once per server, for mode Concurrency."""
    kv_cache_usage_threshold: Annotated[float, Field(gt=0, le=1, strict=True)] = 0.95
    """The share of its KV cache above which a server gets no more requests."""


class Unmatched(_Own):
    """What happens to requests that no InferenceModel of the pool is for."""

    action: Literal["Queue", "Reject"] = "Queue"
    """Queue lets them wait, Reject refuses them with 404."""
    criticality: Criticality = "Standard"
    """Which queue they join."""


class NoEndpoints(_Own):
    """How long requests wait while the pool has no servers."""

    ttl: Seconds = 60.0
    """How long a request may wait, such as 120s, before it is refused with 503."""


class Trust(_Own):
    """Which headers of callers count."""

    objective_header: bool = False
    """Whether x-gateway-inference-objective may choose an InferenceObjective."""


class PolicySpec(_Own):
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
    unmatched: Unmatched = Unmatched()
    no_endpoints: NoEndpoints = NoEndpoints()
    trust: Trust = Trust()


Number = Annotated[int, Field(ge=0)]
BandName = Annotated[str, Field(min_length=1, max_length=63)]


class QueueStatus(_Own):
    """What a band of the pool has waiting, and what became of the requests."""

    band: BandName
    """The band."""
    requests: Number
    """Requests that wait."""
    bytes: Number
    """Their bytes."""
    oldest_seconds: Number
    """How long the first of them has waited."""
    dispatched: Number
    """Requests that went to a server since the endpoint pickers started."""
    rejected: Number
    """Requests refused on arrival."""
    evicted: Number
    """Requests that left the queue without a server."""


class PoolStatus(_Own):
    """One pool, added up over its endpoint pickers."""

    name: Name
    """The pool."""
    saturation: Annotated[str, Field(max_length=8)]
    """How full it is: from 1.00 there is no room."""
    endpoints: Number
    """Its servers."""
    queues: Annotated[tuple[QueueStatus, ...], Field(max_length=64), Unique(("band",))] = ()
    """Its bands. Two digits are kept of each number; the metrics have them all."""


class EndpointPickers(_Own):
    """How many endpoint pickers there are, and where they stand."""

    ready: Annotated[str, Field(max_length=32)]
    """Those that run the latest generation, of all."""
    desired: Number
    """Those that should run the policy."""
    connected: Number
    """Those with a connection to the operator."""
    programmed: Number
    """Those that run the latest generation."""
    rejected: Number
    """Those that refused it."""
    stale: Number
    """Those that cannot be reached."""


class AncestorReference(_Own):
    """The pool."""

    group: Group
    """The pool's API group."""
    kind: KindName
    """The pool's kind."""
    namespace: Namespace
    """The pool's namespace."""
    name: Name
    """The pool's name."""


class Ancestor(_Own):
    """How the policy fares at one pool, as Gateway API policies say it."""

    ancestor_ref: AncestorReference
    controller_name: ControllerName
    """Who wrote the entry."""
    conditions: Annotated[
        tuple[Condition, ...], Field(min_length=1, max_length=8), Unique(("type",))
    ]
    """Accepted."""


class PolicyStatus(_Own):
    """What became of the policy."""

    conditions: Conditions = ()
    """Accepted, ResolvedRefs, Programmed and Degraded."""
    ancestors: Annotated[tuple[Ancestor, ...], Field(max_length=16, json_schema_extra=_atomic)] = ()
    """How the policy fares at each pool."""
    programmed_generation: Number | None = None
    """The generation that every endpoint picker runs, or a later one."""
    endpoint_pickers: EndpointPickers | None = None
    queued: Number | None = None
    """Requests that wait, over all pools."""
    saturation: Annotated[str, Field(max_length=8)] | None = None
    """How full the fullest pool is: from 1.00 there is no room."""
    pools: Annotated[tuple[PoolStatus, ...], Field(max_length=16), Unique(("name",))] = ()
    """The pools that follow the policy."""


class FlowControlPolicy(_Own):
    """How the queue in front of a pool behaves (forebay.dev/v1alpha1)."""

    api_version: str = "forebay.dev/v1alpha1"
    kind: str = "FlowControlPolicy"
    metadata: Metadata
    spec: PolicySpec
    status: Unread[PolicyStatus] = None


AnyPool = InferencePool | InferencePoolV1Alpha2
Resource = (
    AnyPool
    | InferenceModel
    | InferenceObjective
    | EndpointSlice
    | FlowControlPolicy
    | Pod
    | Service
)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of object that is read, where its API is, and the class that reads it.

    `required`: without its CRD nothing works. `ours_to_report`: its status is written.
    `in_files`: it means something in a folder of manifests too.
    """

    group: str
    version: str
    kind: str
    plural: str
    model: type[Resource]
    required: bool = False
    ours_to_report: bool = False
    in_files: bool = True

    @property
    def api_version(self) -> str:
        """As manifests write it."""
        return f"{self.group}/{self.version}" if self.group else self.version


POLICY = Kind(
    "forebay.dev",
    "v1alpha1",
    "FlowControlPolicy",
    "flowcontrolpolicies",
    FlowControlPolicy,
    required=True,
    ours_to_report=True,
)
MODEL = Kind(
    "inference.networking.x-k8s.io",
    "v1alpha2",
    "InferenceModel",
    "inferencemodels",
    InferenceModel,
    ours_to_report=True,
)
_OBJECTIVE = ("v1alpha2", "InferenceObjective", "inferenceobjectives", InferenceObjective)

KINDS: tuple[Kind, ...] = (
    POLICY,
    Kind("inference.networking.k8s.io", "v1", "InferencePool", "inferencepools", InferencePool),
    Kind(
        "inference.networking.x-k8s.io",
        "v1alpha2",
        "InferencePool",
        "inferencepools",
        InferencePoolV1Alpha2,
    ),
    MODEL,
    Kind("inference.networking.x-k8s.io", *_OBJECTIVE),
    Kind("llm-d.ai", *_OBJECTIVE),
    Kind("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices", EndpointSlice),
    Kind("", "v1", "Pod", "pods", Pod, in_files=False),
    Kind("", "v1", "Service", "services", Service, in_files=False),
)
BY_NAME = {(kind.api_version, kind.kind): kind for kind in KINDS}


class ResourceError(ValueError):
    """An object that is not a valid resource; `problems` are (field path, what is wrong) pairs."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{path}: {what}" for path, what in problems))
        self.problems = problems


def kind_of(manifest: dict[str, Any]) -> Kind | None:
    """Return the kind of a manifest of a folder; None for one that has no effect there."""
    kind = BY_NAME.get((str(manifest.get("apiVersion", "")), str(manifest.get("kind", ""))))
    return kind if kind is not None and kind.in_files else None


def parse(manifest: dict[str, Any]) -> Resource | None:
    """Turn a manifest of a folder into its resource.

    Returns:
        None for a kind that has no effect there.

    Raises:
        ResourceError: with every problem found.
    """
    kind = kind_of(manifest)
    return None if kind is None else read(kind, manifest)


def read(kind: Kind, manifest: dict[str, Any]) -> Resource:
    """Turn a manifest of a known kind into its resource.

    Raises:
        ResourceError: with every problem found.
    """
    try:
        return kind.model.model_validate(manifest)
    except ValidationError as error:
        raise ResourceError(wording.problems(kind.model, error)) from None
