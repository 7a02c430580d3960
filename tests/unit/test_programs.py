"""An EPP's answers to programs: order, fencing, and nothing that it does not understand."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from manifest_reading import resource_of

from forebay_control.limits import MAX_ENDPOINTS, MAX_PLAN_BYTES, MAX_SNAPSHOT_BYTES
from forebay_control.v1 import control_pb2 as pb
from forebay_epp.codec.control import (
    MAX_ERRORS,
    Accepted,
    Code,
    Nacked,
    Programs,
    Version,
)
from forebay_epp.core.terms import Endpoint
from forebay_operator import planning

POOL = "default/chat"
INFERENCE_POOL = resource_of(
    {
        "apiVersion": "inference.networking.k8s.io/v1",
        "kind": "InferencePool",
        "metadata": {"name": "chat", "namespace": "default"},
        "spec": {"selector": {"matchLabels": {"app": "a"}}, "targetPorts": [{"number": 8000}]},
    }
)
PLAN = planning.plan(INFERENCE_POOL, [INFERENCE_POOL]).snapshot.plan


def snapshot(ttl=30.0, pool=POOL, endpoints=()) -> pb.Snapshot:
    made = pb.Snapshot(
        endpoints=pb.Endpoints(endpoints=[pb.Endpoint(address=e) for e in endpoints])
    )
    made.plan.CopyFrom(PLAN)
    made.plan.pool = pool
    made.plan.no_endpoints_ttl_seconds = ttl
    return made


def program(made, epoch=5, revision=1, nonce=1) -> pb.Program:
    data = made if isinstance(made, bytes) else made.SerializeToString()
    return pb.Program(
        nonce=nonce,
        version=pb.Version(epoch=epoch, revision=revision),
        sha256=hashlib.sha256(data).digest(),
        snapshot=data,
    )


def judged(made, *, programs: Programs | None = None, **version) -> Nacked:
    verdict = (programs or Programs(POOL)).judge(program(made, **version))
    assert isinstance(verdict, Nacked), verdict
    return verdict


def running(epoch=5, revision=7) -> Programs:
    """Programs with one in force."""
    programs = Programs(POOL)
    programs.took(programs.judge(program(snapshot(), epoch, revision)))
    return programs


def test_the_first_program_is_accepted():
    """With its plan and endpoints, whose uids tell pods apart."""
    verdict = Programs(POOL).judge(program(snapshot(endpoints=["10.0.0.1:8000"])))

    assert isinstance(verdict, Accepted)
    assert verdict.plan.pool == POOL
    assert verdict.endpoints == (Endpoint("10.0.0.1:8000"),)
    assert verdict.applied.version == Version(5, 1)


@pytest.mark.parametrize("version", [(5, 8), (6, 1), (6, 7), (9, 1)])
def test_a_greater_version_is_accepted(version):
    """First the epoch counts, then the revision."""
    assert isinstance(running(5, 7).judge(program(snapshot(31.0), *version)), Accepted)


@pytest.mark.parametrize("version", [(5, 6), (5, 0), (4, 8), (0, 0)])
def test_a_lower_version_is_stale(version):
    """It comes from a leader that has been replaced, or was overtaken."""
    refused = judged(snapshot(31.0), programs=running(5, 7), epoch=version[0], revision=version[1])

    assert refused.code is Code.STALE_EPOCH


def test_a_lower_version_is_stale_also_with_the_same_content():
    """An old leader has no say, whatever it says."""
    assert judged(snapshot(), programs=running(5, 7), epoch=4, revision=9).code is Code.STALE_EPOCH


def test_an_epoch_once_seen_fences_off_older_ones():
    """Also when its program was refused, or came before a restart."""
    programs = running(5, 7)
    judged(snapshot(pool="default/other"), programs=programs, epoch=8)
    assert judged(snapshot(31.0), programs=programs, epoch=7).code is Code.STALE_EPOCH

    restarted = Programs(POOL, None, highest_epoch=8)
    assert judged(snapshot(), programs=restarted, epoch=7).code is Code.STALE_EPOCH


def test_the_program_in_force_is_acknowledged_again():
    """Its first acknowledgement was lost."""
    assert running(5, 7).judge(program(snapshot(), 5, 7)) is None


def test_another_program_of_the_same_version_is_a_conflict():
    """Two leaders believe to have the same epoch."""
    programs = running(5, 7)
    refused = judged(snapshot(31.0), programs=programs, epoch=5, revision=7)

    assert refused.code is Code.HASH_CONFLICT
    assert programs.applied.version == Version(5, 7)


def test_what_does_not_fit_its_hash_is_not_applied():
    """Something has gone wrong on the way."""
    bad = program(snapshot())
    bad.snapshot += b"\0"
    verdict = Programs(POOL).judge(bad)

    assert (verdict.code, verdict.problems[0][0]) == (Code.INVALID, "sha256")


def test_bytes_that_are_no_snapshot():
    """The hash fits; that does not make them one."""
    assert judged(b"\xff\xff\xff").code is Code.INVALID


def test_a_snapshot_that_is_too_large():
    """Not even read."""
    refused = judged(b"\0" * (MAX_SNAPSHOT_BYTES + 1))

    assert refused.code is Code.TOO_LARGE
    assert str(MAX_SNAPSHOT_BYTES) in refused.problems[0][1]


def test_a_program_of_another_pool():
    """An EPP serves one pool for its whole life; that one's endpoints are not its own."""
    refused = judged(snapshot(pool="default/other", endpoints=["10.0.0.1:8000"]))

    assert (refused.code, refused.problems[0][0]) == (Code.INVALID, "plan.pool")


def test_every_invalid_field_is_named():
    """With its path in the snapshot."""
    made = snapshot()
    made.plan.bands[0].ttl_seconds = -1
    made.plan.bands[1].fairness = "Coin"
    made.endpoints.endpoints.add(address="nowhere")
    refused = judged(made)
    paths = [path for path, _ in refused.problems]

    assert refused.code is Code.INVALID
    assert set(paths) == {
        "plan.bands[0].ttlSeconds",
        "plan.bands[1].fairness",
        "endpoints.endpoints[0].address",
    }


# --- a plan that is refused does not hold up the endpoints


def unknown(where):
    made = snapshot(31.0)
    made.sources.add(kind="FlowControlPolicy")
    where(made).MergeFromString(b"\xf8\x3e\x01")  # field 1007
    return made


def invalid():
    made = snapshot(31.0)
    made.plan.bands[1].fairness = "Coin"
    return made


def large():
    made = snapshot(31.0)
    made.plan.models.add(name="x" * MAX_PLAN_BYTES, band="Standard")
    return made


BAD_PLANS = {
    "unknown in the snapshot": (unknown(lambda s: s), Code.UNSUPPORTED, "field 1007"),
    "unknown in the plan": (unknown(lambda s: s.plan), Code.UNSUPPORTED, "plan.field 1007"),
    "unknown in a band": (
        unknown(lambda s: s.plan.bands[1]),
        Code.UNSUPPORTED,
        "plan.bands[1].field 1007",
    ),
    "unknown in the saturation": (
        unknown(lambda s: s.plan.saturation),
        Code.UNSUPPORTED,
        "plan.saturation.field 1007",
    ),
    "unknown in a source": (
        unknown(lambda s: s.sources[0]),
        Code.UNSUPPORTED,
        "sources[0].field 1007",
    ),
    "unknown value": (invalid(), Code.INVALID, "plan.bands[1].fairness"),
    "too large": (large(), Code.TOO_LARGE, "plan"),
}


@pytest.mark.parametrize("bad", BAD_PLANS)
def test_whatever_becomes_of_the_plan_the_endpoints_are_taken(bad):
    """The plan in force stays, the answer names field and reason, and what was taken."""
    made, code, path = BAD_PLANS[bad]
    made.endpoints.endpoints.add(address="10.0.0.2:8000", uid="pod-2")
    programs = running(5, 7)
    before = programs.applied
    sent = program(made, 5, 8)
    verdict = programs.judge(sent)

    assert isinstance(verdict, Accepted)
    assert (verdict.plan, verdict.endpoints) == (None, (Endpoint("10.0.0.2:8000", "", "pod-2"),))
    assert (verdict.refused.code, [p for p, _ in verdict.refused.problems]) == (code, [path])

    programs.took(verdict)
    nack = programs.nack(sent, verdict.refused, verdict.parts).nack
    assert (nack.code, list(nack.applied)) == (code, ["Endpoints"])
    assert nack.still_running.plan_sha256 == before.plan_sha256
    assert nack.still_running.version.revision == 8


def test_endpoints_that_are_refused_do_not_hold_up_the_plan():
    """No operator sends such; the endpoints in force stay."""
    made = snapshot(31.0, endpoints=["nowhere"])
    verdict = running(5, 7).judge(program(made, 5, 8))

    assert (verdict.plan.no_endpoints_ttl_seconds, verdict.endpoints) == (31.0, None)
    assert (verdict.refused.code, verdict.parts) == (Code.INVALID, ["Plan"])


def test_too_many_endpoints_are_refused():
    """As many as a scrape and a selection can bear are taken."""
    verdict = running().judge(
        program(
            snapshot(endpoints=[f"10.0.{n >> 8}.{n & 255}:1" for n in range(MAX_ENDPOINTS + 1)]), 9
        )
    )

    assert [path for path, _ in verdict.refused.problems] == ["endpoints.endpoints"]


def test_what_an_endpoint_tells_beyond_what_is_known_is_ignored():
    """Endpoints are always taken."""
    made = snapshot(endpoints=["10.0.0.1:8000"])
    made.endpoints.endpoints[0].MergeFromString(b"\xf8\x3e\x01")
    verdict = Programs(POOL).judge(program(made))

    assert (verdict.refused, len(verdict.endpoints)) == (None, 1)


def partly() -> tuple[Programs, pb.Program]:
    """Programs with the endpoints of one in force whose plan was refused."""
    programs = running(5, 7)
    sent = program(invalid(), 5, 8)
    programs.took(programs.judge(sent))
    return programs, sent


def test_old_endpoints_do_not_return():
    """Also when their program is the one whose plan is in force."""
    programs, _ = partly()

    assert judged(snapshot(), programs=programs, epoch=5, revision=7).code is Code.STALE_EPOCH
    assert judged(snapshot(), programs=programs, epoch=5, revision=8).code is Code.HASH_CONFLICT


def test_a_program_of_which_only_a_part_is_in_force_is_judged_again():
    """Its answer may have been lost, and it is not in force."""
    programs, sent = partly()

    assert programs.judge(sent).refused.code is Code.INVALID


def test_a_program_of_which_only_a_part_is_in_force_is_not_what_a_hello_tells():
    """No operator takes it for programmed, one of release 0.1 neither."""
    programs, sent = partly()
    told = programs.applied.message()

    assert told.version == sent.version
    assert told.sha256 == bytes(32)


def test_problems_are_counted_out():
    """An answer is small, whatever the program was."""
    programs = Programs(POOL)
    bad = program(snapshot().SerializeToString() + b"\xf8\x3e\x01" * 100_000)
    refused = programs.judge(bad).refused
    nack = programs.nack(bad, Nacked(refused.code, refused.problems * 100)).nack

    assert len(refused.problems) <= MAX_ERRORS
    assert len(nack.errors) == MAX_ERRORS


def test_endpoints_come_without_a_plan_too():
    """The plan in force stays: the operator holds the policy back."""
    made = snapshot(endpoints=["10.0.0.1:8000"])
    made.ClearField("plan")
    programs = running(5, 7)
    verdict = programs.judge(program(made, 5, 8))

    assert (verdict.plan, len(verdict.endpoints)) == (None, 1)
    assert verdict.applied.plan_sha256 == programs.applied.plan_sha256
    assert verdict.applied.source == "Live"


def test_endpoints_without_any_plan_leave_the_built_in_defaults():
    """And the EPP says so."""
    made = snapshot(endpoints=["10.0.0.1:8000"])
    made.ClearField("plan")
    verdict = Programs(POOL).judge(program(made))

    assert (verdict.applied.source, verdict.applied.plan_sha256) == ("Defaults", b"")


def test_a_quarantined_plan_is_refused_whatever_its_version():
    """The process has crashed under it. Its endpoints are taken, and so is another plan."""
    programs = running(5, 7)
    bad = program(snapshot(31.0, endpoints=["10.0.0.9:1"]), 6, 1)
    plan = snapshot(31.0).plan.SerializeToString(deterministic=True)
    programs.quarantined = frozenset([hashlib.sha256(plan).digest()])
    verdict = programs.judge(bad)

    assert (verdict.refused.code, verdict.parts) == (Code.INTERNAL, ["Endpoints"])
    assert programs.judge(program(snapshot(32.0), 6, 2)).refused is None


def test_a_deleted_pool_keeps_plan_and_endpoints():
    """What waits is still dispatched by them."""
    verdict = running(5, 7).judge(program(pb.Snapshot(deleted=True, pool_uid="uid"), 5, 8))

    assert (verdict.deleted, verdict.plan, verdict.endpoints) == (True, None, None)
    assert verdict.refused is None
    assert verdict.applied.plan_sha256


def test_a_refusal_says_what_runs_on():
    """And the highest epoch that was ever seen, for the leader to heal its own."""
    programs = running(5, 7)
    bad = program(snapshot(31.0), 4, 1, nonce=9)
    nack = programs.nack(bad, programs.judge(bad)).nack

    assert (nack.nonce, nack.code, nack.highest_epoch) == (9, "StaleEpoch", 5)
    assert (nack.still_running.version.epoch, nack.still_running.version.revision) == (5, 7)


SNAPSHOTS = [
    snapshot(30.0),
    snapshot(31.0),
    snapshot(pool="default/other"),
    invalid(),
    pb.Snapshot(deleted=True),
    b"\xff\xff\xff",
    b"\0" * (MAX_SNAPSHOT_BYTES + 1),
]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 4),
            st.integers(0, 4),
            st.integers(0, len(SNAPSHOTS) - 1),
            st.booleans(),  # whether it can be put into force
        ),
        max_size=25,
    )
)
def test_versions_never_decrease_and_every_program_gets_one_answer(steps):
    """Across refusals of all or a part and failures to apply."""
    programs, highest = Programs(POOL), Version(0, 0)
    for number, (epoch, revision, which, applies) in enumerate(steps):
        given_program = program(SNAPSHOTS[which], epoch, revision, nonce=number)
        before = programs.applied
        verdict = programs.judge(given_program)
        if isinstance(verdict, Accepted) and applies:
            programs.took(verdict)
        elif isinstance(verdict, Accepted):
            verdict = Nacked(Code.INTERNAL, (("snapshot", "no"),))
        refused = verdict.refused if isinstance(verdict, Accepted) else verdict
        parts = verdict.parts if isinstance(verdict, Accepted) else []
        answer = (
            programs.nack(given_program, refused, parts)
            if refused
            else programs.ack(given_program, 0.0)
        )

        nonce = answer.nack.nonce if answer.HasField("nack") else answer.ack.nonce
        assert nonce == number
        if programs.applied is not None:
            assert programs.applied.version >= highest
            highest = programs.applied.version
        if answer.HasField("nack"):
            assert bool(answer.nack.applied) == (programs.applied is not before)
            assert programs.applied is before or not programs.applied.whole
        else:
            assert programs.applied.sha256 == answer.ack.sha256
            assert programs.applied.whole
            assert programs.applied.version == Version(epoch, revision)


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b"\xff", "plan"),
        (snapshot(pool="default/other").plan.SerializeToString(), "plan.pool"),
        (pb.Plan(pool=POOL, no_endpoints_ttl_seconds=-1).SerializeToString(), "plan."),
    ],
    ids=["no message", "another pool's", "invalid"],
)
def test_a_plan_from_the_disk_that_is_no_plan_of_this_pool_names_the_field(data, field):
    """Whatever is kept there may be damaged, foreign, or of another release."""
    refused = Programs(POOL).read_plan(data)

    assert (type(refused), refused.code) == (Nacked, Code.INVALID)
    assert [path for path, _ in refused.problems if path.startswith(field)]


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b"\xff", "endpoints"),
        (pb.Endpoints(endpoints=[pb.Endpoint(address="nowhere")]).SerializeToString(), "endpoints"),
    ],
    ids=["no message", "no address"],
)
def test_endpoints_from_the_disk_that_cannot_be_read_name_the_field(data, field):
    """They are not used, and the plan is."""
    refused = Programs(POOL).read_endpoints(data)

    assert (type(refused), refused.code) == (Nacked, Code.INVALID)
    assert refused.problems[0][0].startswith(field)
