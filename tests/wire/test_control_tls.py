"""T37: TLS of the control channel, with files that are wrong, old, or changed while streams live.

Whose a token is a fake tells here; tests/cluster asks a real API server.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import socket
import ssl
from types import SimpleNamespace

import grpc
import pod_tokens
import pytest
from control_driver import Driver
from control_peers import POOL, Peer, snapshot
from control_plane import AUDIENCE, LOOPBACK, NAME, Authority, EPPProcess, Forwarder
from cryptography import x509
from ext_proc_peer import until

from forebay_control import tls
from forebay_operator import metrics
from forebay_operator.channel.trust import (
    MAX_REVIEWING_PER_PEER,
    CertificateTrust,
    Pods,
    TokenTrust,
)

WAIT_SECONDS = 60
LOG = logging.getLogger(__name__)
POOLS = {POOL: {"uid-0": "epp-0"}}
GOOD, BAD = (pod_tokens.token(namespace="default", jti=name) for name in ("good", "bad"))
POD = SimpleNamespace(name="epp-0", namespace="default", uid="uid-0", token=lambda: GOOD)
SPIFFE = "spiffe://cluster.local/ns/default/sa/epp"


async def review(token: str, audience: str) -> dict:
    """What an API server says of the only token there is."""
    assert audience == AUDIENCE
    if token != GOOD:
        return {"authenticated": False, "error": "unknown"}
    extra = {
        "authentication.kubernetes.io/pod-uid": [POD.uid],
        "authentication.kubernetes.io/pod-name": [POD.name],
    }
    user = {"username": "system:serviceaccount:default:epp", "extra": extra}
    return {"authenticated": True, "audiences": [audience], "user": user}


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "ca")


@pytest.fixture
def serve():
    """Serve with the certificate of a folder; with `mtls` EPPs have to show one too."""
    drivers: list[Driver] = []

    def begin(folder, *, mtls: bool = False) -> Driver:
        pods = Pods(POOLS.get, lambda _uid: {LOOPBACK})
        trust = CertificateTrust(pods) if mtls else TokenTrust(review, pods, AUDIENCE)
        read = tls.from_folder(folder, with_ca=mtls)
        credentials = tls.server_credentials(read, LOG, require_client_certificate=mtls)
        drivers.append(Driver(5, trust, credentials))
        drivers[-1].program(POOL, snapshot())
        return drivers[-1]

    yield begin
    for driver in drivers:
        driver.stop()


@pytest.fixture
def dial():
    """Dial as an EPP that trusts an authority and says hello."""
    peers: list[Peer] = []

    def begin(driver, ca, *, leaf=None, token=GOOD, server_name=NAME, **hello) -> Peer:
        pair = (None, None)
        if leaf is not None:
            pair = ((leaf / "tls.key").read_bytes(), (leaf / "tls.crt").read_bytes())
        credentials = grpc.ssl_channel_credentials(ca.read_bytes(), *pair)
        peer = Peer(driver.port, credentials, token=token, server_name=server_name)
        peers.append(peer)
        return peer.hello(**hello)

    yield begin
    for peer in peers:
        peer.close()


def refusals(reason: str) -> float:
    return metrics.REFUSALS.labels(reason)._value.get()


def served_serial(driver: Driver) -> int:
    """The serial number of the certificate that a new connection is shown."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", driver.port), 10) as plain,
        context.wrap_socket(plain) as connection,
    ):
        return x509.load_der_x509_certificate(connection.getpeercert(True)).serial_number


def test_an_epp_that_trusts_the_authority_is_programmed(authority, serve, dial):
    """The server's name and the token are right."""
    driver = serve(authority.leaf("operator"))

    assert dial(driver, authority.path).program().version.epoch == 5


@pytest.mark.parametrize("wrong", ["expired", "other authority", "other name"])
def test_an_epp_refuses_an_operator_that_is_not_the_one(authority, serve, tmp_path, wrong):
    """A real process: it says why, shows its token to no one, and stays unready."""
    leaf = {
        "expired": lambda: authority.leaf("operator", days=-1),
        "other authority": lambda: Authority(tmp_path / "other").leaf("operator"),
        "other name": lambda: authority.leaf("operator", dns="other-audience"),
    }[wrong]()
    shutil.rmtree(tmp_path / "tls", ignore_errors=True)
    driver = serve(leaf)
    epp = EPPProcess(tmp_path, POD, "chat", driver.port, authority.path, "--bootstrap-timeout=1s")
    try:
        until(lambda: "no control connection" in epp.log, WAIT_SECONDS)
        until(lambda: "--bootstrap-timeout" in epp.log, WAIT_SECONDS)
        assert not epp.serving
        assert driver.ask(lambda server: server._open) == 0
        assert "Traceback" not in epp.log
        assert epp.program()[0] == "Defaults"
    finally:
        epp.end()


def test_an_epp_in_plaintext_gets_nowhere(authority, serve):
    """There is no way around TLS where there is a certificate."""
    driver = serve(authority.leaf("operator"))
    peer = Peer(driver.port, token=GOOD).hello()

    assert peer.ended()[0] is grpc.StatusCode.UNAVAILABLE
    assert driver.ask(lambda server: server._open) == 0
    peer.close()


@pytest.mark.parametrize(
    ("token", "hello", "code", "reason"),
    [
        (None, {}, grpc.StatusCode.UNAUTHENTICATED, "no_token"),
        (BAD, {}, grpc.StatusCode.UNAUTHENTICATED, "token"),
        (GOOD, {"pod_uid": "uid-1"}, grpc.StatusCode.PERMISSION_DENIED, "other_pod"),
        (GOOD, {"pool": "other/chat"}, grpc.StatusCode.PERMISSION_DENIED, "other_namespace"),
        (GOOD, {"pool": "default/talk"}, grpc.StatusCode.UNAVAILABLE, "no_pool"),
    ],
)
def test_who_cannot_prove_to_be_an_epp_of_the_pool(
    authority, serve, dial, token, hello, code, reason
):
    """Is refused, and where the operator's people look is counted why."""
    driver, before = serve(authority.leaf("operator")), refusals(reason)

    assert dial(driver, authority.path, token=token, **hello).ended()[0] is code
    assert refusals(reason) == before + 1


def test_a_new_certificate_is_served_without_a_restart(authority, serve, dial):
    """Streams that live stay and are programmed on."""
    folder = authority.leaf("operator")
    driver = serve(folder)
    live = dial(driver, authority.path)
    live.ack(live.program())
    before = served_serial(driver)
    authority.leaf("operator")
    until(lambda: served_serial(driver) != before)

    driver.program(POOL, snapshot(31.0))
    assert live.program().version.revision == 2
    assert dial(driver, authority.path).program().version.revision == 2


@pytest.mark.parametrize("wrong", ["other key", "rubbish", "missing"])
def test_a_certificate_that_cannot_be_used_leaves_the_one_before(
    authority, serve, dial, tmp_path, wrong
):
    """A rotation that is half done must not end all handshakes."""
    folder = authority.leaf("operator")
    driver = serve(folder)
    before = served_serial(driver)
    match wrong:
        case "other key":
            other = Authority(tmp_path / "other").leaf("operator")
            shutil.copy(other / "tls.key", folder / "tls.key")
        case "rubbish":
            (folder / "tls.crt").write_bytes(b"-----BEGIN CERTIFICATE-----\nrubbish")
        case "missing":
            (folder / "tls.crt").unlink()

    assert served_serial(driver) == before
    assert dial(driver, authority.path).program().version.epoch == 5
    authority.leaf("operator")
    until(lambda: served_serial(driver) != before)


@pytest.mark.parametrize(
    ("file", "content"),
    [("tls.crt", b"rubbish"), ("tls.key", b"-----BEGIN rubbish"), ("tls.key", None)],
)
def test_an_operator_does_not_start_with_files_that_it_cannot_use(authority, file, content):
    """The error names the folder or the file."""
    folder = authority.leaf("operator")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)

    with pytest.raises((OSError, ValueError), match=r"operator"):
        tls.from_folder(folder, with_ca=False)()


def test_an_epp_reads_its_authorities_anew_with_each_dial(authority, serve, tmp_path):
    """The authority is replaced: the process finds the new one without a restart."""
    bundle = tmp_path / "bundle.crt"
    shutil.copy(authority.path, bundle)
    old = serve(authority.leaf("operator"))
    epp = EPPProcess(tmp_path, POD, "chat", old.port, bundle)
    try:
        until(lambda: old.programmed(POOL), WAIT_SECONDS)
        new_authority = Authority(tmp_path / "new", "new")
        folder = authority.folder / "operator"
        for file in new_authority.leaf("operator").iterdir():
            shutil.copy(file, folder / file.name)
        bundle.write_bytes(authority.path.read_bytes() + new_authority.path.read_bytes())
        assert epp.connected
        drop(old)
        until(lambda: old.programmed(POOL), WAIT_SECONDS)
        bundle.write_bytes(new_authority.path.read_bytes())
        drop(old)
        until(lambda: old.programmed(POOL), WAIT_SECONDS)
    finally:
        epp.end()


def drop(driver: Driver) -> None:
    """End all streams of the pool, and wait until they are gone."""

    def end(server) -> None:
        for stream in server._all():
            stream.end()

    before = driver.ask(lambda server: server._all())
    driver.ask(end)
    until(lambda: not set(before) & set(driver.ask(lambda server: server._all())))


def test_a_rotated_token_is_read_anew_with_each_dial(authority, serve, tmp_path):
    """The kubelet replaces it every few minutes."""
    driver = serve(authority.leaf("operator"))
    epp = EPPProcess(
        tmp_path,
        SimpleNamespace(name="epp-0", namespace="default", uid="uid-0", token=lambda: BAD),
        "chat",
        driver.port,
        authority.path,
    )
    try:
        until(lambda: "UNAUTHENTICATED" in epp.log, WAIT_SECONDS)
        epp.token_path.write_text(GOOD)
        until(lambda: driver.programmed(POOL), WAIT_SECONDS)
    finally:
        epp.end()


class HungReviews:
    """An API server that answers about the good token only, and hangs on every other one."""

    def __init__(self) -> None:
        self.hanging = 0

    async def __call__(self, token: str, audience: str) -> dict:
        if token != GOOD:
            self.hanging += 1
            await asyncio.Event().wait()
        return await review(token, audience)


def test_a_flood_of_tokens_from_one_address_keeps_no_other_out(authority):
    """Forty streams show forged tokens of the EPP's pod; the EPP comes from another address."""
    reviews = HungReviews()
    trust = TokenTrust(reviews, Pods(POOLS.get, None), AUDIENCE)
    read = tls.from_folder(authority.leaf("operator"), with_ca=False)
    credentials = tls.server_credentials(read, LOG)
    driver = Driver(5, trust, credentials)
    driver.program(POOL, snapshot())
    elsewhere = Forwarder(driver.port, source="127.0.0.2")
    shown = grpc.ssl_channel_credentials(authority.path.read_bytes())
    before = refusals("reviews")
    flood = [
        Peer(
            *(driver.port, shown),
            token=pod_tokens.token(namespace="default", jti=number),
            server_name=NAME,
        ).hello()
        for number in range(40)
    ]
    honest = Peer(elsewhere.port, shown, token=GOOD, server_name=NAME)
    try:
        until(lambda: refusals("reviews") == before + 40 - MAX_REVIEWING_PER_PEER, WAIT_SECONDS)
        assert reviews.hanging == MAX_REVIEWING_PER_PEER
        assert honest.hello().program().version.epoch == 5
    finally:
        for peer in (*flood, honest):
            peer.close()
        elsewhere.close()
        driver.stop()


# --- certificates of EPPs


def test_an_epp_with_a_service_account_s_certificate(authority, serve, dial):
    """No token is needed."""
    driver = serve(authority.leaf("operator"), mtls=True)
    leaf = authority.leaf("epp", uri=SPIFFE)

    assert dial(driver, authority.path, leaf=leaf, token=None).program().version.epoch == 5


def test_a_real_epp_with_a_certificate(authority, serve, tmp_path):
    """It shows the one in --control-cert-path."""
    driver = serve(authority.leaf("operator"), mtls=True)
    leaf = authority.leaf("epp", uri=SPIFFE)
    flag = f"--control-cert-path={leaf}"
    epp = EPPProcess(tmp_path, POD, "chat", driver.port, authority.path, flag)
    try:
        until(lambda: driver.programmed(POOL), WAIT_SECONDS)
    finally:
        epp.end()


@pytest.mark.parametrize("wrong", ["none", "other authority", "expired"])
def test_a_handshake_without_a_good_certificate_fails(authority, serve, dial, tmp_path, wrong):
    """Before anything is said."""
    driver = serve(authority.leaf("operator"), mtls=True)
    leaf = {
        "none": lambda: None,
        "other authority": lambda: Authority(tmp_path / "other").leaf("epp", uri=SPIFFE),
        "expired": lambda: authority.leaf("epp", uri=SPIFFE, days=-1),
    }[wrong]()

    assert dial(driver, authority.path, leaf=leaf).ended()[0] is grpc.StatusCode.UNAVAILABLE
    assert driver.ask(lambda server: server._open) == 0


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        (None, "certificate"),
        ("spiffe://cluster.local/epp", "certificate"),
        ("spiffe://cluster.local/ns/other/sa/epp", "other_pod"),
    ],
)
def test_a_good_certificate_of_somebody_else(authority, serve, dial, uri, reason):
    """TLS is content, trust is not."""
    driver, before = serve(authority.leaf("operator"), mtls=True), refusals(reason)
    leaf = authority.leaf("epp", uri=uri)
    dial(driver, authority.path, leaf=leaf).ended()

    assert refusals(reason) == before + 1


def test_the_authority_of_epps_can_be_replaced(authority, serve, dial, tmp_path):
    """Old and new ones are trusted for as long as both stand in the file."""
    folder = authority.leaf("operator")
    driver = serve(folder, mtls=True)
    new = Authority(tmp_path / "new", "new")
    new_leaf = new.leaf("epp", uri=SPIFFE)
    assert dial(driver, authority.path, leaf=new_leaf).ended()[0] is grpc.StatusCode.UNAVAILABLE

    (folder / "ca.crt").write_bytes(authority.path.read_bytes() + new.path.read_bytes())
    assert dial(driver, authority.path, leaf=new_leaf).program().version.epoch == 5
    old_leaf = authority.leaf("epp", uri=SPIFFE)
    assert dial(driver, authority.path, leaf=old_leaf).program().version.epoch == 5
