"""What a picker answers to programs: order, fencing, and nothing it does not understand."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_control.v1 import control_pb2 as pb
from forebay_epp.codec.control import (
    MAX_ERRORS,
    MAX_SNAPSHOT_BYTES,
    Accepted,
    Applied,
    Code,
    Programs,
    Refused,
    Version,
)
from forebay_epp.core.terms import Endpoint
from forebay_operator import planning, resources

POOL = "default/chat"
INFERENCE_POOL = resources.parse(
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


def judged(made, *, programs: Programs | None = None, **version) -> Refused:
    verdict = (programs or Programs(POOL)).judge(program(made, **version))
    assert isinstance(verdict, Refused), verdict
    return verdict


def running(epoch=5, revision=7) -> Programs:
    """Programs with one in force."""
    programs = Programs(POOL)
    programs.took(programs.judge(program(snapshot(), epoch, revision)))
    return programs


def test_the_first_program_is_accepted():
    """With its plan and endpoints."""
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


def test_a_plan_of_another_pool():
    """A picker serves one pool for its whole life."""
    refused = judged(snapshot(pool="default/other"))

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


@pytest.mark.parametrize(
    ("where", "path"),
    [
        (lambda s: s, "field 1007"),
        (lambda s: s.plan, "plan.field 1007"),
        (lambda s: s.plan.bands[1], "plan.bands[1].field 1007"),
        (lambda s: s.plan.saturation, "plan.saturation.field 1007"),
        (lambda s: s.endpoints.endpoints[0], "endpoints.endpoints[0].field 1007"),
        (lambda s: s.sources[0], "sources[0].field 1007"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_field_of_a_newer_release_is_not_overlooked(where, path):
    """It may be the one that matters."""
    made = snapshot(endpoints=["10.0.0.1:8000"])
    made.sources.add(kind="FlowControlPolicy")
    where(made).MergeFromString(b"\xf8\x3e\x01")
    refused = judged(made)

    assert (refused.code, [p for p, _ in refused.problems]) == (Code.UNSUPPORTED, [path])


def test_problems_are_counted_out():
    """An answer is small, whatever the program was."""
    programs = Programs(POOL)
    bad = program(snapshot().SerializeToString() + b"\xf8\x3e\x01" * 100_000)
    refused = programs.judge(bad)
    nack = programs.nack(bad, Refused(refused.code, refused.problems * 100)).nack

    assert len(refused.problems) <= MAX_ERRORS
    assert len(nack.errors) == MAX_ERRORS


def test_endpoints_come_without_a_plan_too():
    """The plan in force stays: the operator holds the policy back."""
    made = snapshot(endpoints=["10.0.0.1:8000"])
    made.ClearField("plan")
    verdict = running(5, 7).judge(program(made, 5, 8))

    assert (verdict.plan, len(verdict.endpoints)) == (None, 1)


def test_a_quarantined_program_is_refused_whatever_its_version():
    """The process has crashed under it."""
    programs = running(5, 7)
    bad = program(snapshot(31.0), 6, 1)
    programs.quarantined = frozenset([bad.sha256])

    assert programs.judge(bad).code is Code.INTERNAL
    assert isinstance(programs.judge(program(snapshot(32.0), 6, 2)), Accepted)


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
            st.booleans(),  # whether the process restarts from the disk afterwards
        ),
        max_size=25,
    )
)
def test_versions_never_decrease_and_every_program_gets_one_answer(steps):
    """Across refusals, failures to apply, and restarts."""
    programs, highest = Programs(POOL), Version(0, 0)
    for number, (epoch, revision, which, applies, restarts) in enumerate(steps):
        given_program = program(SNAPSHOTS[which], epoch, revision, nonce=number)
        before = programs.applied
        verdict = programs.judge(given_program)
        if isinstance(verdict, Accepted) and applies:
            programs.took(verdict)
        elif isinstance(verdict, Accepted):
            verdict = Refused(Code.INTERNAL, (("snapshot", "no"),))
        answer = (
            programs.nack(given_program, verdict)
            if isinstance(verdict, Refused)
            else programs.ack(given_program, 0.0)
        )

        nonce = answer.nack.nonce if answer.HasField("nack") else answer.ack.nonce
        assert nonce == number
        if programs.applied is not None:
            assert programs.applied.version >= highest
            highest = programs.applied.version
        if answer.HasField("nack"):
            assert programs.applied is before
        else:
            assert programs.applied.sha256 == answer.ack.sha256
            assert programs.applied.version == Version(epoch, revision)
        if restarts and programs.applied is not None:
            kept = programs.applied
            again = Applied(kept.version, kept.sha256, kept.snapshot, source="File")
            programs = Programs(POOL, None, programs.highest_epoch)
            programs.took(programs.read(again))
