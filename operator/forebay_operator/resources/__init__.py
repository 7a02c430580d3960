"""The resources as typed objects: the only place where a field of a resource is declared.

Our own kind is strict: an unknown field is an error that names the allowed ones. Foreign kinds are
read leniently, since their owners add fields. Description, bounds, default and rules are declared
with their field, or in rules.py where several fields must go together; crdschema.py makes the
schemas from them. Wording of errors belongs in messages.py, what a resource leads to in planning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from forebay_operator.resources import messages
from forebay_operator.resources.fields import Criticality, Metadata
from forebay_operator.resources.inference import (
    InferenceModel,
    InferenceObjective,
    InferencePool,
    InferencePoolV1Alpha2,
)
from forebay_operator.resources.kubernetes import (
    CONTROLLER_LABEL,
    POOL_LABEL,
    SHADOW_LABEL,
    EndpointSlice,
    Pod,
    Service,
)
from forebay_operator.resources.policy import Band, FlowControlPolicy, PolicySpec

__all__ = [
    "CONTROLLER_LABEL",
    "KINDS",
    "MODEL",
    "POD",
    "POLICY",
    "POOL_LABEL",
    "SHADOW_LABEL",
    "AnyPool",
    "Band",
    "Criticality",
    "EndpointSlice",
    "FlowControlPolicy",
    "InferenceModel",
    "InferenceObjective",
    "InferencePool",
    "InferencePoolV1Alpha2",
    "Kind",
    "Metadata",
    "Pod",
    "PolicySpec",
    "Resource",
    "ResourceError",
    "Service",
    "kind_of",
    "parse",
    "read",
]

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
    """A kind of object that is read, its API, and the class that reads it.

    `required`: the operator needs its CRD. `ours_to_report`: the operator writes its status.
    `in_files`: it also counts in a folder of manifests. `label`: only objects with this label
    count.
    """

    group: str
    version: str
    kind: str
    plural: str
    model: type[Resource]
    required: bool = False
    ours_to_report: bool = False
    in_files: bool = True
    label: str = ""

    @property
    def api_version(self) -> str:
        """The apiVersion of a manifest."""
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

POD = Kind("", "v1", "Pod", "pods", Pod, in_files=False)

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
    Kind("inference.networking.x-k8s.io", *_OBJECTIVE, ours_to_report=True),
    Kind("llm-d.ai", *_OBJECTIVE, ours_to_report=True),
    Kind(
        "discovery.k8s.io",
        "v1",
        "EndpointSlice",
        "endpointslices",
        EndpointSlice,
        label=POOL_LABEL,
    ),
    POD,
    Kind("", "v1", "Service", "services", Service, in_files=False, label=CONTROLLER_LABEL),
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


def read(kind: Kind, manifest: dict[str, Any]) -> Resource:
    """Turn a manifest of a known kind into its resource.

    Raises:
        ResourceError: with every problem found.
    """
    try:
        return kind.model.model_validate(manifest)
    except ValidationError as error:
        raise ResourceError(messages.problems(kind.model, error)) from None
