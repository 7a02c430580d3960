"""A real EPP process and an operator that sends it anything, or nothing."""

from __future__ import annotations

import hashlib
import os
import signal
from contextlib import suppress

import grpc
import pytest
from control_peers import POOL, Puppet, program, snapshot
from control_plane import EPPProcess, Process
from ext_proc_peer import until
from grpc_health.v1 import health_pb2, health_pb2_grpc

from forebay_control import features
from forebay_control.limits import MAX_PLAN_BYTES, MAX_SNAPSHOT_BYTES
from forebay_control.v1 import control_pb2 as pb
from forebay_epp.adapters.lastgood import CRASHES, FILE

WAIT_SECONDS = 60
UNUSED_PORT = 1  # no process listens on it


@pytest.fixture
def puppet():
    puppet = Puppet()
    yield puppet
    puppet.stop()


@pytest.fixture
def start(tmp_path):
    """Start the EPP, also again; it ends with the test."""
    started: list[EPPProcess] = []

    def begin(port: int, *flags: str) -> EPPProcess:
        for before in started:
            assert not before.running
        started.append(EPPProcess(tmp_path, "epp-0", "chat", port, None, *flags))
        return started[-1]

    yield begin
    for epp in started:
        epp.end()


def healthy(epp: EPPProcess) -> bool:
    """Whether the probe of a kubelet would succeed now."""
    assert epp.running, epp.log[-3000:]
    with grpc.insecure_channel(f"127.0.0.1:{epp.health}") as channel, suppress(grpc.RpcError):
        check = health_pb2_grpc.HealthStub(channel).Check
        answer = check(health_pb2.HealthCheckRequest(), timeout=5)
        return answer.status == health_pb2.HealthCheckResponse.SERVING
    return False


def until_healthy(epp: EPPProcess) -> None:
    until(lambda: healthy(epp), WAIT_SECONDS)


def ended(process: Process) -> int:
    return process.process.wait(WAIT_SECONDS)


def programmed(start, puppet, *snapshots: pb.Snapshot, epoch: int = 5) -> EPPProcess:
    """An EPP that runs these, the last one in force."""
    epp = start(puppet.port)
    puppet.next("hello", seconds=WAIT_SECONDS)
    for revision, made in enumerate(snapshots or (snapshot(),), start=1):
        answer = puppet.answer(program(made, epoch, revision, nonce=revision))
        assert isinstance(answer, pb.Ack), answer
    until_healthy(epp)
    return epp


def test_a_first_program_is_put_into_force(start, puppet):
    """Before it the EPP is unready, after it what runs is what was sent."""
    epp = start(puppet.port)
    hello = puppet.next("hello", seconds=WAIT_SECONDS)
    assert not healthy(epp)
    sent = program(snapshot())
    ack = puppet.answer(sent)

    assert (hello.pool, hello.pod_name, hello.HasField("applied")) == (POOL, "epp-0", False)
    assert (ack.version, ack.sha256) == (sent.version, sent.sha256)
    until_healthy(epp)
    assert epp.version == (5, 1)
    assert epp.program() == ("Live", sent.sha256.hex())


def invalid() -> pb.Snapshot:
    made = snapshot(31.0)
    made.plan.bands[1].fairness = "Coin"
    return made


def unsupported() -> pb.Snapshot:
    made = snapshot(31.0)
    made.plan.bands[0].MergeFromString(b"\xf8\x3e\x01")
    return made


def large() -> pb.Snapshot:
    made = snapshot(31.0)
    made.plan.models.add(name="x" * MAX_PLAN_BYTES, band="Standard")
    return made


def unhashed() -> pb.Program:
    made = program(snapshot(31.0), 6, 1)
    made.sha256 = b"?" * 32
    return made


BAD = {  # those of epoch 6 last: it fences off the others
    "old epoch": (program(snapshot(31.0), 4, 9), "StaleEpoch", "version"),
    "old revision": (program(snapshot(31.0), 5, 0), "StaleEpoch", "version"),
    "other hash": (program(snapshot(31.0), 5, 1), "HashConflict", "sha256"),
    "oversize": (program(b"\0" * (MAX_SNAPSHOT_BYTES + 1), 6, 1), "TooLarge", "snapshot"),
    "wrong hash": (unhashed(), "Invalid", "sha256"),
    "other pool": (program(snapshot(31.0, "default/x"), 6, 1), "Invalid", "plan.pool"),
    "garbage": (program(b"\xff\xff\xff", 6, 1), "Invalid", "snapshot"),
    "nothing": (pb.Program(nonce=1, version=pb.Version(epoch=6)), "Invalid", "sha256"),
}


def test_no_bad_program_changes_what_is_served(start, puppet):
    """T34: each is refused with its path, the one in force stays, and a good one is taken later."""
    epp = programmed(start, puppet)
    before = (epp.version, epp.program(), epp.queues()["bands"])
    for name, (bad, code, path) in BAD.items():
        nack = puppet.answer(bad)
        assert isinstance(nack, pb.Nack), name
        assert (nack.code, nack.errors[0].path, list(nack.applied)) == (code, path, []), name
        assert (nack.still_running.version.epoch, nack.still_running.version.revision) == (5, 1)
        assert (epp.version, epp.program(), epp.queues()["bands"]) == before, name
    assert healthy(epp)
    assert epp.metric("forebay_programs_total", answer="nack") == len(BAD)

    assert isinstance(puppet.answer(program(snapshot(32.0), 7, 1)), pb.Ack)
    assert epp.version == (7, 1)


BAD_PLANS = {
    "invalid": (invalid(), "Invalid", "plan.bands[1].fairness"),
    "unsupported": (unsupported(), "Unsupported", "plan.bands[0].field 1007"),
    "large": (large(), "TooLarge", "plan"),
}


def addresses(epp: EPPProcess) -> list[str]:
    return [endpoint["address"] for endpoint in epp.queues()["endpoints"]]


def test_no_bad_plan_holds_up_endpoints(start, puppet):
    """T34: the last good plan stays, and goes with the newest endpoints, after a restart too."""
    epp = programmed(start, puppet, snapshot(30.0, POOL, "10.0.0.1:8000"))
    good = epp.queues()["bands"]
    for number, (name, (made, code, path)) in enumerate(BAD_PLANS.items(), start=2):
        made.endpoints.endpoints.add(address=f"10.0.0.{number}:8000", uid=f"pod-{number}")
        nack = puppet.answer(program(made, 5, number, nonce=number))
        assert (nack.code, nack.errors[0].path) == (code, path), name
        assert list(nack.applied) == ["Endpoints"], name
        assert addresses(epp) == [f"10.0.0.{number}:8000"], name
        assert epp.queues()["bands"] == good, name
        assert epp.program()[0] == "Live", name
    epp.kill()
    epp = start(puppet.port)
    hello = puppet.next("hello", seconds=WAIT_SECONDS)
    until_healthy(epp)

    assert addresses(epp) == ["10.0.0.4:8000"]
    assert epp.queues()["bands"] == good
    assert (hello.applied.version.revision, hello.applied.sha256) == (4, bytes(32))
    assert set(hello.features) == features.NAMES


def test_an_operator_of_release_0_1_programs_a_new_epp(start, puppet):
    """It sends no uids, takes an Ack by nonce and hash, and knows nothing of features."""
    sent = program(snapshot(30.0, POOL, "10.0.0.1:8000"))
    epp = programmed(start, puppet, snapshot(30.0, POOL, "10.0.0.1:8000"))

    assert epp.program() == ("Live", sent.sha256.hex())
    assert addresses(epp) == ["10.0.0.1:8000"]


# --- a pool that is deleted


def test_an_epp_of_a_deleted_pool_is_unready_until_it_is_created_again(start, puppet):
    """Also over a restart without any operator; what it is sent then brings it back."""
    epp = programmed(start, puppet, snapshot(30.0, POOL, "10.0.0.1:8000"))
    gone = program(pb.Snapshot(deleted=True, pool_uid="uid-1"), 5, 2, nonce=2)
    assert isinstance(puppet.answer(gone), pb.Ack)
    until(lambda: not healthy(epp), WAIT_SECONDS)
    assert addresses(epp) == ["10.0.0.1:8000"]

    epp.kill()
    epp = start(puppet.port)
    hello = puppet.next("hello", seconds=WAIT_SECONDS)
    until(lambda: epp.serving, WAIT_SECONDS)  # the process would, but for the pool
    assert (hello.applied.version.revision, hello.applied.sha256) == (2, gone.sha256)
    assert not healthy(epp)

    again = snapshot(31.0, POOL, "10.0.0.2:8000")
    assert isinstance(puppet.answer(program(again, 5, 3)), pb.Ack)
    until_healthy(epp)
    assert addresses(epp) == ["10.0.0.2:8000"]


def test_a_message_that_is_larger_than_any_may_be_costs_the_stream_only(start, puppet):
    """The EPP dials again and says what it runs."""
    epp = programmed(start, puppet)
    puppet.send(program=program(b"\0" * (5 << 20), 6, 1))
    hello = puppet.next("hello", seconds=WAIT_SECONDS)

    assert (hello.applied.version.epoch, hello.applied.version.revision) == (5, 1)
    assert hello.highest_epoch == 5
    assert healthy(epp)


def test_the_same_program_again_is_acknowledged_again(start, puppet):
    """Its first acknowledgement may have been lost."""
    programmed(start, puppet)
    again = program(snapshot(), 5, 1, nonce=9)

    assert isinstance(puppet.answer(again), pb.Ack)


def test_an_epp_starts_on_its_last_program_without_any_operator(start, puppet):
    """And says so; it serves like that as long as it has to."""
    epp = programmed(start, puppet, snapshot(), snapshot(31.0))
    epp.kill()
    epp = start(UNUSED_PORT)

    until_healthy(epp)
    assert epp.version == (5, 2)
    assert epp.program() == ("File", program(snapshot(31.0)).sha256.hex())
    assert not epp.connected


def test_a_restarted_epp_says_what_it_runs(start, puppet):
    """The operator need not send it again; a lower epoch is refused as before."""
    epp = programmed(start, puppet)
    epp.kill()
    start(puppet.port)
    hello = puppet.next("hello", seconds=WAIT_SECONDS)

    assert (hello.applied.source, hello.applied.version.epoch) == ("File", 5)
    assert puppet.answer(program(snapshot(31.0), 4, 1)).code == "StaleEpoch"


def test_an_epp_that_has_nothing_to_serve_stays_unready(start, puppet):
    """It says so when the bootstrap timeout is over, and is ready as soon as there is a program."""
    epp = start(puppet.port, "--bootstrap-timeout=1s")
    until(lambda: "--bootstrap-timeout" in epp.log, WAIT_SECONDS)
    assert not healthy(epp)
    assert (epp.program()[0], epp.version) == ("Defaults", (0, 0))

    puppet.next("hello", seconds=WAIT_SECONDS)
    puppet.answer(program(snapshot()))
    until_healthy(epp)


def test_an_epp_with_endpoints_but_no_plan_serves_defaults_after_a_while(start, puppet):
    """The operator holds the plan back; the bootstrap timeout is its chance to come."""
    made = snapshot(30.0, POOL, "10.0.0.1:8000")
    made.ClearField("plan")
    epp = start(puppet.port, "--bootstrap-timeout=15s")
    puppet.next("hello", seconds=WAIT_SECONDS)
    ack = puppet.answer(program(made))
    assert (ack.plan_sha256, healthy(epp)) == (b"", False)

    until_healthy(epp)
    assert (epp.program()[0], addresses(epp)) == ("Defaults", ["10.0.0.1:8000"])
    assert "built-in defaults" in epp.log


DAMAGE = {
    "truncated": lambda data: data[: len(data) // 2],
    "bit flip in the body": lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
    "other pool's": lambda data: resigned(data.replace(b"default/chat", b"default/talk")),
    "absurd epoch": lambda data: resigned(data.replace(b'"epoch": 5', b'"epoch": 1%d' % 2**64)),
    "no plan": lambda data: resigned(data.replace(b'"plan": "', b'"plan": "AAAA')),
}


def resigned(data: bytes) -> bytes:
    """The file with a checksum that fits."""
    body = data.partition(b"\n")[2]
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_told_of_and_the_next_source_counts(start, puppet, damage):
    """T35: the EPP starts, is programmed by the operator, and repairs the file."""
    epp = programmed(start, puppet)
    epp.kill()
    file = epp.state / FILE
    damaged = DAMAGE[damage](file.read_bytes())
    assert damaged != file.read_bytes()
    file.write_bytes(damaged)
    epp = start(puppet.port)
    hello = puppet.next("hello", seconds=WAIT_SECONDS)
    assert hello.applied.sha256 in (b"", bytes(32))  # nothing, or not all of any program
    failures = epp.metric("forebay_last_good_failures_total")

    assert isinstance(puppet.answer(program(snapshot(31.0), 5, 2)), pb.Ack)
    until_healthy(epp)
    assert failures == 1
    epp.kill()
    epp = start(UNUSED_PORT)
    until_healthy(epp)
    assert epp.version == (5, 2)


def test_a_file_of_a_future_epoch_is_used_and_tells_the_operator(start, puppet):
    """T35: the operator has lost its Lease; what was in force stays until it has caught up."""
    epp = programmed(start, puppet, epoch=900)
    epp.kill()
    epp = start(puppet.port)
    hello = puppet.next("hello", seconds=WAIT_SECONDS)

    assert (hello.highest_epoch, hello.applied.version.epoch) == (900, 900)
    assert puppet.answer(program(snapshot(31.0), 5, 1)).highest_epoch == 900
    assert isinstance(puppet.answer(program(snapshot(31.0), 901, 1)), pb.Ack)
    assert epp.version == (901, 1)


def test_a_state_folder_that_cannot_be_written_costs_the_warm_start_only(start, puppet, tmp_path):
    """T35: a folder stands in the place of the file, which fails for root too."""
    (tmp_path / "epp-0" / "state" / FILE).mkdir(parents=True)
    epp = programmed(start, puppet)

    assert epp.version == (5, 1)
    assert epp.metric("forebay_last_good_failures_total", reason="unwritable") >= 1


def test_a_disk_that_hangs_costs_the_warm_start_only(start, puppet, tmp_path):
    """Programs are applied and acknowledged, reports go on, and the process ends when told.

    Opening a pipe without a reader hangs as such a disk does.
    """
    (tmp_path / "epp-0" / "state").mkdir(parents=True)
    os.mkfifo(tmp_path / "epp-0" / "state" / f"{FILE}.new")
    epp = programmed(start, puppet, snapshot(), snapshot(31.0))

    assert epp.version == (5, 2)
    assert puppet.next("stats", seconds=WAIT_SECONDS).endpoints == 0
    assert epp.metric("forebay_last_good_failures_total", reason="slow") >= 1
    assert epp.stop(WAIT_SECONDS) == 0


def test_a_plan_under_which_the_epp_crashes_is_set_aside(start, puppet):
    """The one before it is used, with the newest endpoints, and the operator hears why."""
    good, bad = snapshot(30.0, POOL, "10.0.0.1:8000"), snapshot(31.0, POOL, "10.0.0.2:8000")
    epp = programmed(start, puppet, good, bad)
    epp.kill()
    for _ in range(CRASHES - 1):
        epp = start(UNUSED_PORT)
        until_healthy(epp)
        assert epp.version == (5, 2)
        epp.kill()
    epp = start(puppet.port)
    hello = puppet.next("hello", seconds=WAIT_SECONDS)
    until_healthy(epp)
    assert hello.applied.sha256 == bytes(32)
    assert hello.applied.plan_sha256 == plan_sha256(good)
    assert addresses(epp) == ["10.0.0.2:8000"]

    bad.endpoints.endpoints.add(address="10.0.0.3:8000")
    nack = puppet.answer(program(bad, 5, 3))
    assert (nack.code, "crashed" in nack.errors[0].message) == ("Internal", True)
    assert addresses(epp) == ["10.0.0.2:8000", "10.0.0.3:8000"]
    assert isinstance(puppet.answer(program(snapshot(32.0), 5, 4)), pb.Ack)


def plan_sha256(made: pb.Snapshot) -> bytes:
    return hashlib.sha256(made.plan.SerializeToString(deterministic=True)).digest()


def test_restarts_in_order_are_no_crashes(start, puppet):
    """However fast they come."""
    epp = programmed(start, puppet)
    for _ in range(CRASHES + 1):
        assert epp.stop(WAIT_SECONDS) == 0
        epp = start(UNUSED_PORT)
        until_healthy(epp)
        assert epp.version == (5, 1)


# --- the end of a stream


def test_an_epp_that_ends_says_goodbye(start, puppet):
    """The operator does not expect it any more."""
    epp = programmed(start, puppet)
    epp.process.send_signal(signal.SIGTERM)

    assert puppet.next("bye", seconds=WAIT_SECONDS) == pb.Bye()
    assert ended(epp) == 0


def test_an_operator_that_closes_is_dialled_again(start, puppet):
    """After the time it asks for; what is in force stays."""
    epp = programmed(start, puppet)
    puppet.send(close=pb.Close(retry_after_seconds=0.5))

    assert puppet.next("hello", seconds=WAIT_SECONDS).applied.version.epoch == 5
    assert healthy(epp)


def test_an_operator_that_is_gone_is_found_again(start, puppet):
    """On its port, by the same EPP, which serves all the time."""
    epp = programmed(start, puppet)
    puppet.stop()
    until(lambda: not epp.connected, WAIT_SECONDS)
    assert healthy(epp)
    again = Puppet(puppet.port)
    try:
        assert again.next("hello", seconds=WAIT_SECONDS).applied.version.epoch == 5
        until(lambda: epp.connected, WAIT_SECONDS)
        assert "Traceback" not in epp.log
        assert "Task was destroyed" not in epp.log
    finally:
        again.stop()
