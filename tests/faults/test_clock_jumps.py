"""Wall clocks that jump by an hour or a day: nothing that counts time may look at them.

Fault T36 of the fault list; what it says of certificates is a matter of their tests.
"""

from __future__ import annotations

import datetime as dt
import json
from typing import TYPE_CHECKING

import pytest
from control_driver import Driver
from control_plane import EPPProcess, FolderOperator, check_log, check_versions, policy, pool
from ext_proc_peer import until
from ext_proc_queue import Waiting
from manifest_reading import resource_of
from ports import free_port
from wall_clock import WallClock

from forebay_operator import planning

if TYPE_CHECKING:
    from forebay_control.v1 import control_pb2 as pb

WAIT_SECONDS = 60
# The other replica's clock jumps the other way. An API server's first certificate is not valid in
# the past, so the operator has to be in the future when it needs new connections.
JUMPS = (("-1h", "+1h"), ("-1d", "+1d"), ("+1h", "-1h"), ("+1d", "-1d"))
HOURS = {"-1h": -1, "+1h": 1, "-1d": -24, "+1d": 24, "+0": 0}


def shows(offset: str, text: str) -> bool:
    """Whether a timestamp is one of a clock with this offset."""
    ahead = dt.datetime.fromisoformat(text) - dt.datetime.now(dt.UTC)
    return abs(ahead.total_seconds() / 3600 - HOURS[offset]) < 0.5


def renewed(stage) -> str:
    return stage.lease()["spec"]["renewTime"]


def test_an_operator_keeps_its_lease_when_clocks_jump(stage):
    """Leader and standby: leadership and epoch stay, EPPs stay programmed."""
    ports = [free_port(), free_port()]
    clocks = [WallClock(stage.folder / f"clock-{number}") for number in range(2)]
    leader = stage.operator("operator-0", control_port=ports[0], env=clocks[0].env)
    stage.edit(0)
    until(lambda: leader.epoch > 0, WAIT_SECONDS)
    standby = stage.operator("operator-1", control_port=ports[1], env=clocks[1].env)
    epps = stage.epps(2, ports[0])
    until(lambda: stage.settled(epps), WAIT_SECONDS)
    before = stage.lease()["spec"]
    version = epps[0].version
    for mine, others in JUMPS:
        clocks[0].jump(mine)
        clocks[1].jump(others)
        renew_thrice(stage, mine)
        assert (leader.epoch, standby.epoch) == (version[0], 0)
    assert {epp.version for epp in epps} == {version}
    stage.edit(1)
    until(lambda: stage.settled(epps), WAIT_SECONDS)
    after = stage.lease()["spec"]
    for field in ("holderIdentity", "leaseTransitions", "acquireTime"):
        assert after.get(field) == before.get(field)
    assert epps[0].version[0] == version[0]
    check_versions(*epps)
    for process in (leader, standby, *epps):
        check_log(process.log)


def renew_thrice(stage, offset: str) -> None:
    """Wait until the leader sees the jump and goes on renewing."""
    until(lambda: shows(offset, renewed(stage)), WAIT_SECONDS)
    for _ in range(2):
        last = renewed(stage)
        until(lambda last=last: renewed(stage) != last, WAIT_SECONDS)


@pytest.fixture
def driver():
    driver = Driver()
    yield driver
    driver.stop()


POOL = "default/chat"
TTL_SECONDS = 8


def snapshot(number: int) -> pb.Snapshot:
    """A plan without endpoints; the number only makes a difference."""
    chat = policy(
        "chat",
        "chat",
        bands=[{"name": "Standard", "queue": {"ttl": f"{TTL_SECONDS}s"}}],
        noEndpoints={"ttl": f"{TTL_SECONDS}s"},
        limits={"maxRequests": 1000 + number},
    )
    found = [resource_of(manifest) for manifest in (pool("chat"), chat)]
    return planning.plan(found[0], found).snapshot


def test_requests_that_wait_have_their_whole_ttl_when_the_clock_jumps(driver, tmp_path):
    """100 wait while the EPP's clock jumps: each is evicted after its TTL."""
    clock = WallClock(tmp_path / "clock")
    epp = EPPProcess(tmp_path, "epp-0", "chat", driver.port, env=clock.env)
    try:
        driver.put(POOL, snapshot(0))
        until(lambda: epp.serving, WAIT_SECONDS)
        with Waiting(driver.thread, epp.grpc) as waiting:
            for number in range(100):
                waiting.enqueue(number)
            for jump, (offset, _) in enumerate(JUMPS):
                clock.jump(offset)
                number = 0

                def seen(jump=jump, offset=offset) -> bool:
                    nonlocal number
                    number += 1
                    driver.put(POOL, snapshot(1000 * (jump + 1) + number))
                    return shows(offset, json.loads(epp.log.splitlines()[-1])["ts"])

                until(seen, WAIT_SECONDS)
            assert waiting.serve_all() == []
        until(epp.idle)
        assert epp.version[0] == 1
        assert epp.connected
    finally:
        epp.end()
    assert len(waiting.refused) == 100
    for outcome, seconds in waiting.refused.values():
        assert outcome == "EvictedNoEndpoints"
        assert TTL_SECONDS <= seconds < 4 * TTL_SECONDS
    check_versions(epp)
    check_log(epp.log)


def test_an_operator_of_a_folder_programs_epps_after_its_clock_was_set_back(tmp_path):
    """Its epoch comes from the wall clock, and is above what EPPs have seen all the same."""
    clock = WallClock(tmp_path / "clock")
    manifests = tmp_path / "manifests"
    manifests.mkdir()

    def write(number: int) -> None:
        chat = policy("chat", "chat", limits={"maxRequests": 1000 + number})
        text = json.dumps({"kind": "List", "items": [pool("chat"), chat]})
        (manifests / "all.yaml").write_text(text)

    write(0)
    port = free_port()
    operator = FolderOperator(tmp_path, port, manifests=manifests, env=clock.env)
    epp = EPPProcess(tmp_path, "epp-0", "chat", port)
    try:
        until(lambda: epp.version not in (None, (0, 0)), WAIT_SECONDS)
        before, first = epp.version, epp.program()
        operator.kill()
        clock.jump("-1d")
        write(1)
        operator = FolderOperator(tmp_path, port, manifests=manifests, env=clock.env)
        until(lambda: epp.version > before and epp.program() != first, WAIT_SECONDS)
    finally:
        operator.end()
        epp.end()
    check_versions(epp)
    check_log(operator.log)
