"""Pods, Services and EndpointSlices, with the fields that are read."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from forebay_operator.resources.fields import (
    Foreign,
    Metadata,
    Name,
    Port,
)

ACTIVE_PORTS = ("llm-d.ai/active-ports", "inference.networking.k8s.io/active-ports")
POOL_LABEL = "forebay.dev/inference-pool"
CONTROLLER_LABEL = "forebay.dev/controller"
SHADOW_LABEL = "forebay.dev/shadow-of"  # of a policy: names the one beside which it is computed


class _PodCondition(Foreign):
    type: str = ""
    status: str = ""


class _PodIP(Foreign):
    ip: str = ""


class _PodStatus(Foreign):
    phase: str = ""
    pod_ip: Annotated[str, Field(alias="podIP")] = ""
    pod_ips: Annotated[tuple[_PodIP, ...], Field(alias="podIPs")] = ()
    conditions: tuple[_PodCondition, ...] = ()


def _with_active_ports_only(metadata: Metadata) -> Metadata:
    """Drop the annotations that are not read: pods are many, and theirs are large."""
    kept = {key: text for key, text in metadata.annotations.items() if key in ACTIVE_PORTS}
    return metadata.model_copy(update={"annotations": kept})


class Pod(Foreign):
    """v1: a member of a pool, or one of its EPPs."""

    metadata: Annotated[Metadata, AfterValidator(_with_active_ports_only)]
    status: _PodStatus = _PodStatus()

    @property
    def ready(self) -> bool:
        """Whether it takes requests: Ready and not terminating."""
        return not self.metadata.deletion_timestamp and any(
            condition.type == "Ready" and condition.status == "True"
            for condition in self.status.conditions
        )

    @property
    def addresses(self) -> frozenset[str]:
        """Its IP addresses; two with IPv4 and IPv6, none before it runs."""
        found = {self.status.pod_ip, *(address.ip for address in self.status.pod_ips)}
        return frozenset(found - {""})

    @property
    def running(self) -> bool:
        """Whether it is Running and not terminating."""
        return not self.metadata.deletion_timestamp and self.status.phase == "Running"


class _ServiceSpec(Foreign):
    selector: dict[str, str] = Field(default_factory=dict)


class Service(Foreign):
    """v1: what a pool's endpointPickerRef names.

    The label `forebay.dev/controller` names the operator that the pool is for.
    """

    metadata: Metadata
    spec: _ServiceSpec = _ServiceSpec()


class _Conditions(Foreign):
    ready: bool | None = None


class _TargetPod(Foreign):
    name: Annotated[str, Field(max_length=253)] = ""
    uid: Annotated[str, Field(max_length=64)] = ""


class _SliceEndpoint(Foreign):
    addresses: tuple[Name, ...] = Field(min_length=1, max_length=100)
    conditions: _Conditions = _Conditions()
    target_ref: _TargetPod = _TargetPod()


class _SlicePort(Foreign):
    port: Port | None = None


class EndpointSlice(Foreign):
    """discovery.k8s.io/v1: servers of a pool that are not pods.

    The pool is named by the label `forebay.dev/inference-pool`. The slice's ports count; without
    any, each address serves on the pool's.
    """

    metadata: Metadata
    endpoints: tuple[_SliceEndpoint, ...] = Field((), max_length=1000)
    ports: tuple[_SlicePort, ...] = Field((), max_length=100)
