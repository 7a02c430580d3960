"""How the EPPs of a pool stand, in virtual time."""

from __future__ import annotations

import hashlib

from forebay_control.features import NAMES
from forebay_control.v1 import control_pb2 as pb
from forebay_operator.channel.rollout import MAX_VARIANTS, REMEMBERED_PROGRAMS, Rollout
from forebay_operator.channel.session import Session
from forebay_operator.status.observed import EPPState

EXPECTED = {"uid-0": "epp-0"}


def snapshot(generation: int = 1) -> pb.Snapshot:
    source = pb.Source(kind="FlowControlPolicy", uid="policy", generation=generation)
    return pb.Snapshot(plan=pb.Plan(pool="default/chat"), sources=[source])


def applied(sha256: bytes, plan_sha256: bytes = b"") -> pb.Applied:
    return pb.Applied(sha256=sha256, plan_sha256=plan_sha256)


def wanting(generation: int = 1) -> Rollout:
    rollout = Rollout()
    rollout.want(snapshot(generation), 1)
    return rollout


def state(rollout, session=None, now=0.0, leading_since=0.0) -> EPPState:
    sessions = {"uid-0": session} if session else {}
    return rollout.epps(EXPECTED, sessions, leading_since, now)[0].state


def test_the_same_snapshot_is_no_news():
    """Also when it was made again."""
    rollout = Rollout()

    assert rollout.want(snapshot(), 1)
    assert not rollout.want(snapshot(), 2)
    assert rollout.desired_for().revision == 1


def test_a_picker_is_pending_until_it_acknowledges():
    """What was sent does not count."""
    rollout, session = wanting(), Session(0.0)
    assert state(rollout, session) is EPPState.PENDING

    rollout.acknowledged("uid-0", rollout.desired_for(), 1.0)
    assert state(rollout, session) is EPPState.PROGRAMMED


def test_a_picker_is_pending_again_when_something_else_is_wanted():
    """And its generations stay those of what is in force."""
    rollout, session = wanting(1), Session(0.0)
    rollout.acknowledged("uid-0", rollout.desired_for(), 1.0)
    rollout.want(snapshot(2), 2)

    [epp] = rollout.epps(EXPECTED, {"uid-0": session}, 0.0, 2.0)
    assert (epp.state, epp.generations) == (EPPState.PENDING, {"policy": 1})


def test_a_refusal_shows_until_something_else_is_wanted():
    """With what the EPP said."""
    rollout, session = wanting(1), Session(0.0)
    program = session.offer(rollout.desired_for(), 1, 0.0)
    session.on_nack(pb.Nack(nonce=program.nonce, code="Invalid"), 0.0)

    [epp] = rollout.epps(EXPECTED, {"uid-0": session}, 0.0, 2.0)
    assert (epp.state, epp.error) == (EPPState.REJECTED, "Invalid: ")
    rollout.want(snapshot(2), 2)
    assert state(rollout, session) is EPPState.PENDING


def test_a_picker_without_a_stream_is_stale_after_half_a_minute():
    """It runs what it ran; whether it still runs is unknown."""
    rollout = wanting()
    rollout.acknowledged("uid-0", rollout.desired_for(), 0.0)
    rollout.left("uid-0", 10.0)

    assert state(rollout, now=40.0) is EPPState.PROGRAMMED
    assert state(rollout, now=40.1) is EPPState.STALE


def test_a_new_leader_gives_pickers_time_to_dial():
    """They have just been sent away by the one before."""
    rollout = wanting()
    rollout.left("uid-0", 0.0)
    state(rollout, now=0.0)

    assert state(rollout, now=120.0, leading_since=100.0) is EPPState.PENDING
    assert state(rollout, now=131.0, leading_since=100.0) is EPPState.STALE


def test_an_older_stream_that_ends_does_not_age_the_picker():
    """It has a newer one, or had until a moment ago."""
    rollout = wanting()
    rollout.acknowledged("uid-0", rollout.desired_for(), 0.0)
    rollout.left("uid-0", 100.0)
    rollout.left("uid-0", 50.0)

    assert state(rollout, now=120.0) is EPPState.PROGRAMMED


def test_a_hello_tells_what_the_picker_runs():
    """Known programs have their generations; one of another leader has none."""
    rollout = wanting()
    rollout.runs("uid-0", applied(rollout.desired_for().sha256), NAMES, 0.0)
    [known] = rollout.epps(EXPECTED, {}, 0.0, 0.0)
    rollout.runs("uid-0", applied(b"?" * 32), NAMES, 0.0)
    [unknown] = rollout.epps(EXPECTED, {}, 0.0, 0.0)

    assert (known.state, known.generations) == (EPPState.PROGRAMMED, {"policy": 1})
    assert (unknown.state, unknown.generations) == (EPPState.PENDING, {})


def test_what_is_wanted_now_is_never_forgotten():
    """Also when it was wanted long ago for the first time."""
    rollout = wanting(0)
    for generation in range(1, REMEMBERED_PROGRAMS):
        rollout.want(snapshot(generation), generation + 1)
    rollout.want(snapshot(0), 100)
    wanted = rollout.desired_for().sha256
    rollout.want(snapshot(1000), 101)
    rollout.runs("uid-0", applied(wanted), NAMES, 0.0)

    assert rollout.epps(EXPECTED, {}, 0.0, 0.0)[0].generations == {"policy": 0}


def test_pickers_that_are_gone_are_forgotten():
    """What is known does not grow with every pod there ever was."""
    rollout = wanting()
    for number in range(100):
        rollout.runs(f"uid-{number}", applied(b"?" * 32), NAMES, 0.0)
    rollout.retain({"uid-0"})

    assert set(rollout._records) == {"uid-0"}


def test_nothing_is_wanted_of_a_pool_that_is_gone():
    """Its EPPs keep what they have."""
    rollout = wanting()
    rollout.give_up()

    assert not rollout.wants
    assert state(rollout, Session(0.0)) is EPPState.PENDING


# --- EPPs of other releases, and plans that are not sent


def with_uid() -> pb.Snapshot:
    made = snapshot()
    made.endpoints.endpoints.add(address="10.0.0.1:8000", uid="pod-1")
    return made


def test_each_release_is_sent_what_it_knows():
    """An EPP that acknowledges its own variant is programmed."""
    rollout = Rollout()
    rollout.want(with_uid(), 1)
    old, new = rollout.desired_for(frozenset()), rollout.desired_for()
    assert old.sha256 != new.sha256
    assert b"pod-1" in new.snapshot
    assert b"pod-1" not in old.snapshot

    session = Session(0.0, None, frozenset())
    rollout.acknowledged("uid-0", old, 1.0)
    assert state(rollout, session) is EPPState.PROGRAMMED
    assert state(rollout, Session(0.0)) is EPPState.PENDING


def test_an_epp_of_another_release_that_is_away_counts_by_what_it_knows():
    """Its Hello said so."""
    rollout = Rollout()
    rollout.want(with_uid(), 1)
    old = rollout.desired_for(frozenset())
    rollout.runs("uid-0", applied(old.sha256), frozenset(), 0.0)

    assert state(rollout) is EPPState.PROGRAMMED


def test_what_is_left_out_of_the_plan_is_told():
    """For the status."""
    rollout = Rollout()
    made = snapshot()
    made.plan.metrics.path = "/load"
    rollout.want(made, 1)

    [epp] = rollout.epps(EXPECTED, {"uid-0": Session(0.0, None, frozenset())}, 0.0, 0.0)
    assert epp.unsupported == ("plan.metrics",)


def test_release_0_1_is_sent_nothing_about_a_deleted_pool():
    """It keeps what it has, as it always did."""
    rollout = wanting()
    rollout.want(pb.Snapshot(deleted=True), 2)

    assert rollout.desired_for(frozenset()) is None
    assert rollout.desired_for() is not None


def test_endpoints_without_a_plan_leave_the_plan_that_was_acknowledged():
    """Whether it is held back or too large: what runs is known."""
    rollout = wanting(1)
    rollout.acknowledged("uid-0", rollout.desired_for(), 0.0)
    held = pb.Snapshot(endpoints=pb.Endpoints())
    rollout.want(held, 2)
    rollout.acknowledged("uid-0", rollout.desired_for(), 1.0)
    [before] = rollout.epps(EXPECTED, {}, 0.0, 1.0)

    plan_sha256 = hashlib.sha256(snapshot().plan.SerializeToString(deterministic=True)).digest()
    rollout.runs("uid-0", applied(rollout.desired_for().sha256, plan_sha256), NAMES, 2.0)
    [dialled] = rollout.epps(EXPECTED, {}, 0.0, 2.0)
    rollout.runs("uid-0", None, NAMES, 3.0)
    [restarted] = rollout.epps(EXPECTED, {}, 0.0, 3.0)

    assert before.generations == dialled.generations == {"policy": 1}
    assert restarted.generations == {}


def test_many_feature_lists_do_not_fill_the_memory():
    """A hostile EPP makes them up."""
    rollout = Rollout()
    rollout.want(with_uid(), 1)
    for number in range(100):
        rollout.desired_for(frozenset({f"f{number}"}))

    assert len(rollout._variants) == MAX_VARIANTS
