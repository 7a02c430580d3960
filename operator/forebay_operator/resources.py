"""The resources as typed objects: the only place where a field of a resource is declared.

Our own kind is strict: an unknown field is an error that names the allowed ones. Foreign kinds are
read leniently, since their owners add fields. How an error is worded is wording.py's business, what
a resource leads to is planning.py's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.alias_generators import to_camel

from forebay_operator import wording

POOL_LABEL = "forebay.dev/inference-pool"
MAX_SECONDS = 3600.0
MAX_COUNT = 1_000_000
MAX_BYTES = 1 << 40

_NUMBER = r"([0-9]{1,9}(?:\.[0-9]{1,9})?)"
_DURATION = re.compile(f"(?:{_NUMBER}h)?(?:{_NUMBER}m)?(?:{_NUMBER}s)?(?:{_NUMBER}ms)?")
_QUANTITY = re.compile(r"([0-9]{1,15})(Ki|Mi|Gi|Ti|k|M|G|T)?")
_FACTORS = {
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


def _seconds(value: object) -> object:
    """Read a duration as Go and Kubernetes write it."""
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if not match or not value:
        raise ValueError(
            f'{wording.shown(value)} is not a duration such as "30s", "1m30s" or "500ms"'
        )
    hours, minutes, seconds, milliseconds = (float(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + seconds + milliseconds / 1000


def _bytes(value: object) -> object:
    """Read a quantity of bytes as Kubernetes writes it."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(
            f"{wording.shown(value)} is not a number of bytes such as 1048576 or 512Mi"
        )
    return int(match[1]) * _FACTORS[match[2] or ""]


Criticality = Literal["Critical", "Standard", "Sheddable"]
Seconds = Annotated[float, BeforeValidator(_seconds), Field(gt=0, le=MAX_SECONDS)]
Bytes = Annotated[int, BeforeValidator(_bytes), Field(ge=1, le=MAX_BYTES)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT, strict=True)]
Name = Annotated[str, Field(min_length=1, max_length=253)]
Label = Annotated[str, Field(max_length=63)]
Labels = Annotated[dict[str, Label], Field(max_length=64)]
ModelName = Annotated[str, Field(min_length=1, max_length=256)]
Port = Annotated[int, Field(ge=1, le=65535, strict=True)]


class _Part(BaseModel):
    """A part of a resource. A field that is null counts as unset, as it does in Kubernetes."""

    model_config = ConfigDict(alias_generator=to_camel, frozen=True)

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


class _PoolSelector(_Foreign):
    match_labels: Labels = Field(min_length=1)


class _TargetPort(_Foreign):
    number: Port


class _PickerReference(_Foreign):
    kind: str = "Service"
    name: Name


class _PoolSpec(_Foreign):
    selector: _PoolSelector
    target_ports: tuple[_TargetPort, ...] = Field(min_length=1, max_length=8)
    endpoint_picker_ref: _PickerReference | None = None


class InferencePool(_Foreign):
    """inference.networking.k8s.io/v1."""

    metadata: Metadata
    spec: _PoolSpec

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


class _OldPoolSpec(_Foreign):
    selector: Labels = Field(min_length=1)
    target_port_number: Port
    extension_ref: _PickerReference | None = None


class InferencePoolV1Alpha2(_Foreign):
    """inference.networking.x-k8s.io/v1alpha2, before the pool became v1."""

    metadata: Metadata
    spec: _OldPoolSpec

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
    name: Name
    weight: Annotated[int, Field(ge=1, le=1_000_000, strict=True)] | None = None


class _PoolReference(_Foreign):
    group: str = "inference.networking.x-k8s.io"
    kind: str = "InferencePool"
    name: Name


class _ModelSpec(_Foreign):
    model_name: ModelName
    criticality: Criticality | None = None
    pool_ref: _PoolReference
    target_models: tuple[_TargetModel, ...] = Field((), max_length=10)

    @field_validator("target_models")
    @classmethod
    def _all_or_none(cls, targets: tuple[_TargetModel, ...]) -> tuple[_TargetModel, ...]:
        if len({target.weight is None for target in targets}) > 1:
            raise ValueError("Weights should be set for all models, or none of the models.")
        return targets


class InferenceModel(_Foreign):
    """inference.networking.x-k8s.io/v1alpha2: a model name, its pool and its criticality."""

    metadata: Metadata
    spec: _ModelSpec


class _ObjectiveSpec(_Foreign):
    pool_ref: _PoolReference
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31, strict=True)] = 0


class InferenceObjective(_Foreign):
    """inference.networking.x-k8s.io/v1alpha2 and llm-d.ai/v1alpha2: a priority by name."""

    metadata: Metadata
    spec: _ObjectiveSpec


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
    """The pool a policy is for, in the policy's own namespace."""

    group: Literal["inference.networking.k8s.io", "inference.networking.x-k8s.io"] = (
        "inference.networking.k8s.io"
    )
    kind: Literal["InferencePool"] = "InferencePool"
    name: Name


class Fairness(_Own):
    """How the models of a band share it."""

    policy: Literal["FCFS", "RoundRobin"] = "FCFS"


class FlowLimits(_Own):
    """What one model may have waiting in a band; the band's own caps where unset."""

    max_requests: Count | None = None
    max_bytes: Bytes | None = None


class Queue(_Own):
    """What may wait in a band, and for how long."""

    max_requests: Count = 5000
    max_bytes: Bytes = 512 << 20
    ttl: Seconds = 60.0
    per_flow: FlowLimits = FlowLimits()


class Band(_Own):
    """The queue of one criticality."""

    criticality: Criticality
    fairness: Fairness = Fairness()
    ordering: Literal["FCFS"] = "FCFS"
    queue: Queue = Queue()


class ModelPolicy(_Own):
    """What a policy says of one model name, above what its InferenceModel says."""

    name: ModelName
    criticality: Criticality


class Limits(_Own):
    """What the whole pool may have waiting, and the largest request body."""

    max_requests: Count = 10_000
    max_bytes: Bytes = 1 << 30
    max_body_bytes: Bytes = 8 << 20


class Saturation(_Own):
    """How it is found out how many requests a server takes at once."""

    mode: Literal["Adaptive", "Concurrency"] = "Adaptive"
    max_concurrency: Count = 100
    kv_cache_usage_threshold: Annotated[float, Field(gt=0, le=1, strict=True)] = 0.95


class Unmatched(_Own):
    """What happens to requests that no InferenceModel of the pool is for."""

    action: Literal["Queue", "Reject"] = "Queue"
    criticality: Criticality = "Standard"


class NoEndpoints(_Own):
    """How long requests wait while the pool has no servers."""

    ttl: Seconds = 60.0


class PolicySpec(_Own):
    """Everything has a default but the pool."""

    target_refs: tuple[TargetRef, ...] = Field(min_length=1, max_length=16)
    bands: tuple[Band, ...] = Field((), max_length=3)
    models: tuple[ModelPolicy, ...] = Field((), max_length=1024)
    limits: Limits = Limits()
    saturation: Saturation = Saturation()
    unmatched: Unmatched = Unmatched()
    no_endpoints: NoEndpoints = NoEndpoints()

    @model_validator(mode="after")
    def _unique(self) -> PolicySpec:
        lists: dict[str, list[str]] = {
            "bands": [band.criticality for band in self.bands],
            "models": [model.name for model in self.models],
        }
        for field, names in lists.items():
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{field} lists {twice[0]} twice")
        return self


class FlowControlPolicy(_Own):
    """forebay.dev/v1alpha1: how the queue in front of a pool behaves."""

    api_version: str = "forebay.dev/v1alpha1"
    kind: str = "FlowControlPolicy"
    metadata: Metadata
    spec: PolicySpec
    status: dict[str, Any] | None = None


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
