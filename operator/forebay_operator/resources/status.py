"""The fields of `.status`, for the schemas. Reading and writing a status belongs in status/."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AwareDatetime, Field

from forebay_control.plan import Mode
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
    """The aspect, such as Accepted."""
    status: Literal["True", "False", "Unknown"]
    """Whether the condition holds."""
    observed_generation: Annotated[int, Field(ge=0)] | None = None
    """The metadata.generation that the condition describes."""
    last_transition_time: AwareDatetime
    """When the status last changed."""
    reason: Annotated[
        str,
        Field(min_length=1, max_length=1024, pattern="^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"),
    ]
    """The reason for the status, in one CamelCase word."""
    message: Annotated[str, Field(max_length=32768)]
    """The reason in full, and what to do."""


Conditions = Annotated[tuple[Condition, ...], Field(max_length=8), Unique(("type",))]


class ConditionsStatus(Foreign):
    """The observed state of the object."""

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
    """Accepted says whether the object is in force."""


Number = Annotated[int, Field(ge=0)]
BandName = Annotated[str, Field(min_length=1, max_length=63)]


class QueueStatus(Own):
    """The requests that wait in a band of the pool, and the outcomes of earlier ones."""

    band: BandName
    """The band's name."""
    requests: Number
    """The number of waiting requests."""
    bytes: Number
    """Their total size in bytes."""
    oldest_seconds: Number
    """How long the oldest of them has waited, in seconds."""
    dispatched: Number
    """Requests sent to a server since the endpoint pickers started."""
    rejected: Number
    """Requests refused on arrival since then."""
    evicted: Number
    """Requests removed from the queue since then without a server."""


class ShadowStatus(Own):
    """What mode Enforce would do in a band of the pool, in mode Observe."""

    band: BandName
    """The band's name."""
    requests: Number
    """The number of requests that would be waiting."""
    dispatched: Number
    """Requests that would have been sent to a server since the endpoint pickers started."""
    rejected: Number
    """Requests that would have been refused on arrival since then."""
    evicted: Number
    """Requests that would have been removed from the queue since then without a server."""
    overtaken: Number
    """Requests that would have been sent after one that came later."""
    mean_wait_milliseconds: Number
    """The mean time that dispatched requests would have waited, in milliseconds."""


class PoolStatus(Own):
    """One pool, summed over its endpoint pickers."""

    name: Name
    """The pool's name."""
    mode: Mode | None = None
    """The mode that its endpoint pickers run; Observe if all of them do."""
    saturation: Annotated[str, Field(max_length=8)]
    """How full it is; at 1.00 or above no endpoint has a free slot."""
    endpoints: Number
    """The number of its servers."""
    queues: Annotated[tuple[QueueStatus, ...], Field(max_length=64), Unique(("band",))] = ()
    """Its bands. Numbers are rounded to two digits; the exact ones are in the metrics."""
    shadow: Annotated[tuple[ShadowStatus, ...], Field(max_length=64), Unique(("band",))] = ()
    """What mode Enforce would do in its bands, in mode Observe, rounded likewise."""


class EndpointPickers(Own):
    """The number of endpoint pickers by state."""

    ready: Annotated[str, Field(max_length=32)]
    """Those that run the latest generation, out of those desired, such as 2/2."""
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
    """The state of the policy at one pool, as in Gateway API policies."""

    ancestor_ref: AncestorReference
    controller_name: ControllerName
    """The controller that wrote the entry."""
    conditions: Annotated[
        tuple[Condition, ...], Field(min_length=1, max_length=8), Unique(("type",))
    ]
    """Accepted, ResolvedRefs, Programmed and Degraded, at this pool."""


class PolicyStatus(Own):
    """The observed state of the policy."""

    conditions: Conditions = ()
    """Accepted, ResolvedRefs, Programmed and Degraded: of each, the worst of all ancestors."""
    ancestors: Annotated[tuple[Ancestor, ...], Field(max_length=16, json_schema_extra=ATOMIC)] = ()
    """The state of the policy at each pool."""
    pool_names: Annotated[str, Field(max_length=1024)] | None = None
    """The pools that it applies to, in one line for kubectl's table."""
    programmed_generation: Number | None = None
    """The lowest generation that any endpoint picker runs."""
    endpoint_pickers: EndpointPickers | None = None
    queued: Number | None = None
    """The number of waiting requests, over all pools."""
    saturation: Annotated[str, Field(max_length=8)] | None = None
    """How full the fullest pool is; at 1.00 or above no endpoint has a free slot."""
    pools: Annotated[tuple[PoolStatus, ...], Field(max_length=16), Unique(("name",))] = ()
    """The pools that the policy applies to."""
