"""Who leads, as far as no API server is needed: leases in memory, and a clock that tests set."""

from __future__ import annotations

import asyncio
import copy

import pytest

from forebay_operator import election
from forebay_operator.cluster import ApiError
from forebay_operator.election import EPOCH, Elector, Leadership


class Leases:
    """Stands for the API server, which may not answer."""

    def __init__(self) -> None:
        self.lease = None
        self.hangs = False
        self.asked = asyncio.Event()

    async def get_lease(self, _namespace, _name):
        self.asked.set()
        if self.hangs:
            await asyncio.Event().wait()
        return copy.deepcopy(self.lease)

    async def put_lease(self, _namespace, _name, lease, *, create):
        if create is (self.lease is not None):
            raise ApiError(409, "conflict")
        self.lease = copy.deepcopy(lease)
        return lease

    @property
    def epoch(self) -> int:
        return int(self.lease["metadata"]["annotations"][EPOCH])


class Contest:
    """Electors over one Lease."""

    def __init__(self) -> None:
        self.now = 100.0
        self.leases = Leases()
        self.told: list[Leadership] = []
        self.told_of_change = asyncio.Event()

    def _changed(self, leadership: Leadership) -> None:
        self.told.append(leadership)
        self.told_of_change.set()

    def elector(self, identity: str) -> Elector:
        return Elector(
            self.leases, "default", "lease", identity, self._changed, clock=lambda: self.now
        )

    async def step(self, elector: Elector) -> Leadership:
        """Try once and return how it stands."""
        self.leases.asked.clear()
        running = asyncio.create_task(elector.run())
        await self.leases.asked.wait()
        for _ in range(20):
            await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        return elector.leadership


def contest(story) -> None:
    async def tell() -> None:
        await story(Contest())

    asyncio.run(tell())


def test_a_leader_is_quiet_at_its_deadline_although_the_api_server_does_not_answer():
    """A renewal that hangs does not carry leadership past the deadline."""

    async def story(c: Contest) -> None:
        elector = c.elector("a/1")
        await c.step(elector)
        c.now += election.RENEW_DEADLINE_SECONDS - 0.05
        c.leases.hangs = True
        c.leases.asked.clear()
        c.told_of_change.clear()
        running = asyncio.create_task(elector.run())
        await c.leases.asked.wait()
        c.now += 0.1
        await asyncio.wait_for(c.told_of_change.wait(), 5)
        running.cancel()
        assert elector.leadership == Leadership(epoch=1, quiet=True, holder="a/1")

    contest(story)


def test_a_leader_that_was_asleep_is_quiet_before_it_asks_anybody():
    """After a long pause of the process nothing is sent on the word of an old lease."""

    async def story(c: Contest) -> None:
        elector = c.elector("a/1")
        await c.step(elector)
        c.now += 30
        c.leases.hangs = True
        assert (await c.step(elector)).quiet

    contest(story)


def test_a_lease_that_is_deleted_does_not_set_the_epoch_back():
    """The next epoch is above the leader's own."""

    async def story(c: Contest) -> None:
        elector = c.elector("a/1")
        await c.step(elector)
        c.leases.lease["metadata"]["annotations"][EPOCH] = "7"
        assert (await c.step(elector)).epoch == 8
        c.leases.lease = None
        assert (await c.step(elector)).epoch == c.leases.epoch == 9

    contest(story)


def test_an_epoch_heals_past_what_endpoint_pickers_have_seen():
    """A new leader on a Lease that was lost catches up."""

    async def story(c: Contest) -> None:
        elector = c.elector("a/1")
        assert (await c.step(elector)).epoch == 1
        elector.see_epoch(41)
        assert (await c.step(elector)).epoch == c.leases.epoch == 42

    contest(story)


def test_a_lease_is_taken_over_only_when_it_has_not_changed_for_its_duration():
    """What the other's clock says does not count, only how long we see no renewal."""

    async def story(c: Contest) -> None:
        leader, standby = c.elector("a/1"), c.elector("b/1")
        await c.step(leader)
        for renew_time in ("1970-01-01T00:00:00.0Z", "2100-01-01T00:00:00.0Z"):
            c.leases.lease["spec"]["renewTime"] = renew_time
            assert (await c.step(standby)).holder == "a/1"
            c.now += election.LEASE_SECONDS - 1
            assert (await c.step(standby)).epoch is None
        c.now += 2
        assert (await c.step(standby)).epoch == 2
        assert (await c.step(leader)) == Leadership(holder="b/1")

    contest(story)
