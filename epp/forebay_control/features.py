"""Fields that Snapshots have gained since release 0.1, and what an EPP without them is sent.

One table for both sides. An EPP names all of it in its Hello; the operator leaves out
what is not named there. A later field of a Snapshot, or a later value of one, needs a row here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from forebay_control.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Collection

    from google.protobuf.message import Message

SEPARATE_ENDPOINTS = "SeparateEndpoints"  # plan and endpoints are judged and measured apart
SHARES = "Shares"  # Demand is sent and Shares are kept to
MAX_BYTES_WITHOUT = 1 << 20  # of a whole Snapshot, for a release that does not do so


@dataclass(frozen=True, slots=True)
class Feature:
    """A field, or one value of it, that only later releases know.

    Attributes:
        name: as in Hello.features.
        field: Message.field, as in control.proto.
        value: the value that is new; "" where the field is.
        without: what is sent to a release that does not know it: for a value another one, for a
            field "", which leaves it out. None: neither would be safe. A plan with it is then not
            sent, so that the one in force stays; outside of a plan nothing is sent.
    """

    name: str
    field: str
    value: str = ""
    without: str | None = None


FEATURES = (
    Feature("EndpointUID", "Endpoint.uid", without=""),
    Feature("LoadMetrics", "Plan.metrics", without=""),
    Feature("PoolDeleted", "Snapshot.deleted"),
    Feature("WeightedFair", "Band.fairness", "WeightedFair", "RoundRobin"),
    Feature("WeightedFair", "Band.fairness", "WeightedFairTokens", "RoundRobin"),
    Feature("TokenFair", "Band.fairness", "TokenFair", "RoundRobin"),
    Feature("FairnessLevels", "Band.between", without=""),
    Feature("FairnessLevels", "Band.inner", without=""),
    Feature("EarliestDeadline", "Band.ordering", "EarliestDeadline", "FCFS"),
    Feature("ShortestPrompt", "Band.ordering", "ShortestPrompt", "FCFS"),
    Feature("DisplaceLower", "Band.when_full", without=""),
    Feature("MaxSaturation", "Band.max_saturation_percent", without=""),
    Feature("Reserved", "Band.reserved_percent", without=""),
    Feature("Weights", "Model.weight", without=""),
    Feature("TimeToFirstToken", "Model.time_to_first_token_seconds", without=""),
    Feature("PrefillGoal", "Saturation.time_to_first_token_seconds", without=""),
    Feature("Tenants", "Plan.tenant_header", without=""),
    Feature("Tenants", "Plan.tenants", without=""),
    Feature("DeadlineHeaders", "Plan.trust_deadline_headers", without=""),
    Feature("Selection", "Plan.selection", without=""),
    Feature("Observe", "Plan.mode"),
    Feature("Shadow", "Plan.shadow", without=""),
)

NAMES = frozenset({SEPARATE_ENDPOINTS, SHARES, *(feature.name for feature in FEATURES)})


@dataclass(frozen=True, slots=True)
class Restricted:
    """The parts of a snapshot that an EPP can be sent.

    Attributes:
        snapshot: None where nothing can.
        left_out: what of the plan it will not run, as field paths; all of it where the snapshot
            has no plan any more.
    """

    snapshot: pb.Snapshot | None
    left_out: tuple[str, ...] = ()


def restrict(
    snapshot: pb.Snapshot, names: Collection[str], table: tuple[Feature, ...] = FEATURES
) -> Restricted:
    """Leave out of a snapshot what an EPP with these features does not know."""
    missing = {
        (feature.field, feature.value): feature for feature in table if feature.name not in names
    }
    if not missing and SEPARATE_ENDPOINTS in names:
        return Restricted(snapshot)
    copy = pb.Snapshot()
    copy.CopyFrom(snapshot)
    plan = copy.plan if copy.HasField("plan") else None
    left_out: list[str] = []
    safe = plan is None or _strip(plan, "plan.", missing, left_out)
    if plan is not None:
        copy.ClearField("plan")
    if not _strip(copy, "", missing, []):
        return Restricted(None)
    if plan is not None and safe:
        copy.plan.CopyFrom(plan)
        if SEPARATE_ENDPOINTS not in names and copy.ByteSize() > MAX_BYTES_WITHOUT:
            left_out.append(f"plan: {copy.ByteSize()} bytes with the endpoints")
            safe = False
    if not safe:
        copy.ClearField("plan")
        copy.ClearField("sources")
    return Restricted(copy, tuple(left_out))


def _strip(
    message: Message,
    path: str,
    missing: dict[tuple[str, str], Feature],
    left_out: list[str],
) -> bool:
    """Change a message to what is known; return whether that is safe."""
    safe = True
    for field, value in message.ListFields():
        where = f"{path}{field.json_name}"
        name = f"{message.DESCRIPTOR.name}.{field.name}"
        feature = missing.get((name, ""))
        if feature is None and isinstance(value, str):
            feature = missing.get((name, value))
        if feature is not None:
            left_out.append(f"{where}: {value}" if feature.value else where)
            if feature.without is None:
                safe = False
            elif feature.value:
                setattr(message, field.name, feature.without)
            else:
                message.ClearField(field.name)
        elif field.message_type is not None:
            parts = enumerate(value) if field.is_repeated else ((None, value),)
            for index, part in parts:
                inner = f"{where}." if index is None else f"{where}[{index}]."
                safe = _strip(part, inner, missing, left_out) and safe
    return safe
