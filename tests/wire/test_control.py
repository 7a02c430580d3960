"""The operator's control server over real gRPC, with EPPs that do not behave.

Hostile ones are one at a time here; floods, and what they cost, are in test_control_flood.py.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from control_driver import WAIT_SECONDS, Driver
from control_peers import POOL, Peer, snapshot
from ext_proc_peer import until

from forebay_control.features import NAMES
from forebay_control.v1 import control_pb2 as pb
from forebay_operator import metrics
from forebay_operator.channel import admission, server, session, stream
from forebay_operator.channel.admission import RefusedError
from forebay_operator.status.observed import EPPState


@pytest.fixture
def driver():
    driver = Driver(epoch=5)
    yield driver
    driver.stop()


@pytest.fixture
def dial(driver):
    """Dial the driver; all streams end with the test."""
    peers: list[Peer] = []

    def begin(**options) -> Peer:
        peers.append(Peer(driver.port, **options))
        return peers[-1]

    yield begin
    for peer in peers:
        peer.close()


def refusals(reason: str) -> float:
    return metrics.REFUSALS.labels(reason)._value.get()


def streams(driver: Driver, pool: str = POOL) -> int:
    return driver.ask(lambda server: len(server._streams.get(pool, ())))


def open_streams(driver: Driver) -> int:
    return driver.ask(lambda server: server._open)


def test_an_epp_is_programmed_and_its_ack_counts(driver, dial):
    """Hello, Program, Ack."""
    driver.program(POOL, snapshot())
    peer = dial().hello()
    program = peer.program()
    assert not driver.programmed(POOL)

    peer.ack(program)
    until(lambda: driver.programmed(POOL))
    assert (program.version.epoch, program.version.revision) == (5, 1)


def test_a_change_reaches_every_epp_of_its_pool_and_no_other(driver, dial):
    """The other's stream stays silent but for pings."""
    mine, others = dial().hello(), dial().hello(pool="default/other")
    mine.next("ping")
    others.next("ping")
    driver.program(POOL, snapshot())
    driver.program("default/other", snapshot(31.0, "default/other"))

    assert mine.program().snapshot == snapshot().SerializeToString(deterministic=True)
    assert others.program().version.revision == 2


def test_an_epp_that_is_programmed_hears_that_it_is_connected(driver, dial):
    """It need not wait for the first change to know that the operator is there."""
    driver.program(POOL, snapshot())
    peer = dial().hello()
    sent = peer.program()
    peer.ack(sent)
    until(lambda: driver.programmed(POOL))
    applied = pb.Applied(version=sent.version, sha256=sent.sha256, source="Live")

    again = dial().hello(applied=applied, highest_epoch=5)
    assert again.next("ping", "program") == pb.Ping()


def known(peer_program: pb.Program) -> pb.Snapshot:
    return pb.Snapshot.FromString(peer_program.snapshot)


def test_each_epp_is_sent_what_its_release_knows(driver, dial):
    """One of 0.1 names no features and gets no pod uids; each acknowledges its own program."""
    made = snapshot(30.0, POOL, "10.0.0.1:8000")
    made.endpoints.endpoints[0].uid = "pod-1"
    driver.program(POOL, made)
    old, new = dial().hello(), dial().hello(pod_uid="uid-1", features=[*NAMES, "FromTheFuture"])
    programs = old.program(), new.program()

    assert [known(sent).endpoints.endpoints[0].uid for sent in programs] == ["", "pod-1"]
    assert known(programs[0]).plan == known(programs[1]).plan == made.plan
    old.ack(programs[0])
    new.ack(programs[1])
    expected = {"uid-0": "epp-0", "uid-1": "epp-1"}
    until(
        lambda: (
            [p.state for p in driver.ask(lambda server: server.epps(POOL, expected))]
            == [EPPState.PROGRAMMED] * 2
        )
    )


def test_only_those_that_know_it_are_told_that_the_pool_is_deleted(driver, dial):
    """To one of release 0.1 the message would be the end of its endpoints."""
    driver.program(POOL, snapshot())
    old, new = dial().hello(), dial().hello(pod_uid="uid-1", features=NAMES)
    for peer in (old, new):
        peer.ack(peer.program())
    driver.program(POOL, pb.Snapshot(deleted=True))
    assert known(new.program()).deleted

    driver.program(POOL, snapshot(31.0))
    assert known(old.program()) == snapshot(31.0)


def test_a_part_that_was_taken_is_told(driver, dial):
    """The EPP refuses the plan and takes the endpoints; the next program is sent at once."""
    driver.program(POOL, snapshot())
    peer = dial().hello(features=NAMES)
    peer.ack(peer.program())
    driver.program(POOL, snapshot(31.0))
    sent = peer.program()
    peer.send(nack=pb.Nack(nonce=sent.nonce, code="Invalid", applied=["Endpoints"]))
    until(lambda: driver.epps(POOL)[0].state is EPPState.REJECTED)

    driver.program(POOL, snapshot())  # what it had acknowledged, but does not run as a whole
    assert known(peer.program()) == snapshot()


def test_a_nack_shows_with_its_paths(driver, dial):
    """The state is for people."""
    driver.program(POOL, snapshot())
    peer = dial().hello()
    sent = peer.program()
    errors = [pb.FieldError(path="plan.bands[0].fairness", message="is not known")]
    peer.send(nack=pb.Nack(nonce=sent.nonce, code="Unsupported", errors=errors))

    until(lambda: driver.epps(POOL)[0].state is EPPState.REJECTED)
    assert driver.epps(POOL)[0].error == "Unsupported: plan.bands[0].fairness: is not known"


@pytest.mark.parametrize("code", ["StaleEpoch", "HashConflict"])
def test_two_leaders_of_one_epoch_are_healed(driver, dial, code):
    """An EPP has the same epoch from another leader: the next one is taken, and sent at once."""
    driver.program(POOL, snapshot())
    peer = dial().hello(highest_epoch=5)
    sent = peer.program()
    peer.send(nack=pb.Nack(nonce=sent.nonce, code=code, highest_epoch=5))

    assert peer.program().version.epoch == 6


def test_an_epoch_in_a_hello_is_passed(driver, dial):
    """Before the first program is sent."""
    driver.program(POOL, snapshot())

    assert dial().hello(highest_epoch=41).program().version.epoch == 42


def test_a_stand_by_sends_epps_on(driver, dial):
    """Those that dial, and those that are there when leadership is lost."""
    there = dial().hello()
    there.next("ping")
    driver.ask(lambda server: server.lead(None, hint="operator-1"))

    assert there.next("not_leader").hint == "operator-1"
    assert dial().hello().next("not_leader").hint == "operator-1"
    assert there.ended()[0] is grpc.StatusCode.OK


def test_a_leader_in_doubt_keeps_streams_and_programs_nobody(driver, dial):
    """And does not turn in circles over a program whose answer is due."""
    driver.program(POOL, snapshot())
    peer = dial().hello()
    peer.program()
    driver.ask(lambda server: server.lead(5, quiet=True))
    driver.program(POOL, snapshot(31.0))

    def age(server):  # as if the answer had been due for long
        [stream] = server._streams[POOL]
        stream.session._sent_at -= 1000.0
        stream.wake.set()

    driver.ask(age)
    woken = wakes(driver, 0.5)
    assert (streams(driver), driver.epps(POOL)[0].state) == (1, EPPState.PENDING)
    assert woken < 10
    driver.ask(lambda server: server.lead(5))
    assert peer.program().version.revision == 1


def wakes(driver: Driver, seconds: float) -> int:
    """Count how often the loop of a stream goes round."""
    rounds = 0

    def count(server):
        offer = server._offer

        def counted(*arguments):
            nonlocal rounds
            rounds += 1
            return offer(*arguments)

        server._offer = counted

    driver.ask(count)
    end = time.monotonic() + seconds
    until(lambda: time.monotonic() > end, WAIT_SECONDS)
    driver.ask(lambda server: server.__dict__.pop("_offer"))
    return rounds


def test_leadership_lost_while_somebody_is_asked_who_it_is():
    """The stream is not admitted to a replica that does not lead any more."""
    asked, answer = asyncio.Event(), asyncio.Event()

    async def slow(hello, _caller):
        asked.set()
        await answer.wait()
        return hello.pod_uid

    driver = Driver(5, slow)
    peer = Peer(driver.port).hello()
    try:
        until(lambda: driver.ask(lambda _: asked.is_set()))
        driver.ask(lambda server: server.lead(None))
        driver.ask(lambda _: answer.set())

        assert peer.next("not_leader") == pb.NotLeader()
        assert peer.ended()[0] is grpc.StatusCode.OK
        assert streams(driver) == 0
    finally:
        peer.close()
        driver.stop()


def test_a_stop_asks_epps_to_dial_again(driver, dial):
    """At moments of their own within three seconds."""
    peers = [dial().hello(pod_uid=f"uid-{n}") for n in range(5)]
    for peer in peers:
        peer.next("ping")
    with ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(driver.thread.do, driver.server.stop())
        waits = [peer.next("close").retry_after_seconds for peer in peers]
        stopping.result(WAIT_SECONDS)

    assert all(0 <= wait <= 3 for wait in waits)
    assert len(set(waits)) == 5


def test_streams_that_a_stop_cuts_off_leave_no_traceback(caplog):
    """Those that have not ended by themselves half a second later."""
    for _ in range(5):
        driver = Driver(epoch=5)
        peers = [Peer(driver.port).hello(pod_uid=f"uid-{n}") for n in range(20)]
        for peer in peers:
            peer.next("ping")
            for _ in range(200):
                peer.send(ping=pb.Ping())
        driver.thread.do(driver.server._server.stop(0))
        driver.stop()
        for peer in peers:
            peer.close()

    assert "control stream failed" not in caplog.text


def test_bye_is_the_end_of_a_stream(driver, dial):
    """The EPP is not connected any more."""
    peer = dial().hello()
    peer.next("ping")
    peer.send(bye=pb.Bye())

    assert peer.ended()[0] is grpc.StatusCode.OK
    assert driver.ask(lambda server: server.connected(POOL)) == {}


def test_a_pod_has_two_streams_at_most(driver, dial):
    """The oldest gives way: the EPP has dialled again and its end is not seen here yet."""
    peers = []
    for _ in range(5):
        peers.append(dial().hello())
        peers[-1].next("ping")
    for peer in peers[:3]:
        peer.ended()

    until(lambda: streams(driver) == 2)
    assert refusals("replaced") >= 3


def test_nothing_is_left_of_a_stream_that_ends(driver, dial):
    """However it ends, and for unknown pools."""
    for number in range(20):
        peer = dial().hello(pool=f"default/pool-{number}", pod_uid=f"uid-{number}")
        peer.next("ping")
        peer.send(stats=pb.Stats(saturation=1.0))
        [peer.call.cancel, peer.close, lambda peer=peer: peer.send(bye=pb.Bye())][number % 3]()

    until(lambda: open_streams(driver) == 0)
    assert driver.ask(lambda server: (dict(server._streams), dict(server._rollouts))) == ({}, {})
    assert not [s for f in metrics.STREAMS.collect() for s in f.samples]


def test_what_is_known_of_a_forgotten_pool_ends_with_its_streams(driver, dial):
    """Pools come and go for months."""
    driver.program(POOL, snapshot())
    peer = dial().hello()
    peer.ack(peer.program())
    until(lambda: driver.programmed(POOL))
    driver.ask(lambda server: server.forget(POOL))
    peer.close()

    until(lambda: open_streams(driver) == 0)
    assert driver.ask(lambda server: dict(server._rollouts)) == {}


def test_a_pool_made_again_programs_epps_that_stayed(driver, dial):
    """With a version that is greater than any before."""
    driver.program(POOL, snapshot())
    peer = dial().hello()
    peer.ack(peer.program())
    until(lambda: driver.programmed(POOL))
    driver.ask(lambda server: server.forget(POOL))
    driver.program(POOL, snapshot(31.0))

    again = peer.program()
    assert again.version.revision == 2
    peer.ack(again)
    until(lambda: driver.programmed(POOL))


# --- what does not behave


@pytest.mark.parametrize(
    ("first", "reason", "says"),
    [
        (b"\xff\xff\xff", "protocol", "not a message"),
        (b"", "protocol", "must be Hello"),
        (pb.FromPicker(ping=pb.Ping()), "protocol", "must be Hello"),
        (pb.FromPicker(hello=pb.Hello(protocol=2)), "protocol", "neighbouring releases"),
        (pb.FromPicker(hello=pb.Hello(protocol=1, pool="p" * 254)), "protocol", "hello.pool"),
        (
            pb.FromPicker(hello=pb.Hello(protocol=1, applied=pb.Applied(sha256=b"x" * 100_000))),
            "protocol",
            "hello.applied.sha256",
        ),
    ],
    ids=["garbage", "nothing", "no hello", "other protocol", "long name", "long hash"],
)
def test_a_first_message_that_is_no_hello(dial, caplog, first, reason, says):
    """Is refused with a reason, and leaves no traceback."""
    before = refusals(reason)
    peer = dial()
    peer.send_bytes(first if isinstance(first, bytes) else first.SerializeToString())
    code, details = peer.ended()

    assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)
    assert says in details
    assert refusals(reason) == before + 1
    assert "Traceback" not in caplog.text


def test_garbage_after_the_hello_ends_its_stream(driver, dial, caplog):
    """With a reason, and without a traceback."""
    peer = dial().hello()
    peer.next("ping")
    peer.send_bytes(b"\xff\xff\xff")

    assert peer.ended()[0] is grpc.StatusCode.INVALID_ARGUMENT
    until(lambda: streams(driver) == 0)
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("greeted", [False, True])
def test_a_message_that_is_too_large_ends_its_stream(driver, dial, greeted):
    """It is not read as a whole."""
    peer = dial()
    if greeted:
        peer.hello().next("ping")
    peer.send_bytes(b"\0" * (server.MAX_RECEIVED_BYTES + 1))

    assert peer.ended()[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    until(lambda: open_streams(driver) == 0)


def test_endless_metadata_is_refused(driver, dial):
    """Before anything of it reaches us."""
    peer = dial(metadata=tuple((f"x-{n}", "v" * 4000) for n in range(100)))
    peer.hello()

    assert peer.ended()[0] in (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.INTERNAL,
    )
    assert streams(driver) == 0


def test_who_says_nothing_has_to_go(driver, dial, monkeypatch):
    """After a while."""
    monkeypatch.setattr(admission, "HELLO_SECONDS", 0.2)
    code, details = dial().ended()

    assert (code, details) == (grpc.StatusCode.DEADLINE_EXCEEDED, "no Hello came in time")
    until(lambda: open_streams(driver) == 0)


def test_the_oldest_silent_stream_makes_room(driver, dial, monkeypatch):
    """A flood of them does not keep an EPP out that says hello."""
    monkeypatch.setattr(admission, "MAX_SILENT_STREAMS", 3)
    silent = [dial() for _ in range(6)]
    for peer in silent[:3]:
        assert peer.ended()[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    dial().hello().next("ping")

    until(lambda: open_streams(driver) <= 4)


def test_an_epp_that_is_silent_for_half_a_minute_has_to_go(dial, monkeypatch):
    """Its connection may be half open."""
    monkeypatch.setattr(stream, "SILENCE_SECONDS", 0.3)
    peer = dial().hello()

    code, details = peer.ended()
    assert (code, "nothing heard" in details) == (grpc.StatusCode.DEADLINE_EXCEEDED, True)


def test_an_epp_that_does_not_read_has_to_go(driver, dial, monkeypatch):
    """A full window must not hold a stream indefinitely."""
    monkeypatch.setattr(stream, "WRITE_SECONDS", 0.3)
    monkeypatch.setattr(session, "ACK_SECONDS", 0.02)
    monkeypatch.setattr(session, "MAX_SENDS", 1000)
    before = refusals("unread")
    driver.program(POOL, pb.Snapshot(pool_uid="x" * (1 << 20)))
    dial().hello()

    until(lambda: refusals("unread") > before, WAIT_SECONDS)
    until(lambda: (streams(driver), open_streams(driver)) == (0, 0))


def test_a_flood_ends_its_stream_and_no_other(driver, dial):
    """With a reason; what it said before counts once a second."""
    honest, flood = dial().hello(pod_uid="honest"), dial().hello(pod_uid="flood")
    honest.next("ping")
    for _ in range(2000):
        flood.send(stats=pb.Stats(saturation=0.5))
    code, details = flood.ended()

    assert (code, "too many messages" in details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
    driver.program(POOL, snapshot())
    honest.ack(honest.program())
    until(lambda: driver.programmed(POOL))


@pytest.mark.parametrize("wrong", [{"nonce": 77}, {"sha256": b"?" * 32}, {"nonce": 0}])
def test_an_ack_of_something_else_programs_nobody(driver, dial, wrong):
    """It is counted, and the program stays due."""
    before = metrics.ANSWERS.labels("unknown")._value.get()
    driver.program(POOL, snapshot())
    peer = dial().hello()
    sent = peer.program()
    peer.send(ack=pb.Ack(**{"nonce": sent.nonce, "sha256": sent.sha256, **wrong}))

    until(lambda: metrics.ANSWERS.labels("unknown")._value.get() == before + 1)
    assert not driver.programmed(POOL)


def test_what_is_refused_is_logged_once_a_second(dial, caplog):
    """A peer of the port must not be able to fill the log."""
    for _ in range(30):
        peer = dial()
        peer.send_bytes(b"\xff")
        peer.ended()

    assert 1 <= caplog.text.count("control stream refused") < 15


def test_a_refusal_of_the_authorizer_reaches_the_epp_and_the_metric():
    """With the code and the text it gives."""

    async def refuse(_hello, _caller):
        raise RefusedError(grpc.StatusCode.PERMISSION_DENIED, "other_pod", "you are another")

    driver = Driver(5, refuse)
    peer = Peer(driver.port).hello()
    before = refusals("other_pod")
    try:
        assert peer.ended() == (grpc.StatusCode.PERMISSION_DENIED, "you are another")
        assert refusals("other_pod") == before + 1
        assert streams(driver) == 0
    finally:
        peer.close()
        driver.stop()


def test_an_epoch_of_somebody_unknown_means_nothing():
    """Only who may connect is listened to."""

    async def refuse(_hello, _caller):
        raise RefusedError(grpc.StatusCode.UNAUTHENTICATED, "token", "no")

    driver = Driver(5, refuse)
    peer = Peer(driver.port).hello(highest_epoch=500)
    try:
        peer.ended()
        assert driver.ask(lambda server: server._epoch) == 5
    finally:
        peer.close()
        driver.stop()
