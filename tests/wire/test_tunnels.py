"""CONNECT through real Envoy: what follows the headers is no HTTP."""

from __future__ import annotations

import socket
from contextlib import closing

import pytest
from envoy_process import Envoy
from ext_proc_peer import EPPThread, until
from loop_thread import LoopThread

CONNECT = b"CONNECT inference:443 HTTP/1.1\r\nhost: inference:443\r\n\r\n"


class Tunnel:
    """A server that takes CONNECT and says back what comes."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []
        self._thread = LoopThread()
        self.address = self._thread.listen(self._serve)

    async def _serve(self, reader, writer) -> None:
        self.seen.append(await reader.readuntil(b"\r\n"))
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while words := await reader.read(1024):
            writer.write(words)

    def stop(self) -> None:
        self._thread.stop()


def allow_connect(bootstrap: dict) -> None:
    """Do what the owner of a gateway does who wants CONNECT; ours has no use for it."""
    (listener,) = bootstrap["static_resources"]["listeners"]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    manager["upgrade_configs"].append({"upgrade_type": "CONNECT"})
    (host,) = manager["route_config"]["virtual_hosts"]
    route = {**host["routes"][0], "match": {"connect_matcher": {}}}
    host["routes"].insert(0, route)


@pytest.fixture
def server():
    server = Tunnel()
    yield server
    server.stop()


@pytest.fixture
def epp(server):
    epp = EPPThread("completion-queue", endpoints=(server.address,))
    yield epp
    epp.stop()


@pytest.fixture
def envoy(request, tmp_path, epp):
    envoy = Envoy(tmp_path, epp.transport.port, *request.param)
    yield envoy
    envoy.stop()


def say(connection: socket.socket, words: bytes, answer: bytes) -> bytes:
    """Send; return what comes until it ends with the answer."""
    connection.sendall(words)
    heard = b""
    while not heard.endswith(answer):
        more = connection.recv(1024)
        assert more, heard
        heard += more
    return heard


@pytest.mark.parametrize("envoy", [(allow_connect,)], indirect=True, ids=["allowed"])
def test_a_connect_reaches_a_server_and_holds_a_slot(envoy, epp, server):
    """Words go both ways for as long as it is open."""
    with closing(socket.create_connection(("127.0.0.1", envoy.http), 20)) as connection:
        assert say(connection, CONNECT, b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")
        assert say(connection, b"one", b"one") == b"one"
        assert say(connection, b"two" * 1000 + b"!", b"!") == b"two" * 1000 + b"!"
        assert epp.state().in_flight == 1

    until(lambda: epp.state().in_flight == 0)
    assert server.seen == [b"CONNECT inference:443 HTTP/1.1\r\n"]


@pytest.mark.parametrize("envoy", [()], indirect=True, ids=["not allowed"])
def test_our_own_envoy_has_no_route_for_connect(envoy, epp, server):
    """It says 404 and asks neither the EPP for a slot nor a server for an answer."""
    with closing(socket.create_connection(("127.0.0.1", envoy.http), 20)) as connection:
        assert say(connection, CONNECT, b"\r\n\r\n").startswith(b"HTTP/1.1 404 ")

    assert (server.seen, epp.state().in_flight, epp.state().requests) == ([], 0, 0)
