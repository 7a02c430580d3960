"""Who leads, in virtual time, over a fake of the Lease API that compares and swaps as the real one.

The real API server is asked in tests/faults.
"""

from __future__ import annotations

import asyncio
import copy
from contextlib import suppress

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from forebay_operator import metrics
from forebay_operator.cluster import election
from forebay_operator.cluster.api import ApiError
from forebay_operator.cluster.election import EPOCH, MAX_EPOCH_AHEAD, Elector

NUMBERS = st.integers(0, 2)
START = 1_000.0  # time of day, small so that epochs are easy to read


class FakeLeases:
    """The API server's Leases: one object, resourceVersions, 409 on a lost race."""

    def __init__(self) -> None:
        self.lease: dict | None = None
        self.version = 0
        self.down = False
        self.hangs = False
        self.asked = 0
        self.lost_answers = 0  # so many writes succeed and say that they have not

    async def get_lease(self, _namespace, _name):
        self.asked += 1
        if self.hangs:
            await asyncio.Event().wait()
        if self.down:
            raise ApiError(0, "connection refused")
        return copy.deepcopy(self.lease)

    async def put_lease(self, _namespace, _name, lease):
        if self.down:
            raise ApiError(0, "connection refused")
        mine = lease["metadata"].get("resourceVersion")
        if (mine is None) != (self.lease is None):
            raise ApiError(422 if mine is None else 409, "conflict")
        if self.lease is not None and mine != self.lease["metadata"]["resourceVersion"]:
            raise ApiError(409, "the object has been modified")
        self.version += 1
        self.lease = copy.deepcopy(lease)
        self.lease["metadata"]["resourceVersion"] = str(self.version)
        if self.lost_answers:
            self.lost_answers -= 1
            raise ApiError(0, "timeout")
        return copy.deepcopy(self.lease)

    @property
    def epoch(self) -> int:
        return int(self.lease["metadata"]["annotations"][EPOCH])

    @property
    def holder(self) -> str:
        return self.lease["spec"]["holderIdentity"]


class Clock:
    """One monotonic clock for all, and the time of day."""

    def __init__(self) -> None:
        self.now = 0.0
        self.step = 0.0  # by which the time of day was set

    def __call__(self) -> float:
        return self.now

    def time_of_day(self) -> float:
        return START + self.now + self.step


class Replica:
    """One operator process as far as the election goes."""

    def __init__(self, leases: FakeLeases, clock: Clock, identity: str) -> None:
        self.told: list[election.Leadership] = []
        self.elector = Elector(
            leases, "default", "l", identity, self.told.append, clock, clock.time_of_day
        )

    def step(self) -> election.Leadership:
        """What `run` does every two seconds."""

        async def once() -> None:
            with suppress(ApiError):
                await self.elector._step()
            self.elector._doubt()

        asyncio.run(once())
        return self.elector.leadership

    def see(self, epoch: int, uid: str = "epp-0", namespace: str = "serving") -> None:
        """Have an EPP claim an epoch."""
        self.elector.see_epoch(epoch, uid, namespace)

    @property
    def epoch(self) -> int | None:
        return self.elector.leadership.epoch

    @property
    def programs(self) -> bool:
        """Whether it believes that it may send programs."""
        return self.epoch is not None and not self.elector.leadership.quiet


@pytest.fixture
def leases():
    return FakeLeases()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def replica(leases, clock):
    return lambda identity: Replica(leases, clock, identity)


def test_the_first_one_leads(replica, leases):
    """There is no Lease yet: it is made."""
    a = replica("a/1")

    assert a.step().epoch == leases.epoch == START
    assert leases.holder == "a/1"


def test_the_second_one_waits_and_knows_who_leads(replica):
    """Its leadership names the holder."""
    a, b = replica("a/1"), replica("b/1")
    a.step()

    assert (b.step().epoch, b.step().holder) == (None, "a/1")


def test_a_leader_renews_under_its_epoch(replica, clock):
    """It is not called: nothing has changed."""
    a, b = replica("a/1"), replica("b/1")
    epoch = a.step().epoch
    for _ in range(30):
        clock.now += 2.0
        assert (a.step().epoch, b.step().epoch) == (epoch, None)

    assert len(a.told) == 1


def test_two_that_come_at_once_do_not_both_lead(leases, replica):
    """The second one's compare-and-swap fails."""
    a, b = replica("a/1"), replica("b/1")

    async def both() -> None:
        await asyncio.gather(a.elector._step(), b.elector._step(), return_exceptions=True)

    asyncio.run(both())
    assert [a.epoch, b.epoch].count(None) == 1
    assert leases.epoch in (a.epoch, b.epoch)


def test_a_lease_that_runs_out_is_taken_with_a_higher_epoch(replica, clock):
    """After 15 s without a change, by the waiting one's own clock."""
    a, b = replica("a/1"), replica("b/1")
    old = a.step().epoch
    b.step()
    clock.now += 15.0
    assert b.step().epoch is None
    clock.now += 0.1
    assert b.step().epoch > old


def test_a_leader_that_was_frozen_steps_down(replica, clock):
    """As after SIGSTOP: it finds another leader when it wakes up."""
    a, b = replica("a/1"), replica("b/1")
    old = a.step().epoch
    b.step()
    clock.now += 30.0
    new = b.step().epoch

    assert a.step() == election.Leadership(holder="b/1")
    assert new > old


def test_a_leader_without_an_api_server_is_quiet_before_its_lease_is_over(leases, replica, clock):
    """And goes on under its epoch when the API server is back and no other has led."""
    a = replica("a/1")
    epoch = a.step().epoch
    leases.down = True
    clock.now += 10.1
    assert (a.step().epoch, a.step().quiet) == (epoch, True)

    leases.down = False
    assert (a.step().epoch, a.step().quiet) == (epoch, False)


def run_until(replica: Replica, claim) -> None:
    """Have the loop of a replica run until something is so."""

    async def run() -> None:
        running = asyncio.create_task(replica.elector.run())
        async with asyncio.timeout(30):
            while not claim():  # noqa: ASYNC110  # in virtual time nothing tells
                await asyncio.sleep(0)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(run())


def test_a_leader_is_quiet_at_its_deadline_although_nobody_answers(leases, replica, clock):
    """A renewal that hangs does not carry leadership past the deadline."""
    a = replica("a/1")
    a.step()
    clock.now += 10.0 - 0.05
    leases.hangs = True

    def quiet() -> bool:
        clock.now += 0.1 if leases.asked else 0.0
        leases.asked = 0
        return a.elector.leadership.quiet

    leases.asked = 0
    run_until(a, quiet)


def test_a_leader_that_was_asleep_is_quiet_before_it_asks_anybody(leases, replica, clock):
    """After a long pause of the process nothing is sent on the word of an old lease."""
    a = replica("a/1")
    a.step()
    clock.now += 30.0
    leases.asked, leases.hangs = 0, True
    run_until(a, lambda: leases.asked > 0)

    assert a.elector.leadership.quiet


@pytest.mark.parametrize("renew_time", ["1970-01-01T00:00:00.0Z", "2100-01-01T00:00:00.0Z"])
def test_other_machines_clocks_do_not_count(leases, replica, clock, renew_time):
    """Only how long we see no renewal."""
    a, b = replica("a/1"), replica("b/1")
    a.step()
    leases.lease["spec"]["renewTime"] = renew_time
    b.step()
    clock.now += 14.0
    assert b.step().holder == "a/1"
    clock.now += 2.0
    assert b.step().holder == "b/1"


def test_a_container_started_again_takes_over_at_once(replica):
    """It knows its predecessor by the pod's uid; the epoch grows all the same."""
    first = replica("pod/boot-1")
    old = first.step().epoch
    second = replica("pod/boot-2")

    assert second.step().epoch > old


def test_a_lease_given_up_is_taken_at_once(replica, leases, clock):
    """And not taken back by the loop of the one that is about to end."""
    a, b = replica("a/1"), replica("b/1")
    a.step()
    asyncio.run(a.elector.release())
    clock.now += 2.0

    assert a.step().epoch is None
    assert leases.holder == ""
    assert b.step().epoch is not None


def test_releasing_waits_for_a_write_that_is_under_way(leases, clock):
    """Which would otherwise take the Lease again behind its back."""
    a = Replica(leases, clock, "a/1")
    a.step()
    go_on = asyncio.Event()
    put = leases.put_lease

    async def slow(*args, **options):
        await go_on.wait()
        return await put(*args, **options)

    async def scenario() -> None:
        leases.put_lease = slow
        step = asyncio.create_task(a.elector._step())
        await asyncio.sleep(0)
        release = asyncio.create_task(a.elector.release())
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.gather(step, release)

    asyncio.run(scenario())
    assert (a.epoch, leases.holder) == (None, "")


def test_who_does_not_lead_has_nothing_to_release(replica, leases):
    """The holder keeps its Lease."""
    a, b = replica("a/1"), replica("b/1")
    a.step()
    b.step()
    asyncio.run(b.elector.release())

    assert leases.holder == "a/1"


def test_a_deleted_lease_is_made_again_with_a_higher_epoch(replica, leases, clock):
    """By the leader once it would have run out, or at once by a later candidate."""
    a = replica("a/1")
    a.step()
    old = a.step().epoch
    leases.lease = None
    a.step()
    clock.now += election.LEASE_SECONDS
    assert a.step().epoch > old

    leases.lease = None
    clock.now += 60.0
    assert replica("b/1").step().epoch > old + 1


def test_a_lease_that_goes_with_everything_else_is_not_left_behind(replica, leases, clock):
    """Neither by the leader, which is quiet when its time is over, nor by who stands by."""
    a, b = replica("a/1"), replica("b/1")
    for each in (a, b, a):
        each.step()
    leases.lease = None
    for _ in range(7):
        a.step()
        b.step()
        clock.now += 2.0

    assert leases.lease is None
    assert not a.programs
    asyncio.run(a.elector.release())
    asyncio.run(b.elector.release())
    assert leases.lease is None


def test_a_restored_backup_does_not_bring_an_old_epoch_back(replica, leases, clock):
    """The leader notices that its Lease is another."""
    a = replica("a/1")
    a.step()
    backup = copy.deepcopy(leases.lease)
    for _ in range(5):
        clock.now += 2.0
        leases.lease["metadata"]["annotations"][EPOCH] = "0"  # each time taken again
        a.step()
    old = a.epoch
    leases.lease = backup

    assert a.step().epoch > old


def test_a_leader_after_a_restored_backup_is_above_all_before(replica, leases, clock):
    """Also one that has never led: the time of day is above every epoch there was."""
    a = replica("a/1")
    a.step()
    backup = copy.deepcopy(leases.lease)
    clock.now += 5_000.0
    highest = replica("b/1").step().epoch or 0
    clock.now += 20.0
    b = replica("b/2")
    b.step()
    clock.now += 20.0
    highest = max(highest, b.step().epoch or 0)
    leases.lease = backup
    c = replica("c/1")
    c.step()
    clock.now += 20.0

    assert c.step().epoch > highest > START


def test_a_clock_that_steps_back_does_not_lower_the_epoch(replica, clock):
    """It grows by one then."""
    a = replica("pod/1")
    old = a.step().epoch
    clock.step = -86_400.0

    assert replica("pod/2").step().epoch == old + 1


def test_a_write_whose_answer_is_lost_is_noticed(replica, leases):
    """It has been written and we do not know: the next step takes a new epoch."""
    a = replica("a/1")
    leases.lost_answers = 1
    assert a.step().epoch is None
    unknown = leases.epoch

    assert a.step().epoch > unknown


def test_an_epoch_that_a_picker_has_seen_is_passed(replica, leases):
    """Pickers would refuse every program otherwise."""
    a = replica("a/1")
    a.step()
    seen = a.epoch + 500
    a.see(seen)

    assert a.step().epoch == leases.epoch == seen + 1


def test_our_own_epoch_in_foreign_hands_is_passed(replica):
    """Two leaders had the same one: an EPP has refused a version of it."""
    a = replica("a/1")
    epoch = a.step().epoch
    a.see(epoch)

    assert a.step().epoch == epoch + 1


@pytest.mark.parametrize("seen", [START + MAX_EPOCH_AHEAD + 1, 2**63, 2**64 - 1])
def test_an_absurd_epoch_is_refused_and_counted(replica, seen):
    """An EPP must not be able to exhaust the counter."""
    a = replica("a/1")
    epoch = a.step().epoch
    before = metrics.REFUSALS.labels("epoch")._value.get()
    a.see(int(seen))

    assert a.step().epoch == epoch
    assert metrics.REFUSALS.labels("epoch")._value.get() == before + 1


def epochs_of_ten_hours(replica, clock, pods: int) -> int:
    """How many epochs are taken while pods of a namespace claim a higher one each minute."""
    a = replica("a/1")
    first = a.step().epoch
    taken = set()
    for number in range(600):
        clock.now += 60.0
        a.see(a.epoch + 1, f"epp-{number % pods}")
        taken.add(a.step().epoch)
    return len(taken - {first})


def test_a_liar_causes_one_new_epoch_in_a_leadership(replica, clock):
    """Each one has every EPP of every pool programmed again."""
    assert epochs_of_ten_hours(replica, clock, pods=1) == 1


def test_a_namespace_with_many_liars_causes_few_new_epochs(replica, clock):
    """Who may create pods has as many as he likes: the interval doubles up to an hour."""
    assert epochs_of_ten_hours(replica, clock, pods=600) < 20


def test_liars_of_a_namespace_do_not_keep_another_from_being_healed(replica, clock):
    """Its first claim counts as ever."""
    a = replica("a/1")
    a.step()
    for number in range(1_000):
        clock.now += 1.0
        a.see(a.epoch + 1, f"liar-{number}", "hostile")
        a.step()
    seen = a.epoch + 1
    a.see(seen, "honest", "serving")

    assert a.step().epoch > seen


def test_a_pod_may_claim_again_when_another_has_led(replica, clock):
    """It may have seen that one's epoch."""
    a, b = replica("a/1"), replica("b/1")
    a.see(a.step().epoch + 5)
    assert a.step().epoch == START + 6
    asyncio.run(a.elector.release())
    clock.now += 60.0
    asyncio.run(b.elector.release())
    a = replica("a/2")
    a.step()
    seen = a.epoch + 5
    a.see(seen)

    assert a.step().epoch == seen + 1


def test_an_epoch_up_to_the_time_of_day_may_be_true(replica, clock):
    """The clock had been set back by a day when this leader took the Lease."""
    clock.step = -86_400.0
    a = replica("a/1")
    a.step()
    clock.step = 0.0
    seen = int(clock.time_of_day())
    a.see(seen)

    assert a.step().epoch > seen


def test_new_epochs_are_ten_seconds_apart(replica, clock):
    """Any claims."""
    a = replica("a/1")
    first = a.step().epoch
    a.see(first + 1, "epp-0", "one")
    healed = a.step().epoch
    a.see(healed + 1, "epp-1", "two")
    clock.now += 9.0
    assert a.step().epoch == healed
    clock.now += 1.0

    assert a.step().epoch > healed


def test_epochs_mean_nothing_to_who_does_not_lead(replica):
    """It has sent nothing that they could be above of."""
    a, b = replica("a/1"), replica("b/1")
    a.step()
    b.step()
    b.see(2**40)

    assert b.step().epoch is None


@pytest.mark.parametrize(
    "lease",
    [
        {"metadata": {"resourceVersion": "0"}},
        {"metadata": {"resourceVersion": "0", "annotations": {EPOCH: "many"}}, "spec": {}},
        {"metadata": {"resourceVersion": "0", "annotations": {EPOCH: "9" * 30}}, "spec": None},
        {"metadata": {"resourceVersion": "0"}, "spec": {"leaseDurationSeconds": "x"}},
    ],
)
def test_a_lease_that_others_wrote_is_taken(replica, leases, lease):
    """Whatever it holds."""
    leases.lease = lease
    a = replica("a/1")

    assert a.step().epoch == START
    asyncio.run(a.elector.release())
    assert leases.holder == ""


class Replicas(RuleBasedStateMachine):
    """Three replicas to which anything may happen."""

    def __init__(self) -> None:
        super().__init__()
        self.leases, self.clock = FakeLeases(), Clock()
        self.boots = [0, 0, 0]
        self.replicas = [Replica(self.leases, self.clock, f"{n}/0") for n in range(3)]
        self.taken: list[int] = []

    @rule(number=NUMBERS)
    def step(self, number):
        self.replicas[number].step()
        for leadership in self.replicas[number].told:
            epoch = leadership.epoch
            if epoch is not None and not leadership.quiet and epoch not in self.taken[-1:]:
                assert epoch > max(self.taken, default=0)
                self.taken.append(epoch)
        self.replicas[number].told.clear()

    @rule(seconds=st.sampled_from([0.1, 2.0, 9.0, 16.0]))
    def wait(self, seconds):
        self.clock.now += seconds

    @rule(number=NUMBERS)
    def restart(self, number):
        self.boots[number] += 1
        identity = f"{number}/{self.boots[number]}"
        self.replicas[number] = Replica(self.leases, self.clock, identity)

    @rule(number=NUMBERS)
    def release(self, number):
        asyncio.run(self.replicas[number].elector.release())

    @rule(down=st.booleans())
    def reach(self, down):
        self.leases.down = down

    @rule()
    def lose_an_answer(self):
        self.leases.lost_answers = 1

    @rule(number=NUMBERS)
    def see(self, number):
        self.replicas[number].see(max(self.taken, default=0))

    @rule(step=st.sampled_from([-86_400.0, -1.0, 0.0, 3_600.0]))
    def set_clock(self, step):
        self.clock.step = step

    @invariant()
    def no_epoch_is_shared(self):
        """Two may believe to lead; EPPs know by the epoch which of them does."""
        epochs = [replica.epoch for replica in self.replicas if replica.epoch is not None]
        assert len(epochs) == len(set(epochs))


TestReplicas = Replicas.TestCase
