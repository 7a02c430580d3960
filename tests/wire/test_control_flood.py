"""T38: floods against a real operator process, beside an EPP that behaves.

Bounded: 10,000 streams in five rounds of 2,000, a message of 64 MB, 30,000 reports.
"""

from __future__ import annotations

import asyncio

import grpc
import pytest
import yaml
from control_peers import CONNECT, Peer
from control_plane import QUICKSTART, EPPProcess, FolderOperator
from ext_proc_peer import until

from forebay_control.v1 import control_pb2 as pb

WAIT_SECONDS = 60
MAX_RSS_MB = 150
ROUNDS, STREAMS, STREAMS_PER_CONNECTION = 5, 2_000, 4
LARGE_BYTES = 64 << 20
REPORTS, REPORTS_PER_STREAM = 30_000, 3_000


@pytest.fixture
def operator(tmp_path):
    operator = FolderOperator(tmp_path)
    yield operator
    operator.end()


@pytest.fixture
def honest(operator, tmp_path):
    """An EPP that behaves; the name of its pool is the quickstart's."""
    pool = yaml.safe_load((QUICKSTART / "pool.yaml").read_text())["metadata"]["name"]
    epp = EPPProcess(tmp_path, "honest", pool, operator.control_port)
    until(lambda: epp.version is not None and epp.version[1] > 0, WAIT_SECONDS)
    yield epp
    epp.end()


def unharmed(operator: FolderOperator, honest: EPPProcess, ttl: str) -> None:
    """The honest EPP is programmed as ever, and the operator has had little memory."""
    epoch, revision = honest.version
    operator.edit(ttl)
    until(lambda: honest.version > (epoch, revision), WAIT_SECONDS)
    assert operator.running
    assert honest.connected
    assert "Traceback" not in operator.log
    assert operator.peak_rss_mb() <= MAX_RSS_MB


async def one(call, first: bytes | None) -> None:
    """Open a stream, say something or nothing, and take what comes."""
    try:
        if first is not None:
            await call.write(first)
        while await call.read() is not grpc.aio.EOF:
            pass
    except (grpc.RpcError, asyncio.InvalidStateError, asyncio.CancelledError):
        return


async def flood(port: int, number: int) -> None:
    """2,000 streams at once: silent ones, garbage, and unknown EPPs."""
    channels = [
        grpc.aio.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)])
        for _ in range(STREAMS // STREAMS_PER_CONNECTION)
    ]
    tasks = []
    for index in range(STREAMS):
        hello = pb.Hello(
            protocol=1,
            pool=f"nowhere/pool-{index % 50}",
            pod_uid=f"uid-{number}-{index % 100}",
            highest_epoch=2**63,
        )
        first = (None, b"\xff\xff\xff", pb.FromPicker(hello=hello).SerializeToString())[index % 3]
        call = channels[index // STREAMS_PER_CONNECTION].stream_stream(CONNECT)()
        tasks.append(asyncio.create_task(one(call, first)))
    await asyncio.wait(tasks, timeout=3)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for channel in channels:
        await channel.close(None)


def test_ten_thousand_streams(operator, honest):
    """Nothing of them stays, and the honest EPP does not notice."""
    for number in range(ROUNDS):
        asyncio.run(flood(operator.control_port, number))

    unharmed(operator, honest, "90s")
    until(lambda: operator.metric("forebay_control_streams") == 1, WAIT_SECONDS)
    assert operator.metric("forebay_control_refusals_total", reason="protocol") > 0
    assert operator.metric("forebay_control_refusals_total", reason="silent") > 0


def test_a_message_of_64_megabytes(operator, honest):
    """As the first one and as a later one: neither is read."""
    for greeted in (False, True):
        peer = Peer(operator.control_port)
        if greeted:
            peer.hello(pod_uid="large").next("ping")
        peer.send_bytes(b"\0" * LARGE_BYTES)
        assert peer.ended()[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        peer.close()

    unharmed(operator, honest, "90s")


def test_a_flood_of_reports(operator, honest):
    """As fast as they can be sent; each stream is ended long before it has sent them all."""
    report = pb.FromPicker(stats=pb.Stats(bands=[pb.BandStats(band="b" * 200)] * 60))
    data = report.SerializeToString()
    for number in range(REPORTS // REPORTS_PER_STREAM):
        peer = Peer(operator.control_port).hello(pod_uid=f"flood-{number}")
        peer.next("ping")
        for _ in range(REPORTS_PER_STREAM):
            peer.send_bytes(data)
        assert peer.ended()[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        peer.close()

    unharmed(operator, honest, "90s")
    assert operator.metric("forebay_control_refusals_total", reason="flood") == 10
