"""Pools, models and objectives: kinds of the Gateway API Inference Extension.

They are read leniently, and their schemas are compatible with the upstream ones.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from forebay_operator.resources.fields import (
    ATOMIC,
    WHOLE,
    ControllerName,
    Criticality,
    Foreign,
    Group,
    KindName,
    Labels,
    Metadata,
    ModelName,
    Name,
    Namespace,
    Port,
    Rule,
    Unread,
)
from forebay_operator.resources.status import (
    Conditions,
    ConditionsStatus,
)


class _ParentReference(Foreign):
    """The Gateway."""

    group: Group = "gateway.networking.k8s.io"
    """The parent's API group."""
    kind: KindName = "Gateway"
    """The parent's kind."""
    name: Name
    """The parent's name."""
    namespace: Namespace | None = None
    """The parent's namespace; the pool's own by default."""


class _Parent(Foreign):
    """The state of the pool at one Gateway."""

    parent_ref: _ParentReference
    controller_name: ControllerName | None = None
    """The controller that writes this entry."""
    conditions: Conditions = ()
    """Accepted and ResolvedRefs."""


class _PoolStatus(Foreign):
    """The state of the pool at each Gateway."""

    parents: Annotated[tuple[_Parent, ...], Field(max_length=32, json_schema_extra=ATOMIC)] = ()
    """One entry for each Gateway, written by its controller."""


class _PoolSelector(Foreign):
    """The pods that are the pool's members."""

    match_labels: Labels = Field(min_length=1)
    """Labels that a pod must have, all of them."""


class _PortNumber(Foreign):
    """A port."""

    number: Port
    """The number of the port."""


FailureMode = Annotated[
    Unread[Literal["FailOpen", "FailClose"]], Field(json_schema_extra={"default": "FailClose"})
]


class _PickerReference(Foreign):
    """The endpoint picker that gateways ask for an endpoint."""

    group: Group = ""
    """The API group of the endpoint picker; empty for a Service."""
    kind: KindName = "Service"
    """The kind of the endpoint picker."""
    name: Name
    """The name of the endpoint picker."""
    port: _PortNumber | None = None
    failure_mode: FailureMode = None
    """What a gateway does when the endpoint picker fails."""


class _PoolSpec(Foreign):
    """The members of the pool and how to reach them."""

    selector: _PoolSelector
    target_ports: Annotated[
        tuple[_PortNumber, ...],
        Field(min_length=1, max_length=8, json_schema_extra=ATOMIC),
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
    """The protocol that the members speak."""
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


class InferencePool(Foreign):
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


class _ExtensionReference(Foreign):
    """The endpoint picker that gateways ask for an endpoint."""

    group: Group = ""
    """The API group of the endpoint picker; empty for a Service."""
    kind: KindName = "Service"
    """The kind of the endpoint picker."""
    name: Name
    """The name of the endpoint picker."""
    port_number: Unread[Port] = None
    """The port of the endpoint picker; 9002 by default."""
    failure_mode: FailureMode = None
    """What a gateway does when the endpoint picker fails."""


class _OldPoolSpec(Foreign):
    """The members of the pool and how to reach them."""

    selector: Labels = Field(min_length=1)
    """Labels that a pod must have, all of them."""
    target_port_number: Port
    """The port on which each member serves."""
    extension_ref: _ExtensionReference


class _OldPoolStatus(Foreign):
    """The state of the pool at each Gateway."""

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


class InferencePoolV1Alpha2(Foreign):
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


class _TargetModel(Foreign):
    """A model on the servers."""

    name: Name
    """The name by which the servers know it."""
    weight: Annotated[int, Field(ge=1, le=1_000_000, strict=True), WHOLE] | None = None
    """Its share of the requests, in proportion to the other weights."""


class PoolReference(Foreign):
    """The pool, in the same namespace."""

    group: Group = "inference.networking.x-k8s.io"
    """The pool's API group."""
    kind: KindName = "InferencePool"
    """The pool's kind."""
    name: Name
    """The pool's name."""


class _ModelSpec(Foreign):
    """Which requests it applies to, and how important they are."""

    model_name: Annotated[ModelName, Rule("modelName is immutable", "self == oldSelf")]
    """The model that requests name."""
    criticality: Criticality | None = None
    """The band that its requests join; Standard by default."""
    pool_ref: PoolReference
    target_models: Annotated[
        tuple[_TargetModel, ...],
        Field(max_length=10, json_schema_extra=ATOMIC),
        Rule(
            "Weights should be set for all models, or none of the models.",
            "self.all(model, has(model.weight)) || self.all(model, !has(model.weight))",
            lambda targets: len({target.weight is None for target in targets}) < 2,
        ),
    ] = ()
    """The models that requests are rewritten to; by default the name stays."""


class InferenceModel(Foreign):
    """A model name, its pool and its criticality (inference.networking.x-k8s.io/v1alpha2)."""

    metadata: Metadata
    spec: _ModelSpec
    status: Unread[ConditionsStatus] = None


class _ObjectivePoolReference(PoolReference):
    """The pool, in the same namespace."""

    group: Group = "inference.networking.k8s.io"
    """The pool's API group."""


class _ObjectiveSpec(Foreign):
    """How important the requests that name it are."""

    pool_ref: _ObjectivePoolReference
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1, strict=True), WHOLE] | None = None
    """Higher is served first; 0 by default, and below 0 may be shed."""


class InferenceObjective(Foreign):
    """A priority that requests name in a header (v1alpha2, groups x-k8s.io and llm-d.ai)."""

    metadata: Metadata
    spec: _ObjectiveSpec
    status: Unread[ConditionsStatus] = None
