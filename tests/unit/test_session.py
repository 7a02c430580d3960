"""One EPP's control stream in virtual time: what is sent when, and what answers lead to."""

from __future__ import annotations

import math

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from forebay_control.v1 import control_pb2 as pb
from forebay_operator.channel import session as module
from forebay_operator.channel.session import Answer, Desired, Session, UnansweredError

A = Desired(b"a", b"A" * 32, 1, {"policy": 1})
B = Desired(b"b", b"B" * 32, 2, {"policy": 2})


def ack(program: pb.Program) -> pb.Ack:
    return pb.Ack(nonce=program.nonce, version=program.version, sha256=program.sha256)


def nack(program: pb.Program, code: str = "Invalid", highest: int = 0) -> pb.Nack:
    errors = [pb.FieldError(path="plan.bands[0].ttlSeconds", message="must be positive")]
    return pb.Nack(nonce=program.nonce, code=code, errors=errors, highest_epoch=highest)


def programmed(desired: Desired = A, epoch: int = 5) -> Session:
    session = Session(0.0)
    session.on_ack(ack(session.offer(desired, epoch, 0.0)))
    return session


def test_a_new_picker_is_offered_what_is_desired():
    """With a version, its hash, and the bytes as they are."""
    program = Session(0.0).offer(A, 5, 0.0)

    assert (program.version.epoch, program.version.revision) == (5, 1)
    assert (program.sha256, program.snapshot) == (A.sha256, A.snapshot)


def test_what_a_hello_says_to_be_in_force_is_not_sent():
    """In the same epoch; under another leader it must be acknowledged again."""
    applied = pb.Applied(version=pb.Version(epoch=5, revision=1), sha256=A.sha256)

    assert Session(0.0, applied).offer(A, 5, 0.0) is None
    assert Session(0.0, applied).offer(A, 6, 0.0) is not None
    assert Session(0.0, applied).offer(B, 5, 0.0) is not None


def test_sent_is_not_acknowledged():
    """A program that got lost is sent again, under its nonce, after ten seconds."""
    session = Session(0.0)
    first = session.offer(A, 5, 0.0)

    assert session.offer(A, 5, 9.9) is None
    assert session.offer(A, 5, 10.0) == first


def test_a_program_unanswered_three_times_ends_the_stream():
    """The EPP dials again, or is stale."""
    session = Session(0.0)
    sent = [session.offer(A, 5, now) for now in (0.0, 10.0, 20.0)]

    assert all(sent)
    with pytest.raises(UnansweredError):
        session.offer(A, 5, 30.0)


def test_one_program_is_under_way_and_the_newest_comes_next():
    """What has been superseded meanwhile is never sent."""
    session = Session(0.0)
    first = session.offer(A, 5, 0.0)
    newest = Desired(b"c", b"C" * 32, 3)

    assert session.offer(B, 5, 1.0) is None
    session.on_ack(ack(first))
    assert session.offer(newest, 5, 2.0).snapshot == b"c"


def test_going_back_to_what_is_in_force_sends_it_anew():
    """While the other is under way it is unknown whether it will be in force."""
    session = programmed()
    other = session.offer(B, 5, 1.0)
    back = Desired(A.snapshot, A.sha256, 3)

    session.on_ack(ack(other))
    assert session.offer(back, 5, 2.0).version.revision == 3


def test_an_acknowledged_program_is_not_sent_again():
    """The comparison is with what was acknowledged."""
    session = Session(0.0)
    program = session.offer(A, 5, 0.0)

    assert session.on_ack(ack(program)) is A
    assert session.offer(A, 5, 1000.0) is None
    assert session.offer_at(1.0) == math.inf


@pytest.mark.parametrize(
    "wrong",
    [pb.Ack(nonce=7, sha256=A.sha256), pb.Ack(nonce=1, sha256=B.sha256), pb.Ack()],
    ids=["nonce", "hash", "empty"],
)
def test_an_ack_of_something_else_means_nothing(wrong):
    """The program stays under way."""
    session = Session(0.0)
    session.offer(A, 5, 0.0)

    assert session.on_ack(wrong) is None
    assert session.offer(A, 5, 10.0) is not None


def test_an_answer_that_comes_twice_counts_once():
    """A resend is answered too."""
    session = Session(0.0)
    program = session.offer(A, 5, 0.0)

    assert session.on_ack(ack(program)) is A
    assert session.on_ack(ack(program)) is None
    assert session.on_nack(nack(program), 1.0) is Answer.UNKNOWN


def test_a_refused_program_is_tried_again_ever_more_slowly():
    """After 5 s, then twice as long each time, at most 5 minutes."""
    session, now, waits = Session(0.0), 0.0, []
    for _ in range(9):
        session.on_nack(nack(session.offer(A, 5, now)), now)
        at = session.offer_at(now)
        assert session.offer(A, 5, at - 0.001) is None
        waits.append(at - now)
        now = at

    assert waits == [5, 10, 20, 40, 80, 160, 300, 300, 300]


def test_a_refusal_says_where_and_why():
    """For the status: the code, then the paths."""
    session = Session(0.0)

    assert session.on_nack(nack(session.offer(A, 5, 0.0)), 0.0) is Answer.NACK
    assert session.error == "Invalid: plan.bands[0].ttlSeconds: must be positive"
    assert session.nacked == A.sha256


def test_a_changed_program_is_sent_at_once_after_a_refusal():
    """And its refusals count from one again."""
    session = Session(0.0)
    for now in (0.0, 5.0, 15.0):
        session.on_nack(nack(session.offer(A, 5, now)), now)

    session.desired_changed()
    session.on_nack(nack(session.offer(B, 5, 16.0)), 16.0)
    assert session.offer_at(16.0) == 21.0


def test_an_ack_clears_the_refusal():
    """Nothing of it is left for the status."""
    session = Session(0.0)
    session.on_nack(nack(session.offer(A, 5, 0.0)), 0.0)
    session.on_ack(ack(session.offer(B, 5, 1.0)))

    assert (session.nacked, session.error) == (b"", "")


@pytest.mark.parametrize("code", ["StaleEpoch", "HashConflict"])
def test_a_version_refused_is_replaced_once_the_epoch_is_healed(code):
    """At once, since the program itself was not at fault."""
    session = Session(0.0)

    assert session.on_nack(nack(session.offer(A, 5, 0.0), code), 0.0) is Answer.STALE
    assert session.offer(A, 5, 1.0) is None
    session.epoch_changed()
    assert session.offer(A, 9, 1.0).version.epoch == 9


def test_a_picker_that_refuses_every_version_is_not_flooded():
    """Each healed epoch would otherwise bring the next refusal at once."""
    session = Session(0.0)
    session.on_nack(nack(session.offer(A, 5, 0.0), "StaleEpoch"), 0.0)
    session.epoch_changed()
    session.on_nack(nack(session.offer(A, 6, 0.0), "StaleEpoch"), 0.0)
    session.epoch_changed()

    assert session.offer(A, 7, 0.0) is None
    assert session.offer_at(0.0) == 10.0


def test_a_refusal_of_the_program_is_not_healed_by_an_epoch():
    """Its content is what was refused."""
    session = Session(0.0)
    session.on_nack(nack(session.offer(A, 5, 0.0)), 0.0)
    session.epoch_changed()

    assert session.offer(A, 6, 1.0) is None


def test_what_a_picker_writes_cannot_steer_a_terminal():
    """Nor fill a status."""
    session = Session(0.0)
    errors = [pb.FieldError(path="p" * 9999, message="\x1b[2J" * 9999)] * 99
    program = session.offer(A, 5, 0.0)
    session.on_nack(pb.Nack(nonce=program.nonce, code="x" * 999, errors=errors), 0.0)

    assert session.error.isprintable()
    assert len(session.error) < 5000


def test_a_flood_is_noticed_and_steady_reports_are_not():
    """50 messages a second may come indefinitely, 250 at once."""
    steady, flood = Session(0.0), Session(0.0)

    assert all(steady.heard(number / 50) for number in range(5000))
    assert [flood.heard(0.0) for _ in range(251)].index(False) == 250


def test_one_report_a_second_is_kept():
    """However many come."""
    session = Session(0.0)
    kept = [session.on_stats(pb.Stats(), number / 1000) is not None for number in range(3000)]

    assert sum(kept) == 3


def test_reports_are_cut_to_what_a_status_can_hold():
    """Numbers an API server takes, 64 bands, nothing hidden in unknown fields."""
    bands = [
        pb.BandStats(band=f"b{number}", bytes=2**64 - 1, oldest_seconds=math.nan)
        for number in range(100)
    ]
    shadow = [
        pb.ShadowStats(band=f"b{number}", overtaken=2**64 - 1, waited_seconds=math.nan)
        for number in range(100)
    ]
    stats = pb.Stats(saturation=math.inf, bands=bands, shadow=shadow)
    stats.MergeFromString(b"\xfa\x3e\x80\x08" + b"x" * 1024)  # field 1007

    kept = Session(0.0).on_stats(stats, 0.0)

    assert (kept.saturation, len(kept.bands)) == (0.0, 64)
    assert (kept.bands[0].bytes, kept.bands[0].oldest_seconds) == (module.MAX_COUNT, 0.0)
    assert len(kept.shadow) == 64
    assert kept.shadow[0].overtaken == module.MAX_COUNT
    assert kept.shadow[0].waited_seconds == 0.0
    assert b"x" * 1024 not in kept.SerializeToString()


def test_a_band_whose_name_no_status_may_hold_is_not_kept():
    """The API server would refuse the numbers of all EPPs with it, each time."""
    names = ["b" * 63, "b" * 64, "", "Standard", "Standard", "a\nb", "x" * 253]
    stats = pb.Stats(bands=[pb.BandStats(band=name) for name in names])

    kept = Session(0.0).on_stats(stats, 0.0)

    assert [band.band for band in kept.bands] == ["b" * 63, "Standard"]


def test_a_program_of_which_a_part_was_taken_replaces_what_was_acknowledged():
    """Going back to that one sends it again, for its endpoints are not in force any more."""
    session = programmed()
    refused = nack(session.offer(B, 5, 1.0))
    refused.applied.append("Endpoints")
    assert session.on_nack(refused, 1.0) is Answer.NACK

    back = Desired(A.snapshot, A.sha256, 3)
    assert session.offer(back, 5, 2.0).version.revision == 3


class Stream(RuleBasedStateMachine):
    """A stream on which anything may happen, and which ends when it is not answered."""

    def __init__(self) -> None:
        super().__init__()
        self.session, self.now, self.epoch = Session(0.0), 0.0, 1
        self.desired, self.revision = Desired(b"0", b"0" * 32, 1), 1
        self.under_way: pb.Program | None = None
        self.versions: list[tuple[int, int]] = []
        self.ended = False

    @rule(number=st.integers(0, 3))
    def want(self, number):
        self.revision += 1
        self.desired = Desired(b"%d" % number, b"%d" % number * 32, self.revision)
        self.session.desired_changed()

    @rule(seconds=st.sampled_from([0.5, 4.0, 10.0, 400.0]))
    def wait(self, seconds):
        self.now += seconds

    @rule(by=st.integers(1, 3))
    def lead(self, by):
        self.epoch += by
        self.session.epoch_changed()

    @precondition(lambda self: self.under_way is not None)
    @rule()
    def ack(self):
        assert self.session.on_ack(ack(self.under_way)) is not None
        self.under_way = None

    @precondition(lambda self: self.under_way is not None)
    @rule(code=st.sampled_from(["Invalid", "StaleEpoch", "HashConflict", ""]))
    def nack(self, code):
        self.session.on_nack(nack(self.under_way, code), self.now)
        self.under_way = None

    @precondition(lambda self: not self.ended)
    @rule()
    def offer(self):
        try:
            program = self.session.offer(self.desired, self.epoch, self.now)
        except UnansweredError:
            self.ended = True
            return
        if program is not None:
            assert self.under_way in (None, program)
            self.under_way = program
            self.versions.append((program.version.epoch, program.version.revision))

    @invariant()
    def versions_never_decrease(self):
        assert self.versions == sorted(self.versions)

    def teardown(self):
        """An EPP that answers from now on ends up with what is desired."""
        self.now += 300.0
        for _ in range(2):  # the one that is under way, then the one that is desired
            if not self.ended:
                self.offer()
            if self.under_way is not None:
                self.ack()
        assert self.ended or self.session.offer(self.desired, self.epoch, self.now) is None


TestStream = Stream.TestCase
