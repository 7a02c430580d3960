"""The EPP's end of the control channel, with operators that are slow, strange or not there."""

from __future__ import annotations

import asyncio
import socket
import time

import grpc
import pytest
from control_peers import POOL, program, snapshot

from forebay_control.shares import Held, Shares
from forebay_control.v1 import control_pb2 as pb
from forebay_control.v1 import control_pb2_grpc as rpc
from forebay_epp.adapters.control import ControlClient, Dial, Identity, Slots, dialling, stream
from forebay_epp.codec.control import Programs
from forebay_epp.core.holdings import Holdings

WAIT_SECONDS = 30
IDENTITY = Identity("default", "epp-0", "uid-0", "boot", "0")


class Operator(rpc.ControlServicer):
    """A server whose streams are told by functions, one after the other; the last one repeats."""

    def __init__(self, *stories) -> None:
        self.stories = list(stories)
        self.hellos: list[pb.Hello] = []
        self.heard: list[pb.FromPicker] = []

    async def Connect(self, _, context):  # noqa: N802
        first = await context.read()
        self.hellos.append(first.hello)
        story = self.stories.pop(0) if len(self.stories) > 1 else self.stories[0]
        await story(self, context)

    async def listen(self, context, kind: str):
        """The next message of this kind; all are kept."""
        while (message := await context.read()) is not grpc.aio.EOF:
            self.heard.append(message)
            if message.WhichOneof("message") == kind:
                return getattr(message, kind)
        raise AssertionError("the stream is over")


class Client:
    """A client and what it has applied."""

    def __init__(self, port: int, **dial) -> None:
        self.applied: list = []
        self.gate: asyncio.Event | None = None
        self.reports = 0
        self.shares: Shares | None = None
        self.report_error: Exception | None = None
        self.programs = Programs(POOL)
        usual = {"ca_path": None, "token_path": None, "cert_path": None}
        self.client = ControlClient(
            Dial("127.0.0.1", port, "operator", **{**usual, **dial}),
            IDENTITY,
            self.programs,
            self._apply,
            self._stats,
            Slots(self._holdings, self._share, lambda: None),
            1.0,
        )

    async def _apply(self, accepted) -> None:
        if self.gate is not None:
            await self.gate.wait()
        self.applied.append(accepted.applied.version)

    async def _holdings(self, _first: bool) -> Holdings:  # noqa: FBT001  # a callback
        return Holdings(self.shares is not None, {}, {"10.0.0.1:8000": Held(2, 1, 8)})

    async def _share(self, shares: Shares) -> Holdings:
        self.shares = shares
        return await self._holdings(_first=False)

    async def _stats(self) -> pb.Stats:
        self.reports += 1
        if self.report_error is not None:
            raise self.report_error
        return pb.Stats(in_flight=1)


async def talk(operator: Operator, client_is, claim, **dial) -> Client:
    """Have a client dial the operator until something is so; the client must not end by itself."""
    server = grpc.aio.server()
    rpc.add_ControlServicer_to_server(operator, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client = Client(port, **dial)
    client_is(client)
    running = asyncio.create_task(client.client.run())
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            while not claim(client):
                assert not running.done(), running
                await asyncio.sleep(0.01)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await server.stop(0)
    return client


def usual(_client) -> None:
    """Change nothing about the client."""


async def good(operator: Operator, context) -> None:
    """Program the EPP and listen."""
    await context.write(pb.FromOperator(program=program(snapshot())))
    await operator.listen(context, "ack")
    await operator.listen(context, "bye")


def ends_with(code: grpc.StatusCode):
    async def story(_operator, context) -> None:
        await context.abort(code, "no")

    return story


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.DATA_LOSS,
    ],
)
async def test_no_status_of_a_stream_ends_the_client(code, caplog):
    """It dials again and is programmed, and leaves no task behind."""
    operator = Operator(ends_with(code), ends_with(code), good)
    client = await talk(operator, usual, lambda c: c.applied)

    assert len(operator.hellos) == 3
    assert client.client.answers["ack"] == 1
    assert "Task was destroyed" not in caplog.text


async def test_a_stream_that_ends_in_order_is_dialled_again():
    """An operator that has nothing to say is no operator."""

    async def nothing(_operator, _context) -> None:
        return

    operator = Operator(nothing, nothing, good)
    await talk(operator, usual, lambda c: c.applied)

    assert len(operator.hellos) == 3


@pytest.mark.parametrize("error", [TimeoutError(), ValueError("a count is out of range")])
async def test_a_report_that_cannot_be_made_does_not_end_the_client(error):
    """Neither one that is late nor one that fails."""

    def fail(client) -> None:
        client.report_error = error

    await talk(Operator(good), fail, lambda c: c.reports >= 2)


async def test_a_token_file_that_holds_rubbish_does_not_end_the_client(tmp_path):
    """What cannot be sent is reported; the file is read again with each dial."""
    token = tmp_path / "token"
    token.write_bytes(b"two\nlines\x00")
    operator = Operator(good)
    started = time.monotonic()

    def corrected(client) -> bool:
        if time.monotonic() > started + 0.5:
            token.write_text("fine")
        return bool(client.applied)

    await talk(operator, usual, corrected, token_path=token)


async def test_a_ca_file_that_is_missing_or_holds_rubbish_does_not_end_the_client(tmp_path):
    """Nor is anything said in plaintext then."""
    ca = tmp_path / "ca.crt"
    operator = Operator(good)
    started = time.monotonic()

    def tried(_client) -> bool:
        if time.monotonic() > started + 0.5 and not ca.exists():
            ca.write_bytes(b"rubbish")
        return time.monotonic() > started + 1.5

    await talk(operator, usual, tried, ca_path=ca)

    assert operator.hellos == []


async def test_an_operator_that_is_not_leading_is_left():
    """And the next address, here the same one, is tried at once."""

    async def not_leading(_operator, context) -> None:
        await context.write(pb.FromOperator(not_leader=pb.NotLeader(hint="b")))

    operator = Operator(not_leading, good)
    await talk(operator, usual, lambda c: c.applied)

    assert len(operator.hellos) == 2


@pytest.mark.parametrize("seconds", [1e18, -1.0, float("nan"), 0.0])
async def test_an_absurd_time_to_wait_is_not_waited(seconds):
    """At most a minute is, else nothing."""

    async def close(_operator, context) -> None:
        await context.write(pb.FromOperator(close=pb.Close(retry_after_seconds=seconds)))

    await talk(Operator(close, good), usual, lambda c: c.applied)


async def test_a_stream_that_ends_while_a_program_is_applied():
    """It is put into force once and to the end, and the next Hello says so."""

    async def impatient(_operator, context) -> None:
        await context.write(pb.FromOperator(program=program(snapshot())))

    operator = Operator(impatient, good)
    gate = asyncio.Event()

    def slow(client) -> None:
        client.gate = gate

    def claim(client) -> bool:
        if len(operator.hellos) == 2:
            gate.set()
        return client.client.answers["ack"] == 2

    client = await talk(operator, slow, claim)

    assert len(client.applied) == 1
    assert client.programs.applied.version == client.applied[0]


async def test_pings_are_heard_while_a_program_is_applied(monkeypatch):
    """A disk that is slow is no silence of the operator."""
    monkeypatch.setattr(stream, "SILENCE_SECONDS", 0.6)
    gate = asyncio.Event()

    async def busy(operator, context) -> None:
        await context.write(pb.FromOperator(program=program(snapshot())))
        for _ in range(10):
            await asyncio.sleep(0.15)
            await context.write(pb.FromOperator(ping=pb.Ping()))
        gate.set()
        await operator.listen(context, "ack")
        await operator.listen(context, "bye")

    operator = Operator(busy)

    def slow(client) -> None:
        client.gate = gate

    client = await talk(operator, slow, lambda c: c.client.answers["ack"])

    assert (len(operator.hellos), len(client.applied)) == (1, 1)


async def test_an_operator_that_falls_silent_is_left(monkeypatch):
    """Its connection may be half open."""
    monkeypatch.setattr(stream, "SILENCE_SECONDS", 0.3)

    async def silent(operator, context) -> None:
        await operator.listen(context, "bye")

    operator = Operator(silent)
    await talk(operator, usual, lambda _: len(operator.hellos) >= 2)


async def test_goodbye_is_heard():
    """Before the stream ends."""
    byes = []

    async def story(operator, context) -> None:
        await context.write(pb.FromOperator(ping=pb.Ping()))
        byes.append(await operator.listen(context, "bye"))

    operator = Operator(story)
    server = grpc.aio.server()
    rpc.add_ControlServicer_to_server(operator, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client = Client(port)
    running = asyncio.create_task(client.client.run())
    async with asyncio.timeout(WAIT_SECONDS):
        while not client.client.connected:  # noqa: ASYNC110  # nothing tells
            await asyncio.sleep(0.01)
        await client.client.leave(WAIT_SECONDS)
        await running
    await server.stop(0)

    assert byes == [pb.Bye()]
    assert len(operator.hellos) == 1


async def test_leaving_without_an_operator_does_not_wait():
    """No EPP is left to be notified."""
    client = Client(1)
    running = asyncio.create_task(client.client.run())
    await asyncio.sleep(0)
    began = time.monotonic()
    await client.client.leave(WAIT_SECONDS)
    assert time.monotonic() - began < WAIT_SECONDS / 2
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_peer_that_takes_connections_and_says_nothing_is_given_up(monkeypatch):
    """An operator that is frozen: its kernel still takes connections. Others are tried then."""
    monkeypatch.setattr(dialling, "CONNECT_MILLISECONDS", 500)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = Client(listener.getsockname()[1])
        running = asyncio.create_task(client.client.run())
        listener.setblocking(False)
        connections = []
        async with asyncio.timeout(WAIT_SECONDS / 2):
            while len(connections) < 2:
                loop = asyncio.get_running_loop()
                connections.append(await loop.sock_accept(listener))
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        for connection, _ in connections:
            connection.close()


async def shares_out(operator: Operator, context) -> None:
    """Answer the first report with shares, and wait for the one that says they are taken."""
    await context.write(pb.FromOperator(ping=pb.Ping()))
    first = await operator.listen(context, "demand")
    assert (first.full, first.shared, first.endpoints[0].limit) == (True, False, 8)
    share = pb.Share(address="10.0.0.1:8000", slots=3)
    shares = pb.Shares(number=7, total=3, epps=2, shares=[share])
    await context.write(pb.FromOperator(shares=shares))
    while (await operator.listen(context, "demand")).seen != 7:
        pass
    operator.heard.append("taken")
    await operator.listen(context, "bye")


async def test_shares_are_taken_and_the_next_report_says_so():
    """The first report of a stream names every endpoint; shares are in force before the answer."""
    operator = Operator(shares_out)
    client = await talk(operator, lambda _: None, lambda _: "taken" in operator.heard)
    assert client.shares == Shares(7, 3, {"10.0.0.1:8000": 3}, epps=2)
