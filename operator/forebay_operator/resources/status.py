"""What `.status` holds, for the schemas. Nothing here reads or makes one: conditions.py does."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AwareDatetime, Field

from forebay_operator.resources.fields import (
    ATOMIC,
    ControllerName,
    Foreign,
    Group,
    KindName,
    Name,
    Namespace,
    Own,
    Unique,
)


class Condition(Foreign):
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


class ConditionsStatus(Foreign):
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


Number = Annotated[int, Field(ge=0)]
BandName = Annotated[str, Field(min_length=1, max_length=63)]


class QueueStatus(Own):
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


class PoolStatus(Own):
    """One pool, added up over its endpoint pickers."""

    name: Name
    """The pool."""
    saturation: Annotated[str, Field(max_length=8)]
    """How full it is: from 1.00 there is no room."""
    endpoints: Number
    """Its servers."""
    queues: Annotated[tuple[QueueStatus, ...], Field(max_length=64), Unique(("band",))] = ()
    """Its bands. Two digits are kept of each number; the metrics have them all."""


class EndpointPickers(Own):
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


class AncestorReference(Own):
    """The pool."""

    group: Group
    """The pool's API group."""
    kind: KindName
    """The pool's kind."""
    namespace: Namespace
    """The pool's namespace."""
    name: Name
    """The pool's name."""


class Ancestor(Own):
    """How the policy fares at one pool, as Gateway API policies say it."""

    ancestor_ref: AncestorReference
    controller_name: ControllerName
    """Who wrote the entry."""
    conditions: Annotated[
        tuple[Condition, ...], Field(min_length=1, max_length=8), Unique(("type",))
    ]
    """Accepted, ResolvedRefs, Programmed and Degraded, at this pool."""


class PolicyStatus(Own):
    """What became of the policy."""

    conditions: Conditions = ()
    """Accepted, ResolvedRefs, Programmed and Degraded: of each the worst of the ancestors'."""
    ancestors: Annotated[tuple[Ancestor, ...], Field(max_length=16, json_schema_extra=ATOMIC)] = ()
    """How the policy fares at each pool."""
    pool_names: Annotated[str, Field(max_length=1024)] | None = None
    """The pools it is for, in one line for tables."""
    programmed_generation: Number | None = None
    """The generation that every endpoint picker runs, or a later one."""
    endpoint_pickers: EndpointPickers | None = None
    queued: Number | None = None
    """Requests that wait, over all pools."""
    saturation: Annotated[str, Field(max_length=8)] | None = None
    """How full the fullest pool is: from 1.00 there is no room."""
    pools: Annotated[tuple[PoolStatus, ...], Field(max_length=16), Unique(("name",))] = ()
    """The pools that follow the policy."""
