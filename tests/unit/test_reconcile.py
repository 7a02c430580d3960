"""When what is planned and reported, by a clock that the test moves."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from types import SimpleNamespace

import pytest
from manifest_reading import pool_ref
from prometheus_client import REGISTRY

from forebay_control.v1 import control_pb2 as pb
from forebay_operator import metrics, planning
from forebay_operator.channel.server import ControlServer
from forebay_operator.channel.trust import unauthenticated
from forebay_operator.cluster.api import ApiError
from forebay_operator.cluster.store import Store
from forebay_operator.reconcile.planner import Planner
from forebay_operator.reconcile.statuses import Statuses
from forebay_operator.reconcile.writing import StatusWriter
from forebay_operator.resources import KINDS, MODEL, POLICY
from forebay_operator.status import comparing
from forebay_operator.status.observed import EPP, EPPState

POOL = next(kind for kind in KINDS if kind.api_version == "inference.networking.k8s.io/v1")


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Pickers(ControlServer):
    """A control server whose EPPs' reports the test sets: no EPP connects."""

    def __init__(self, clock):
        super().__init__(unauthenticated, lambda _: None, lambda _: None, clock)
        self.programs = {}
        self.programmed = asyncio.Event()
        self.state, self.generation, self.stats = EPPState.PROGRAMMED, None, None

    def program(self, pool, snapshot):
        self.programs.setdefault(pool, []).append(snapshot)
        self.programmed.set()
        return super().program(pool, snapshot)

    def connected(self, _pool):
        return {"epp-uid": "epp-0"}

    def epps(self, pool, _expected):
        latest = self.programs[pool][-1]
        generations = {source.uid: source.generation for source in latest.sources}
        if self.generation is not None:
            generations = dict.fromkeys(generations, self.generation)
        return [EPP("epp-0", self.state, True, generations, stats=self.stats)]


class Written:
    """A Reporter that keeps what is written, or fails with the errors it is given."""

    def __init__(self):
        self.statuses, self.announced, self.errors = [], [], []
        self.answer = lambda _: None

    async def write(self, entry, status):
        if self.errors:
            raise self.errors.pop(0)
        self.statuses.append((entry.metadata.name, status))
        return self.answer(status)

    async def announce(self, entry, changes):
        self.announced += [
            (entry.metadata.name, change.type, change.status, change.reason) for change in changes
        ]


def manifest(kind, name, spec, generation=1, version="1", **metadata):
    return {
        "apiVersion": kind.api_version,
        "kind": kind.kind,
        "metadata": {
            "name": name,
            "namespace": "default",
            "uid": f"{name}-uid",
            "generation": generation,
            "resourceVersion": version,
            **metadata,
        },
        "spec": spec,
    }


def policy(name="p", generation=1, version="1", metadata=None, status=None, **spec):
    spec = {"targetRefs": [pool_ref("chat")], **spec}
    found = manifest(POLICY, name, spec, generation, version, **(metadata or {}))
    return {**found, "status": status or {}}


@pytest.fixture
def world():
    """A store with a pool, what reconciles it, and where it writes."""
    clock = Clock()
    store, control, written = Store(), Pickers(clock), Written()

    def replanned(namespace):
        writer.look_at(namespace)

    planner = Planner(store, control, None, replanned=replanned, clock=clock)
    writer = StatusWriter(store, planner, Statuses(store, planner, None), written, clock=clock)
    writer.reporting = True
    spec = {"selector": {"matchLabels": {"a": "b"}}, "targetPorts": [{"number": 1}]}
    store.put(POOL, manifest(POOL, "chat", spec), clock())
    world = SimpleNamespace(**locals())

    def put(kind, manifest):
        planner.touch(store.put(kind, manifest, clock()))
        for namespace in sorted(planner._dirty):
            planner.plan(namespace)
        planner._dirty.clear()

    async def after(seconds):
        """Let time pass in ticks, as the reporting loop does; return what was written."""
        before = len(written.statuses)
        for _ in range(round(seconds * 10)):
            clock.now += 0.1
            await writer.report()
            for _ in range(3):
                await asyncio.sleep(0)
        return written.statuses[before:]

    world.put, world.after = put, after
    yield world
    writer.forget_pending()  # metrics are the process's


def reason(status, which="Programmed"):
    return next(c["reason"] for c in status["conditions"] if c["type"] == which)


# --- writing


async def test_a_status_is_written_once(world):
    """And not again while nothing is different, however often it is looked at."""
    world.put(POLICY, policy())
    ((name, status),) = await world.after(1)
    assert (name, reason(status)) == ("p", "Programmed")
    for _ in range(10):
        world.writer.look_at("default")
        assert await world.after(10) == []


async def test_who_does_not_lead_writes_nothing(world):
    """Also not what it had in mind before it lost the lead."""
    world.put(POLICY, policy())
    await world.writer.report()
    assert world.writer._pending
    world.writer.forget_pending()
    world.writer.reporting = False
    assert world.writer._pending == {}


async def test_what_is_about_to_change_is_waited_for(world):
    """Pending is reported after 2 s for a new policy, after 15 s for one that was in force."""
    world.control.state, world.control.generation = EPPState.PENDING, 0
    world.put(POLICY, policy())
    assert await world.after(1.9) == []
    ((_, status),) = await world.after(1)
    assert reason(status) == "Pending"
    world.control.state, world.control.generation = EPPState.PROGRAMMED, None
    ((_, status),) = await world.after(6)
    assert reason(status) == "Programmed"

    world.control.state, world.control.generation = EPPState.PENDING, 0
    world.writer.look_at("default")
    assert await world.after(14) == []
    world.control.state, world.control.generation = EPPState.PROGRAMMED, None
    world.writer.look_at("default")
    assert await world.after(10) == []


async def test_acknowledgements_settle_before_one_write(world):
    """The write says how it ended."""
    world.control.state, world.control.generation = EPPState.PENDING, 0
    world.put(POLICY, policy())
    await world.after(0.2)
    world.control.state, world.control.generation = EPPState.PROGRAMMED, None
    world.writer.look_at("default")
    statuses = await world.after(5)
    assert [reason(status) for _, status in statuses] == ["Programmed"]


async def test_numbers_are_written_every_30_seconds_at_most(world):
    """However fast they move; the last ones are."""
    world.put(POLICY, policy())
    await world.after(1)
    moments = []
    for number in range(95):
        world.control.stats = pb.Stats(bands=[pb.BandStats(band="B", requests=number)])
        for _, status in await world.after(1):
            moments.append((world.clock.now, status["queued"]))
    gaps = [after - before for (before, _), (after, _) in pairwise(moments)]
    assert len(moments) == 3
    assert min(gaps) > 29.9
    assert moments[-1][1] > moments[0][1]


async def test_meaning_does_not_wait_for_numbers(world):
    """An EPP that refuses is reported at once, although numbers were written a moment ago."""
    world.put(POLICY, policy())
    world.control.stats = pb.Stats(bands=[pb.BandStats(band="B", requests=1)])
    await world.after(1)
    world.control.stats = pb.Stats(bands=[pb.BandStats(band="B", requests=2)])
    assert await world.after(5) == []
    world.control.state = EPPState.REJECTED
    world.writer.look_at("default")
    ((_, status),) = await world.after(1)
    assert reason(status) == "Rejected"


async def test_numbers_of_many_objects_are_spread(world):
    """Five a second; what means something is not counted among them."""
    for number in range(40):
        spec = {"selector": {"matchLabels": {"a": "b"}}, "targetPorts": [{"number": 1}]}
        world.put(POOL, manifest(POOL, f"pool-{number}", spec))
        world.put(POLICY, policy(f"p-{number}", targetRefs=[pool_ref(f"pool-{number}")]))
    assert len(await world.after(1)) == 40
    world.control.stats = pb.Stats(bands=[pb.BandStats(band="B", requests=1)])
    assert await world.after(28) == []
    found = []
    while len(found) < 40:
        found.append(len(await world.after(1)))
        assert found[-1] <= 10  # a second's worth may have been saved up
        if sum(found) == 40:
            break
    assert 6 <= len([count for count in found if count]) <= 9


async def test_a_pool_named_under_both_groups_is_one(world):
    """Counted, queued and listed once; the API server refuses a list with it twice."""
    groups = ("inference.networking.k8s.io", "inference.networking.x-k8s.io")
    world.control.stats = pb.Stats(bands=[pb.BandStats(band="Standard", requests=7)])
    world.put(POLICY, policy(targetRefs=[pool_ref("chat", group) for group in groups]))
    ((_, status),) = await world.after(1)

    assert status["endpointPickers"]["ready"] == "1/1"
    assert status["queued"] == 7
    assert [pool["name"] for pool in status["pools"]] == ["chat"]
    assert [a["ancestorRef"]["group"] for a in status["ancestors"]] == [groups[0]]


async def test_endpoint_pickers_that_come_and_go_write_nothing_into_models(world):
    """One write for the policy each time, one Event for the one that is away, none per model."""
    world.put(POLICY, policy())
    for number in range(20):
        spec = {"modelName": f"m-{number}", "poolRef": {"name": "chat"}}
        world.put(MODEL, manifest(MODEL, f"m-{number}", spec))
    assert len(await world.after(1)) == 21

    def epp(name, state=EPPState.PROGRAMMED, **more):
        latest = world.control.programs["default/chat"][-1]
        return EPP(name, state, True, {s.uid: s.generation for s in latest.sources}, **more)

    for epps, events in (
        ([epp("epp-0"), EPP("epp-1", EPPState.PENDING)], 0),
        ([epp("epp-0"), epp("epp-1")], 0),
        ([epp("epp-0"), epp("epp-1", EPPState.STALE)], 1),
        ([epp("epp-0")], 0),
    ):
        world.written.announced.clear()
        world.control.epps = lambda *_, epps=epps: epps
        assert {name for name, _ in await world.after(40)} == {"p"}
        bad = [entry for entry in world.written.announced if entry[2:] == ("False", "Stale")]
        assert len(bad) == events
        assert {entry[0] for entry in world.written.announced} <= {"p"}


async def test_a_model_that_refers_to_something_else_than_a_pool_is_told(world):
    """It has no effect, and names the reference as it is."""
    reference = {"kind": "Service", "name": "chat"}
    world.put(MODEL, manifest(MODEL, "m", {"modelName": "m", "poolRef": reference}))
    ((name, status),) = await world.after(1)
    assert (name, reason(status, "Accepted"), reason(status)) == (
        "m",
        "InvalidPoolRef",
        "InvalidPoolRef",
    )
    assert "names a Service" in status["conditions"][0]["message"]


async def test_a_policy_says_what_is_surely_not_meant(world):
    """In the message of Accepted, so without an Event; it goes when that is corrected."""
    world.put(POLICY, policy(unmatched={"action": "Reject"}))
    ((_, status),) = await world.after(1)
    accepted = next(c for c in status["conditions"] if c["type"] == "Accepted")
    assert (accepted["status"], accepted["reason"]) == ("True", "Accepted")
    assert "EverythingRejected: spec.unmatched.action" in accepted["message"]
    world.written.announced.clear()

    world.put(POLICY, policy(generation=2, version="2", status=status))
    ((_, status),) = await world.after(1)
    accepted = next(c for c in status["conditions"] if c["type"] == "Accepted")
    assert (accepted["status"], accepted["message"]) == ("True", "")
    assert world.written.announced == []


# --- metrics


def series(name):
    """The samples of a metric, by the values of its labels."""
    return {
        tuple(sample.labels.values()): sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == name
    }


async def test_metrics_tell_how_endpoint_pickers_and_policies_stand(world):
    """Only what is so now has a series; a replica that does not lead has none."""
    world.put(POLICY, policy())
    await world.after(1)
    for what in ("desired", "connected", "programmed"):
        assert series(f"forebay_pool_endpoint_pickers_{what}") == {("default/chat",): 1}
    shown = series("forebay_policy_condition")
    assert len(shown) == 4
    assert shown["default", "p", "Programmed", "True"] == 1

    world.control.state = EPPState.STALE
    world.writer.look_at("default")
    await world.after(1)
    assert series("forebay_pool_endpoint_pickers_programmed") == {("default/chat",): 0}
    shown = series("forebay_policy_condition")
    assert ("default", "p", "Programmed", "True") not in shown
    assert shown["default", "p", "Programmed", "False"] == 1
    assert series("forebay_pool_problems")

    world.writer.forget_pending()
    assert series("forebay_policy_condition") == {}
    assert series("forebay_pool_endpoint_pickers_desired") == {}
    assert series("forebay_pool_problems") == {}


# --- errors


async def test_an_error_does_not_lose_the_write(world):
    """Whatever it was, it is tried again, after 0.5, 1, 2, 4 s."""
    world.written.errors = [
        ApiError(0, "connection refused"),
        ApiError(409, "conflict"),
        ApiError(422, "invalid"),
        ApiError(404, "no such object"),
    ]
    world.put(POLICY, policy())
    moments = []
    while not world.written.statuses:
        left = len(world.written.errors)
        await world.after(0.1)
        if len(world.written.errors) < left:
            moments.append(world.clock.now)
        assert world.clock.now < 1100
    gaps = [after - before for before, after in pairwise(moments)]
    assert gaps == pytest.approx([0.5, 1, 2], abs=0.25)
    assert reason(world.written.statuses[0][1]) == "Programmed"


async def test_a_defect_in_writing_does_not_lose_the_write_either(world, caplog):
    """It is logged with where it happened."""
    world.written.errors = [ZeroDivisionError("a defect")]
    world.put(POLICY, policy())
    assert len(await world.after(3)) == 1
    assert "a defect" in caplog.text
    assert caplog.records[0].exc_info


async def test_back_off_ends_at_30_seconds(world):
    """And a status that became right by itself is not written at all."""
    world.written.errors = [ApiError(500, "no")] * 40
    world.put(POLICY, policy())
    await world.after(300)
    assert 40 - len(world.written.errors) in range(12, 18)
    world.store.remove(POLICY, "p-uid", world.clock())
    world.written.errors.clear()
    assert await world.after(60) == []
    assert world.writer._pending == {}


async def test_too_many_requests_pause_all_writes(world):
    """For as long as the server asks; then everything is written."""
    for number in range(5):
        world.put(POLICY, policy(f"p-{number}"))
    world.written.errors = [ApiError(429, "slow down", retry_after_seconds=20)]
    # The others of this tick have been asked already.
    early = await world.after(15)
    assert len(early) == 4
    world.put(POLICY, policy("late", targetRefs=[pool_ref("absent")]))
    assert await world.after(4) == []
    assert sorted(name for name, _ in await world.after(10)) == ["late", "p-0"]


async def test_the_newest_status_is_written_after_an_error(world):
    """Not the one that failed."""
    world.written.errors = [ApiError(500, "no")] * 3
    world.put(POLICY, policy())
    await world.after(1)
    world.put(POLICY, policy(generation=2, version="2", unmatched={"action": "Reject"}))
    ((_, status),) = await world.after(10)
    assert {c["observedGeneration"] for c in status["conditions"]} == {2}


async def test_what_the_server_answers_is_known_at_once(world):
    """Its version too, so that the event of our own write changes nothing."""
    world.written.answer = lambda status: policy(version="7", status=status)
    world.put(POLICY, policy())
    assert len(await world.after(1)) == 1
    assert world.store.get(POLICY, "p-uid").resource_version == "7"
    assert await world.after(60) == []


async def test_an_answer_is_believed_although_its_version_is_older(world):
    """Versions begin again when etcd is restored; else the status would be written endlessly."""
    world.written.answer = lambda status: policy(version="11", status=status)
    world.put(POLICY, policy(version="1000"))
    assert len(await world.after(30)) == 1
    assert world.store.get(POLICY, "p-uid").resource_version == "11"


# --- what is announced


async def test_transitions_are_announced_once(world):
    """An edit that succeeds is none."""
    world.put(POLICY, policy())
    await world.after(1)
    assert ("p", "Programmed", "True", "Programmed") in world.written.announced
    world.written.announced.clear()
    ((_, status),) = world.written.statuses
    edited = policy(generation=2, version="2", status=status, unmatched={"action": "Reject"})
    world.put(POLICY, edited)
    assert len(await world.after(1)) == 1
    assert world.written.announced == []


# --- invalid objects


BAD = {"limits": {"maxRequests": 0}}


async def test_an_invalid_generation_does_not_replace_a_valid_one(world):
    """Of its pool the program stays, and another policy's is made."""
    world.put(POLICY, policy(limits={"maxRequests": 7}))
    world.put(POLICY, policy(generation=2, version="2", **BAD))
    snapshot = world.control.programs["default/chat"][-1]
    assert snapshot.plan.limits.max_requests == 7
    assert [source.generation for source in snapshot.sources] == [1]
    ((_, status),) = await world.after(1)
    assert reason(status, "Accepted") == "Invalid"
    assert reason(status, "Degraded") == "LastValidInForce"
    assert status["programmedGeneration"] == 1


@pytest.mark.parametrize(
    ("generation", "status", "held"),
    [
        (2, {}, True),  # a valid one may have been there before
        (1, {}, False),  # it never counted
        (1, {"programmedGeneration": 1}, True),  # an older release took it
        (1, {"conditions": [{"type": "Degraded", "reason": "PlanHeld"}]}, True),
    ],
)
async def test_a_plan_is_held_for_what_may_be_in_force(world, generation, status, held):
    """After a restart no operator knows the last valid generation; EPPs do."""
    world.put(POLICY, policy(generation=generation, status=status, **BAD))
    snapshot = world.control.programs["default/chat"][-1]
    assert snapshot.HasField("plan") is not held
    ((_, told),) = await world.after(1)
    assert reason(told, "Degraded") == ("PlanHeld" if held else "PoolDegraded")
    assert comparing.was_in_force(told) is held


async def test_a_policy_of_an_earlier_shape_says_what_its_fields_are_called_now(world):
    """As it may still be stored: it is invalid, EPPs keep their plan, and all else is served."""
    reference = {"name": "chat"}
    old = {
        "targetRefs": [reference],
        "bands": [{"criticality": "Critical", "ordering": "FCFS"}],
        "saturation": {"mode": "Concurrency", "maxConcurrency": 8},
        "trust": {"objectiveHeader": True},
    }
    stored = manifest(POLICY, "old", old) | {"status": {"programmedGeneration": 1}}
    world.put(POLICY, stored)
    world.put(MODEL, manifest(MODEL, "m", {"modelName": "m", "poolRef": reference}))

    told = dict(await world.after(3))

    accepted = next(c for c in told["old"]["conditions"] if c["type"] == "Accepted")
    assert (accepted["status"], accepted["reason"]) == ("False", "Invalid")
    for says in (
        "spec.targetRefs[0].group: is required",
        "spec.targetRefs[0].kind: is required",
        "spec.bands[0].criticality: is spec.bands[0].name now",
        "spec.bands[0].ordering: is spec.bands[0].ordering.policy now",
        "spec.saturation.mode: is spec.saturation.type now",
        "spec.saturation.maxConcurrency: is spec.saturation.concurrency.maxRequestsPerEndpoint now",
        "spec.trust: is spec.trustedHeaders now",
    ):
        assert says in accepted["message"]
    assert reason(told["old"], "Degraded") == "PlanHeld"
    assert reason(told["m"], "Accepted") == "Accepted"


async def test_a_model_that_was_never_valid_is_told(world):
    """It names no pool that could be read."""
    world.put(MODEL, manifest(MODEL, "m", {"modelName": ""}))
    ((name, status),) = await world.after(1)
    assert (name, reason(status, "Accepted"), reason(status)) == ("m", "Invalid", "Invalid")


# --- planning


async def test_one_pool_that_cannot_be_planned_stops_no_other(world, monkeypatch, caplog):
    """A defect there is logged, and what was planned before stays."""
    spec = {"selector": {"matchLabels": {"a": "b"}}, "targetPorts": [{"number": 1}]}
    plan = planning.plan

    def broken(pool, *more):
        if pool.metadata.name == "bad":
            raise ZeroDivisionError("a defect")
        return plan(pool, *more)

    world.put(POOL, manifest(POOL, "bad", spec))
    monkeypatch.setattr(planning, "plan", broken)
    failures = series("forebay_planning_failures_total")[()]
    world.put(POLICY, policy(unmatched={"action": "Reject"}))
    assert world.control.programs["default/chat"][-1].plan.unmatched.action == "Reject"
    assert [pool.metadata.name for pool, _ in world.planner.planned()] == ["bad", "chat"]
    assert "a defect" in caplog.text
    assert series("forebay_planning_failures_total")[()] == failures + 1


async def test_a_pool_that_is_gone_is_forgotten_but_not_programmed_away(world):
    """Its EPPs keep their program: nothing is sent."""
    world.put(POLICY, policy())
    sent = len(world.control.programs["default/chat"])
    world.planner.touch(world.store.remove(POOL, "chat-uid", world.clock()))
    world.planner.plan("default")
    assert world.planner.planned() == []
    assert len(world.control.programs["default/chat"]) == sent
    ((_, status),) = await world.after(1)
    assert reason(status, "ResolvedRefs") == "TargetNotFound"


async def test_a_burst_of_changes_is_planned_once(world):
    """After 50 ms of quiet, and after half a second at the latest; this one runs in real time."""
    planner = Planner(world.store, world.control, None)
    running = asyncio.create_task(planner.run())
    programmed = world.control.programmed
    for number in range(1, 30):
        manifest = policy(generation=number, version=str(number), limits={"maxRequests": number})
        planner.touch(world.store.put(POLICY, manifest, 0.0))
        await asyncio.sleep(0)
    await asyncio.wait_for(programmed.wait(), 30)
    running.cancel()
    (snapshot,) = world.control.programs["default/chat"]
    assert snapshot.plan.limits.max_requests == 29


# --- pools without a policy


async def test_a_plan_that_is_too_large_is_told_of_without_a_policy(world):
    """By an Event on the pool, once; endpoints are sent without it, and the plan when it fits."""
    name = "x" * 250
    for number in range(5):
        spec = {
            "modelName": f"m{number}",
            "poolRef": {"name": "chat"},
            "criticality": "Critical",
            "targetModels": [{"name": f"{name}{target}"} for target in range(4)],
        }
        world.put(MODEL, manifest(MODEL, f"m{number}", spec))
    await world.after(1)
    assert "chat" not in {entry[0] for entry in world.written.announced}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("forebay_operator.planning.planned.MAX_PLAN_BYTES", 2000)
        world.planner.plan("default")
        sent = world.control.programs["default/chat"][-1]
        await world.after(20)
    assert (sent.HasField("plan"), sent.HasField("endpoints")) == (False, True)
    told = [entry for entry in world.written.announced if entry[0] == "chat"]
    assert told == [("chat", "Degraded", "True", "TooLarge")]
    problems = metrics.POOL_PROBLEMS.labels("default/chat", "TooLarge")
    assert problems._value.get() == 1
    reasons = {entry: reason(status) for entry, status in world.written.statuses}
    assert set(reasons.values()) == {"TooLarge"}, reasons

    world.planner.plan("default")
    assert world.control.programs["default/chat"][-1].HasField("plan")
    await world.after(20)
    assert ("default/chat", "TooLarge") not in metrics.POOL_PROBLEMS._metrics
