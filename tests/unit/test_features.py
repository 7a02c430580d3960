"""What is sent to an EPP of another release: nothing that it does not know."""

from __future__ import annotations

import pytest

from forebay_control import features
from forebay_control.features import Feature, restrict
from forebay_control.v1 import control_pb2 as pb

# Every field that a Snapshot had in release 0.1, which names no features.
RELEASE_0_1 = {
    "Snapshot": {"plan", "endpoints", "pool_uid", "sources"},
    "Source": {"kind", "namespace", "name", "uid", "generation"},
    "Plan": {
        *("pool", "bands", "models", "limits", "saturation", "unmatched"),
        *("no_endpoints_ttl_seconds", "objectives", "trust_objective_header"),
    },
    "Band": {
        *("name", "priority", "fairness", "ordering", "ttl_seconds", "max_requests", "max_bytes"),
        *("flow_max_requests", "flow_max_bytes"),
    },
    "Model": {"name", "band", "targets"},
    "Objective": {"name", "band"},
    "Target": {"name", "weight"},
    "Limits": {"max_requests", "max_bytes", "max_body_bytes"},
    "Saturation": {"mode", "max_concurrency", "kv_cache_usage_threshold"},
    "Unmatched": {"action", "band"},
    "Endpoints": {"endpoints"},
    "Endpoint": {"address", "name"},
}


def fields(descriptor, seen=None):
    """Yield (message, field) of everything that a message may hold."""
    seen = {descriptor.name} if seen is None else seen
    for field in descriptor.fields:
        yield descriptor.name, field.name
        inner = field.message_type
        if inner is not None and inner.name not in seen:
            seen.add(inner.name)
            yield from fields(inner, seen)


def snapshot() -> pb.Snapshot:
    plan = pb.Plan(
        pool="default/chat",
        bands=[
            pb.Band(name="Critical", fairness="FCFS"),
            pb.Band(name="Standard", fairness="RoundRobin"),
        ],
        trust_objective_header=True,
    )
    endpoint = pb.Endpoint(address="10.0.0.1:8000", name="pod", uid="uid")
    return pb.Snapshot(
        plan=plan,
        endpoints=pb.Endpoints(endpoints=[endpoint]),
        sources=[pb.Source(kind="FlowControlPolicy", uid="policy", generation=3)],
    )


def test_each_later_field_has_a_feature():
    """Else an operator would send it to a release that refuses the plan for it."""
    later = {
        f"{message}.{field}"
        for message, field in fields(pb.Snapshot.DESCRIPTOR)
        if message in RELEASE_0_1 and field not in RELEASE_0_1[message]
    }

    assert later == {feature.field for feature in features.FEATURES if not feature.value}


def test_one_that_knows_everything_is_sent_everything():
    """Without a copy."""
    made = snapshot()

    assert restrict(made, features.NAMES).snapshot is made


def test_one_of_release_0_1_is_sent_what_it_knows():
    """Pod uids are left out, which is safe; about the plan there is nothing to tell."""
    made = snapshot()
    restricted = restrict(made, ())

    expected = snapshot()
    expected.endpoints.endpoints[0].uid = ""
    assert (restricted.snapshot, restricted.left_out) == (expected, ())
    assert made == snapshot()


def test_one_of_release_0_1_is_not_told_of_a_deleted_pool():
    """It would take the lack of endpoints for their end."""
    assert restrict(pb.Snapshot(deleted=True), ()).snapshot is None


TABLE = (
    Feature("TrustedObjectives", "Plan.trust_objective_header", without=""),
    Feature("RoundRobin", "Band.fairness", "RoundRobin", without="FCFS"),
)


def test_a_field_that_can_be_left_out_is_left_out():
    """And named as people write it."""
    restricted = restrict(snapshot(), {features.SEPARATE_ENDPOINTS, "RoundRobin"}, TABLE)

    assert not restricted.snapshot.plan.trust_objective_header
    assert restricted.snapshot.plan.bands[1].fairness == "RoundRobin"
    assert restricted.left_out == ("plan.trustObjectiveHeader",)


def test_a_value_is_replaced_where_another_one_is_safe():
    """The others of the field stay."""
    restricted = restrict(snapshot(), {features.SEPARATE_ENDPOINTS, "TrustedObjectives"}, TABLE)

    assert [band.fairness for band in restricted.snapshot.plan.bands] == ["FCFS", "FCFS"]
    assert restricted.left_out == ("plan.bands[1].fairness: RoundRobin",)


@pytest.mark.parametrize(
    "row",
    [
        Feature("RoundRobin", "Band.fairness", "RoundRobin"),
        Feature("Trust", "Plan.trust_objective_header"),
    ],
    ids=["value", "field"],
)
def test_a_plan_that_would_mean_something_else_is_not_sent(row):
    """The plan in force stays; endpoints are sent all the same."""
    restricted = restrict(snapshot(), {features.SEPARATE_ENDPOINTS}, (row,))

    assert not restricted.snapshot.HasField("plan")
    assert not restricted.snapshot.sources
    assert len(restricted.snapshot.endpoints.endpoints) == 1
    assert len(restricted.left_out) == 1


def test_a_field_that_is_not_used_leaves_the_plan_as_it_is():
    """Only what is set counts."""
    made = snapshot()
    made.plan.ClearField("trust_objective_header")
    made.plan.bands[1].fairness = "FCFS"
    restricted = restrict(made, {features.SEPARATE_ENDPOINTS}, TABLE)

    assert (restricted.snapshot, restricted.left_out) == (made, ())


def test_a_snapshot_that_is_too_large_for_release_0_1_goes_without_its_plan():
    """It takes 1 MiB of plan and endpoints together."""
    made = snapshot()
    made.plan.models.add(name="x" * (features.MAX_BYTES_WITHOUT - 100), band="Standard")
    made.endpoints.endpoints.extend(pb.Endpoint(address=f"10.0.0.{n}:1") for n in range(2, 99))
    restricted = restrict(made, ())

    assert not restricted.snapshot.HasField("plan")
    assert len(restricted.snapshot.endpoints.endpoints) == 98
    assert restricted.left_out[0].startswith("plan: ")
    assert restrict(made, features.NAMES).snapshot.HasField("plan")
