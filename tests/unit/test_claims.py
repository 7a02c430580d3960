"""Whose pools are whose: what an operator plans and reports, and what it leaves alone."""

from __future__ import annotations

import pytest
from manifest_reading import pool_ref

from forebay_operator.channel.server import ControlServer
from forebay_operator.channel.trust import unauthenticated
from forebay_operator.cluster.store import Store
from forebay_operator.reconcile.planner import Planner
from forebay_operator.reconcile.statuses import Statuses
from forebay_operator.resources import KINDS, MODEL, POLICY
from forebay_operator.status import comparing

POOL = next(kind for kind in KINDS if kind.api_version == "inference.networking.k8s.io/v1")
SERVICE = next(kind for kind in KINDS if kind.kind == "Service")
OURS, THEIRS = "forebay", "other"


def made(kind, name, spec, **metadata):
    return {
        "apiVersion": kind.api_version,
        "kind": kind.kind,
        "metadata": {"name": name, "namespace": "default", "uid": f"{name}-uid", **metadata},
        "spec": spec,
    }


class World:
    """Pools by the name of who claims them, and one operator."""

    def __init__(self):
        self.store = Store()
        self.control = ControlServer(unauthenticated, lambda _: None, lambda *_: None)
        self.planner = Planner(self.store, self.control, OURS)
        self.statuses = Statuses(self.store, self.planner, OURS)
        for name in (OURS, THEIRS, ""):
            self.pool(name or "nobodys", name)

    def put(self, kind, name, spec, **metadata):
        self.store.put(kind, made(kind, name, spec, **metadata), 0.0)
        self.planner.plan("default")

    def pool(self, name, claimant):
        labels = {"forebay.dev/controller": claimant} if claimant else {}
        self.put(SERVICE, f"{name}-epp", {"selector": {"app": name}}, labels=labels)
        reference = {"name": f"{name}-epp", "port": {"number": 9002}}
        selector = {"matchLabels": {"app": "m"}}
        spec = {"selector": selector, "targetPorts": [{"number": 80}]}
        self.put(POOL, name, {**spec, "endpointPickerRef": reference})

    def policy(self, *pools, status=None):
        spec = {"targetRefs": [pool_ref(name) for name in pools]}
        manifest = {**made(POLICY, "p", spec), "status": status or {}}
        self.store.put(POLICY, manifest, 0.0)
        self.planner.plan("default")
        return {entry.metadata.name: status for entry, status in self.statuses.of("default")}.get(
            "p"
        )


@pytest.fixture
def world():
    return World()


def reasons(status):
    return {c["type"]: c["reason"] for c in status["conditions"]}


def test_only_a_claimed_pool_is_planned(world):
    """EPPs of the others receive nothing, and may not connect."""
    assert [pool.metadata.name for pool, _ in world.planner.planned()] == [OURS]
    assert world.planner.expected(f"default/{OURS}") == {}
    assert world.planner.expected(f"default/{THEIRS}") is None
    assert world.planner.expected("default/nobodys") is None


@pytest.mark.parametrize("pool", [THEIRS, "nobodys"])
def test_models_of_other_pools_get_no_status(world, pool):
    """Another operator may act on them; this one does not."""
    for name in (OURS, pool):
        world.put(MODEL, f"m-{name}", {"modelName": name, "poolRef": {"name": name}})
    assert [entry.metadata.name for entry, _ in world.statuses.of("default")] == ["m-forebay"]


@pytest.mark.parametrize(("pool", "reason"), [("nobodys", "PoolNotClaimed"), (THEIRS, None)])
def test_what_was_said_of_a_model_is_corrected_when_its_pool_is_not_claimed(world, pool, reason):
    """It may say that there is no such pool; where another has claimed it, that one corrects it."""
    manifest = made(MODEL, "m", {"modelName": "m", "poolRef": {"name": pool}})
    said = {"type": "Accepted", "status": "False", "reason": "TargetNotFound", "message": ""}
    world.store.put(MODEL, {**manifest, "status": {"conditions": [said]}}, 0.0)

    found = {entry.metadata.name: status for entry, status in world.statuses.of("default")}

    assert (reasons(found["m"]).get("Accepted") if "m" in found else None) == reason


def test_a_policy_for_a_pool_that_nobody_claims_says_why_nothing_happens(world):
    """And what to do about it."""
    status = world.policy("nobodys")
    assert reasons(status)["Accepted"] == reasons(status)["Programmed"] == "PoolNotClaimed"
    assert "forebay.dev/controller" in status["conditions"][0]["message"]


def test_a_policy_for_another_controllers_pool_is_left_alone(world):
    """It is that controller's to report on."""
    assert world.policy(THEIRS) is None


def test_what_was_written_is_withdrawn_when_the_pool_goes_to_another(world):
    """The list of ancestors holds the other's entries only."""
    status = comparing.with_times(world.policy(OURS), {}, "2026-01-01T00:00:00Z", "forebay.dev/x")
    theirs = {**status["ancestors"][0], "controllerName": "forebay.dev/other"}
    world.pool(OURS, THEIRS)

    desired = world.policy(OURS, status={"ancestors": [*status["ancestors"], theirs]})

    assert comparing.differs(desired, {"ancestors": status["ancestors"]}, "forebay.dev/forebay")
    written = comparing.with_times(
        desired, {"ancestors": [*status["ancestors"], theirs]}, "", "forebay.dev/forebay"
    )
    assert written == {"ancestors": [theirs]}
    assert comparing.differs(desired, written, "forebay.dev/forebay") == ""


def test_what_another_forebay_said_of_a_pool_that_is_ours_now_is_dropped(world):
    """As what an operator wrote before it got its name; a gateway's entry stays."""
    status = world.policy(OURS)
    before = [
        {**status["ancestors"][0], "controllerName": name, "conditions": []}
        for name in ("forebay.dev/operator", "gateway.example/controller")
    ]
    elsewhere = {
        **before[0],
        "ancestorRef": {**before[0]["ancestorRef"], "name": THEIRS},
    }

    written = comparing.with_times(
        status, {"ancestors": [*before, elsewhere]}, "T1", "forebay.dev/forebay"
    )

    assert [(a["ancestorRef"]["name"], a["controllerName"]) for a in written["ancestors"]] == [
        (OURS, "forebay.dev/forebay"),
        (OURS, "gateway.example/controller"),
        (THEIRS, "forebay.dev/operator"),
    ]


def test_operators_that_say_that_a_pool_is_unclaimed_leave_each_other_alone(world):
    """Each of them says so, and none is more right than another."""
    status = world.policy("nobodys")
    other = {**status["ancestors"][0], "controllerName": "forebay.dev/other"}

    written = comparing.with_times(status, {"ancestors": [other]}, "T1", "forebay.dev/forebay")

    assert [a["controllerName"] for a in written["ancestors"]] == [
        "forebay.dev/forebay",
        "forebay.dev/other",
    ]


def test_the_controller_of_the_first_pool_writes_what_is_said_of_all(world):
    """The other adds its own ancestors and pools, and neither undoes what the other has written."""
    first = world.policy(OURS, THEIRS)
    assert {"conditions", "endpointPickers"} <= first.keys()
    assert [a["ancestorRef"]["name"] for a in first["ancestors"]] == [OURS]

    second = world.policy(THEIRS, OURS)
    assert second.keys() == {"ancestors", "pools"}
    theirs = {
        **first["ancestors"][0],
        "controllerName": "forebay.dev/other",
        "conditions": [],
    }
    observed = {**first, "ancestors": [*second["ancestors"], theirs]}
    assert comparing.differs(second, observed, "forebay.dev/forebay") == ""
