"""T37: who may connect to a real operator, with tokens that a real API server has issued."""

from __future__ import annotations

import json

import grpc
import pytest
from control_peers import Peer
from control_plane import (
    NAME,
    START_SECONDS,
    EPPPod,
    Forwarder,
    Operator,
    apply,
    pool,
    service,
)
from ext_proc_peer import until

WAIT_SECONDS = 60


class Door:
    """An operator, and attempts to connect to it that are counted by why they were refused."""

    def __init__(self, stage, operator: Operator) -> None:
        self.stage, self.operator = stage, operator
        self._peers: list[Peer] = []

    def dial(self, pod: EPPPod, token: str | None, *, leaf=None, port: int = 0, **hello) -> Peer:
        """Say to be this pod, with that token; by way of another port if given."""
        pair = (None, None)
        if leaf is not None:
            pair = ((leaf / "tls.key").read_bytes(), (leaf / "tls.crt").read_bytes())
        ca = self.stage.authority.path.read_bytes()
        credentials = grpc.ssl_channel_credentials(ca, *pair)
        peer = Peer(
            *(port or self.operator.control_port, credentials), token=token, server_name=NAME
        )
        self._peers.append(peer)
        usual = {
            "pool": f"{self.stage.namespace}/chat",
            "pod_uid": pod.uid,
            "pod_name": pod.name,
            "pod_namespace": pod.namespace,
        }
        return peer.hello(**{**usual, **hello})

    def refused(self, pod: EPPPod, token: str | None, **hello) -> tuple[str, set[str]]:
        """The status of an attempt, and the reasons that were counted meanwhile."""
        before = self._reasons()
        code, _ = self.dial(pod, token, **hello).ended()
        after = self._reasons()
        return code.name, {reason for reason in after if after[reason] > before.get(reason, 0)}

    def _reasons(self) -> dict[str, float]:
        names = ("no_token", "token", "other_pod", "other_namespace", "not_selected", "no_pool")
        others = ("unbound_token", "review", "certificate", "other_address", "reviews")
        metric = self.operator.metric
        return {
            name: metric("forebay_control_refusals_total", reason=name)
            for name in (*names, *others)
        }

    def serves(self, pod: EPPPod, token: str | None, **hello) -> bool:
        """Whether an attempt succeeds now; the operator may not know a young pod yet."""
        try:
            self.dial(pod, token, **hello).next("ping", "program")
        except (grpc.RpcError, StopIteration):
            return False
        return True

    def close(self) -> None:
        for peer in self._peers:
            peer.close()


@pytest.fixture
def door(stage):
    door = Door(stage, stage.operator())
    until(lambda: door.operator.epoch > 0, WAIT_SECONDS)
    yield door
    door.close()


@pytest.fixture
def pod(stage) -> EPPPod:
    return EPPPod(stage.cluster, stage.namespace, "epp-0", "epp")


def until_known(door: Door, pod: EPPPod) -> str:
    """Wait until the operator serves the pod, and return its token."""
    token = pod.token()
    until(lambda: door.serves(pod, token), WAIT_SECONDS)
    return token


def test_only_an_epp_of_the_pool_is_served(stage, door, pod):
    """Each of the others is refused and counted under its reason."""
    token = until_known(door, pod)
    stranger = EPPPod(stage.cluster, stage.namespace, "stranger", "something-else")
    kubectl = stage.cluster.kubectl
    unbound = kubectl(
        *("create", "token", "default", "-n", stage.namespace, "--audience=forebay-control")
    ).stdout.strip()

    assert door.refused(pod, None) == ("UNAUTHENTICATED", {"no_token"})
    assert door.refused(pod, "rubbish") == ("UNAUTHENTICATED", {"token"})
    assert door.refused(pod, token[:-4] + "AAAA") == ("UNAUTHENTICATED", {"token"})
    other_audience = pod.token("https://kubernetes.default.svc")
    assert door.refused(pod, other_audience) == ("UNAUTHENTICATED", {"token"})
    assert door.refused(pod, unbound) == ("PERMISSION_DENIED", {"unbound_token"})
    assert door.refused(pod, stranger.token()) == ("PERMISSION_DENIED", {"other_pod"})
    assert door.refused(stranger, stranger.token()) == ("UNAVAILABLE", {"not_selected"})
    assert door.refused(pod, token, pool=f"{stage.namespace}/talk") == ("UNAVAILABLE", {"no_pool"})
    assert door.refused(pod, token, pool="other/chat") == ("PERMISSION_DENIED", {"other_namespace"})
    assert door.serves(pod, token)
    assert "Traceback" not in door.operator.log


def test_a_pod_of_another_namespace_cannot_serve_the_pool(stage, door, pod):
    """Although it has a good token of its own and is behind a Service of the same name."""
    until_known(door, pod)
    other = stage.cluster.make_namespace(f"{stage.namespace}-other")
    try:
        apply(stage.cluster, other, pool("chat"), service())
        foreign = EPPPod(stage.cluster, other, "epp-0", "epp")

        refused = door.refused(foreign, foreign.token())
        assert refused == ("PERMISSION_DENIED", {"other_namespace"})
    finally:
        stage.cluster.leave_namespace(other)


def test_a_stolen_token_is_worth_nothing_at_another_address(door, pod):
    """Not while it is valid, and not although the pod's own stream is open."""
    token = until_known(door, pod)
    elsewhere = Forwarder(door.operator.control_port, source="127.0.0.2")
    try:
        assert door.refused(pod, token, port=elsewhere.port) == ("UNAVAILABLE", {"other_address"})
        pod.run("127.0.0.2")
        until(lambda: door.serves(pod, token, port=elsewhere.port), WAIT_SECONDS)
    finally:
        elsewhere.close()


def test_forged_tokens_are_not_shown_to_the_api_server(stage, door, pod):
    """Neither those that name no EPP of the pool, nor one that does over and over again."""
    token = until_known(door, pod)
    stranger = EPPPod(stage.cluster, stage.namespace, "stranger", "something-else")
    forged = stranger.token()
    head, claims, signature = token.split(".")
    known = f"{head}.{claims}.{signature[:-6]}AAAAAA"
    before = reviews(stage)
    for _ in range(20):
        assert door.refused(stranger, forged[:-4] + "AAAA") == ("UNAVAILABLE", {"not_selected"})
        assert door.refused(pod, known) == ("UNAUTHENTICATED", {"token"})

    assert reviews(stage) - before < 10  # one in five seconds
    assert door.serves(pod, token)


def reviews(stage) -> int:
    """How often tokens were reviewed, by the API server's audit log."""
    lines = (stage.cluster.dir / "audit.log").read_text().splitlines()
    entries = [json.loads(line) for line in lines if "tokenreviews" in line]
    return len({entry["auditID"] for entry in entries})


def test_the_token_of_a_deleted_pod_is_worth_nothing(door, pod):
    """Although it was good a moment ago and its answer is remembered."""
    token = until_known(door, pod)
    pod.delete()
    until(lambda: not door.serves(pod, token), WAIT_SECONDS)

    settled = (("UNAVAILABLE", {"not_selected"}), ("UNAUTHENTICATED", {"token"}))
    until(lambda: door.refused(pod, token) in settled, WAIT_SECONDS)


def test_a_known_epp_dials_again_while_the_api_server_is_down(stage, door, pod):
    """What is known of its token lasts; streams that live are not touched."""
    token = until_known(door, pod)
    live = door.dial(pod, token)
    live.next("ping")
    stage.cluster.stop_apiserver()
    try:
        assert door.serves(pod, token)
        live.next("ping")
    finally:
        stage.cluster.start_apiserver()


def test_certificates_in_place_of_tokens(stage, pod):
    """The operator asks for one of the pod's service account."""
    uri = f"spiffe://cluster.local/ns/{stage.namespace}/sa/default"
    mine = stage.authority.leaf("mine", uri=uri)
    theirs = stage.authority.leaf("theirs", uri="spiffe://cluster.local/ns/other/sa/default")
    operator = Operator(
        *(stage.cluster, stage.folder, stage.tls, "--control-client-auth=certificate"),
        name="operator-0",
        lease_namespace=stage.namespace,
        namespaces=(stage.namespace,),
    )
    door = Door(stage, operator)
    try:
        until(lambda: operator.ready, START_SECONDS)
        until(lambda: operator.epoch > 0, WAIT_SECONDS)
        until(lambda: door.serves(pod, None, leaf=mine), WAIT_SECONDS)
        assert door.refused(pod, None, leaf=theirs) == ("PERMISSION_DENIED", {"other_pod"})
        assert door.refused(pod, None)[0] == "UNAVAILABLE"
    finally:
        door.close()
        operator.end()
