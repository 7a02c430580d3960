"""Who may connect. TokenReview is a fake here; tests/cluster asks the real API server."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest
from pod_tokens import AUDIENCE, encoded, token

from forebay_control.v1 import control_pb2 as pb
from forebay_operator.channel.admission import Caller, RefusedError, address_of
from forebay_operator.channel.trust import (
    MAX_REFUSALS,
    MAX_REVIEWING,
    MAX_REVIEWING_PER_PEER,
    MAX_REVIEWS,
    CertificateTrust,
    Pods,
    TokenTrust,
    unauthenticated,
)
from forebay_operator.cluster.api import ApiError

HELLO = pb.Hello(pool="serving/chat", pod_namespace="serving", pod_name="epp-0", pod_uid="uid-0")
ADDRESS = "10.0.0.1"
POOLS = {"serving/chat": {"uid-0": "epp-0"}}


def pods(pools: dict = POOLS, addresses: dict | None = None, *, anywhere: bool = False) -> Pods:
    """What the operator knows: by default one EPP, at ADDRESS."""
    known = {"uid-0": (ADDRESS, "fd00::1")} if addresses is None else addresses
    return Pods(pools.get, None if anywhere else lambda uid: known.get(uid, ()))


def review_status(uid="uid-0", name="epp-0", namespace="serving", **fields) -> dict:
    extra = {
        "authentication.kubernetes.io/pod-uid": [uid],
        "authentication.kubernetes.io/pod-name": [name],
    }
    return {
        "authenticated": True,
        "audiences": [AUDIENCE],
        "user": {"username": f"system:serviceaccount:{namespace}:default", "extra": extra},
        **fields,
    }


class FakeReviews:
    """The API server's TokenReview."""

    def __init__(self, status: dict | None = None) -> None:
        self.status = status if status is not None else review_status()
        self.asked: list[str] = []
        self.error: ApiError | None = None
        self.now = 0.0

    async def __call__(self, token: str, audience: str) -> dict:
        assert audience == AUDIENCE
        self.asked.append(token)
        if self.error is not None:
            raise self.error
        return self.status

    def trust(self, known: Pods | None = None) -> TokenTrust:
        return TokenTrust(self, known or pods(), AUDIENCE, lambda: self.now)


def caller(bearer: str | None = None, auth=None, address: str = ADDRESS) -> Caller:
    metadata = {"authorization": f"Bearer {bearer}"} if bearer is not None else {}
    return Caller(metadata, auth or {}, address)


def ask(trust, hello=HELLO, bearer: str | None = None, auth=None, address: str = ADDRESS) -> str:
    return asyncio.run(trust(hello, caller(bearer, auth, address)))


def refusal(trust, hello=HELLO, bearer=None, auth=None, address=ADDRESS) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        ask(trust, hello, bearer, auth, address)
    return caught.value


def test_the_pod_of_the_token_may_serve_its_pool():
    """Its uid is the API server's word."""
    assert ask(FakeReviews().trust(), bearer=token()) == "uid-0"


@pytest.mark.parametrize("bearer", [None, "", "x" * 20_000])
def test_without_a_token_nobody_is_asked(bearer):
    """The text says how to give one."""
    reviews = FakeReviews()
    refused = refusal(reviews.trust(), bearer=bearer)

    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAUTHENTICATED, "no_token")
    assert "--control-token-path" in str(refused)
    assert not reviews.asked


@pytest.mark.parametrize(
    "status",
    [
        {},
        {"authenticated": False, "error": "token has been invalidated"},
        review_status(audiences=["another"]),
        review_status(audiences=None),
    ],
    ids=["empty", "invalid", "other audience", "no audience"],
)
def test_a_token_the_api_server_does_not_accept_for_us(status):
    """Also one that is good for others."""
    refused = refusal(FakeReviews(status).trust(), bearer=token())

    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAUTHENTICATED, "token")


@pytest.mark.parametrize(
    "user",
    [
        {},
        {"username": "system:serviceaccount:serving:default"},
        {"username": "alice", "extra": review_status()["user"]["extra"]},
        {"username": "system:serviceaccount:serving:default", "extra": None},
    ],
)
def test_a_token_that_is_not_a_pod_s(user):
    """A long-lived one, or a person's."""
    refused = refusal(FakeReviews(review_status(user=user)).trust(), bearer=token())

    assert (refused.code, refused.reason) == (grpc.StatusCode.PERMISSION_DENIED, "unbound_token")


@pytest.mark.parametrize(
    "hello",
    [
        {"pod_uid": "uid-1"},
        {"pod_name": "epp-1"},
        {"pod_namespace": "other"},
        {"pod_uid": ""},
    ],
)
def test_a_pod_that_claims_to_be_another(hello):
    """The token says whose it is."""
    claimed = pb.Hello()
    claimed.CopyFrom(HELLO)
    for name, value in hello.items():
        setattr(claimed, name, value)
    refused = refusal(FakeReviews().trust(), claimed, token())

    assert (refused.code, refused.reason) == (grpc.StatusCode.PERMISSION_DENIED, "other_pod")


def test_a_pod_of_another_namespace():
    """It may serve pools of its own only."""
    reviews = FakeReviews(review_status(namespace="other"))
    hello = pb.Hello(pool="serving/chat", pod_namespace="other", pod_name="epp-0", pod_uid="uid-0")

    assert refusal(reviews.trust(), hello, token(namespace="other")).reason == "other_namespace"


@pytest.mark.parametrize(
    ("pools", "reason"), [({}, "no_pool"), ({"serving/chat": {"uid-9": "epp-9"}}, "not_selected")]
)
def test_a_pod_that_is_not_one_of_the_pool_s_pickers_yet(pools, reason):
    """It may become one: it is to try again."""
    refused = refusal(FakeReviews().trust(Pods(pools.get, None)), bearer=token())

    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, reason)


def test_a_review_is_good_for_the_token_s_life_and_ten_minutes_at_most():
    """An outage of the API server does not cut EPPs off."""
    reviews = FakeReviews()
    trust, long, short = reviews.trust(), token(3600), token(30)
    ask(trust, bearer=long)
    ask(trust, bearer=short)
    reviews.error = ApiError(0, "down")
    reviews.now = 29.0
    assert ask(trust, bearer=long) == ask(trust, bearer=short) == "uid-0"

    reviews.now = 31.0
    assert ask(trust, bearer=long) == "uid-0"
    assert refusal(trust, bearer=short).reason == "review"
    reviews.now = 601.0
    assert refusal(trust, bearer=long).reason == "review"


def test_a_known_token_of_a_deleted_pod_is_refused():
    """What is remembered is whose it is, not that it may connect."""
    reviews, pools = FakeReviews(), {"serving/chat": {"uid-0": "epp-0"}}
    trust, bearer = reviews.trust(Pods(pools.get, None)), token()
    ask(trust, bearer=bearer)
    pools["serving/chat"] = {}

    assert refusal(trust, bearer=bearer).reason == "not_selected"


def test_a_refusal_is_remembered_for_seconds():
    """No longer: the pod may have been too young for the API server's cache."""
    reviews = FakeReviews({"error": "no such pod"})
    trust, bearer = reviews.trust(), token()
    for _ in range(100):
        assert "no such pod" in str(refusal(trust, bearer=bearer))
    assert len(reviews.asked) == 1
    reviews.status, reviews.now = review_status(), 5.1

    assert ask(trust, bearer=bearer) == "uid-0"


def test_an_answer_that_did_not_come_is_not_remembered():
    """The API server said nothing about this token."""
    reviews = FakeReviews()
    trust, bearer = reviews.trust(), token()
    reviews.error = ApiError(0, "down")
    assert refusal(trust, bearer=bearer).reason == "review"
    reviews.error = None

    assert ask(trust, bearer=bearer) == "uid-0"


@pytest.mark.parametrize(
    ("bearer", "reason"),
    [
        ("opaque", "token"),
        ("a.b.c", "token"),
        ("a..c", "token"),
        ("a.e30", "token"),
        (encoded(b"{}"), "token"),
        (encoded(b"[" * 9000), "token"),
        (encoded(b"\xff"), "token"),
        (encoded(b"3"), "token"),
        (token(iss=""), "token"),
        (token(iss=None), "token"),
        (token(aud=["https://kubernetes.default.svc"]), "token"),
        (token(aud=None), "token"),
        (token(exp="soon"), "token"),
        (token(exp=float("inf")), "token"),
        (token(-100_000.0), "token"),
        (token(nbf=time.time() + 100_000.0), "token"),
        (token(**{"kubernetes.io": None}), "unbound_token"),
        (token(**{"kubernetes.io": {"namespace": "serving"}}), "unbound_token"),
        (token(**{"kubernetes.io": {"namespace": 3, "pod": [1]}}), "unbound_token"),
        (token(uid="uid-1"), "other_pod"),
        (token(name="epp-1"), "other_pod"),
        (token(namespace="other"), "other_pod"),
    ],
)
def test_what_cannot_be_accepted_is_refused_without_asking(bearer, reason):
    """The API server need not see what says itself that it is not for us."""
    reviews = FakeReviews()

    assert refusal(reviews.trust(), bearer=bearer).reason == reason
    assert not reviews.asked


def test_what_a_token_claims_does_not_get_into_logs():
    """It is unverified; it may be long, and need not even be text."""
    refused = refusal(
        FakeReviews().trust(), bearer=token(name="\ud800" * 1000, namespace="x" * 999)
    )

    assert refused.reason == "other_pod"
    assert len(str(refused).encode()) < 200


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        (pods({}), "no_pool"),
        (pods({"serving/chat": {}}), "not_selected"),
        (pods(addresses={}), "other_address"),
    ],
)
def test_who_is_no_endpoint_picker_is_refused_without_asking(known, reason):
    """However good the token may be."""
    reviews = FakeReviews()

    assert refusal(reviews.trust(known), bearer=token()).reason == reason
    assert not reviews.asked


def test_the_audience_may_be_a_string():
    """RFC 7519 lets it be one; and the life of a token is by the API server's clock."""
    assert ask(FakeReviews().trust(), bearer=token(-3600.0, aud=AUDIENCE)) == "uid-0"


def test_what_a_token_claims_is_not_what_counts():
    """A forged one that claims to be the EPP's, and of which the API server says another."""
    reviews = FakeReviews(review_status(uid="uid-9", name="epp-9"))

    assert refusal(reviews.trust(), bearer=token()).reason == "other_pod"


@pytest.mark.parametrize(
    ("address", "served"),
    [("10.0.0.1", True), ("fd00::1", True), ("10.0.0.2", False), ("127.0.0.1", False), ("", False)],
)
def test_a_token_is_good_at_the_addresses_of_its_pod_only(address, served):
    """One that was stolen is worth nothing elsewhere."""
    trust = FakeReviews().trust()
    if served:
        assert ask(trust, bearer=token(), address=address) == "uid-0"
    else:
        refused = refusal(trust, bearer=token(), address=address)
        # It may be the new address of a pod whose status has not come yet.
        assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "other_address")
        assert "--control-peer-address" in str(refused)


def test_where_addresses_are_rewritten_any_will_do():
    """That is what --control-peer-address any says."""
    trust = FakeReviews().trust(pods(anywhere=True))

    assert ask(trust, bearer=token(), address="192.0.2.1") == "uid-0"


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:10.0.0.1:5000", "10.0.0.1"),
        ("ipv6:%5Bfd00::1%5D:5000", "fd00::1"),
        ("ipv6:[FD00::1]:5000", "fd00::1"),
        ("ipv6:%5B::ffff:10.0.0.1%5D:5000", "10.0.0.1"),
        ("unix:/run/socket", ""),
        ("", ""),
    ],
)
def test_the_address_in_grpc_s_name_of_a_peer(peer, address):
    """As gRPC writes them."""
    assert address_of(peer) == address


def test_what_is_remembered_is_bounded():
    """Tokens are renewed for months, and forged for free."""
    reviews = FakeReviews()
    trust = reviews.trust()

    async def many() -> None:
        for number in range(MAX_REVIEWS + 5):
            await trust(HELLO, caller(token(n=number)))
        reviews.status = {}
        for number in range(MAX_REFUSALS + 5):
            with pytest.raises(RefusedError):
                await trust(HELLO, caller(token(m=number)))

    asyncio.run(many())
    assert (len(trust._accepted), len(trust._refused)) == (MAX_REVIEWS, MAX_REFUSALS)


class SlowReviews:
    """An API server that answers when it is let, and counts how much it does at once."""

    def __init__(self) -> None:
        self.running = self.most = 0
        self.go = asyncio.Event()

    async def __call__(self, _token: str, _audience: str) -> dict:
        self.running += 1
        self.most = max(self.most, self.running)
        await self.go.wait()
        self.running -= 1
        return review_status()


def anywhere(reviews) -> TokenTrust:
    return TokenTrust(reviews, pods(anywhere=True), AUDIENCE)


async def test_few_reviews_run_at_once():
    """A peer of the port must not load the API server through us."""
    reviews = SlowReviews()
    trust = anywhere(reviews)
    calls = [
        asyncio.create_task(trust(HELLO, caller(token(n=n), address=f"10.0.0.{n % 100}")))
        for n in range(300)
    ]
    await asyncio.sleep(0)
    reviews.go.set()

    assert await asyncio.gather(*calls) == ["uid-0"] * 300
    assert reviews.most == MAX_REVIEWING


async def test_a_peer_that_floods_leaves_reviews_to_others():
    """It has four of the sixteen slots; what it asks for beyond is refused at once."""
    reviews = SlowReviews()
    trust = anywhere(reviews)
    flood = [
        asyncio.create_task(trust(HELLO, caller(token(n=n), address="10.6.6.6")))
        for n in range(500)
    ]
    await asyncio.sleep(0)
    honest = asyncio.create_task(trust(HELLO, caller(token())))
    await asyncio.sleep(0)
    assert reviews.running == MAX_REVIEWING_PER_PEER + 1
    reviews.go.set()

    assert await honest == "uid-0"
    results = await asyncio.gather(*flood, return_exceptions=True)
    refused = [result for result in results if isinstance(result, RefusedError)]
    assert len(refused) == 500 - MAX_REVIEWING_PER_PEER
    assert {error.reason for error in refused} == {"reviews"}
    assert not trust._reviewing_for


# --- certificates


def san(*names: str) -> dict:
    return {"x509_subject_alternative_name": [name.encode() for name in names]}


def certificate_trust() -> CertificateTrust:
    return CertificateTrust(pods())


def test_a_service_account_s_certificate_may_serve_a_pool_of_its_namespace():
    """The pod is the one that the Hello names; other names do not matter."""
    auth = san("epp.serving.svc", "spiffe://cluster.local/ns/serving/sa/epp")

    assert ask(certificate_trust(), auth=auth) == "uid-0"


@pytest.mark.parametrize(
    "auth",
    [
        {},
        san("epp.serving.svc"),
        san("spiffe://cluster.local/serving/epp"),
        san("spiffe://cluster.local/ns/serving/sa/epp/more"),
        san("spiffe://cluster.local/sa/serving/ns/epp"),
        {"x509_subject_alternative_name": [b"\xff\xfe"]},
    ],
)
def test_a_certificate_without_a_service_account(auth):
    """TLS was content; we are not."""
    refused = refusal(certificate_trust(), auth=auth)

    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAUTHENTICATED, "certificate")


def test_a_certificate_of_another_namespace():
    """It cannot speak for pods of this one."""
    auth = san("spiffe://cluster.local/ns/other/sa/epp")

    assert refusal(certificate_trust(), auth=auth).reason == "other_pod"


def test_a_certificate_and_a_pod_that_is_no_picker():
    """Having a certificate is not enough."""
    hello = pb.Hello(pool="serving/chat", pod_namespace="serving", pod_uid="uid-9")
    auth = san("spiffe://cluster.local/ns/serving/sa/epp")

    assert refusal(certificate_trust(), hello, auth=auth).reason == "not_selected"


def test_a_certificate_is_good_at_the_addresses_of_its_pod_only():
    """It is the service account's; which pod it is only the address tells."""
    auth = san("spiffe://cluster.local/ns/serving/sa/epp")

    assert refusal(certificate_trust(), auth=auth, address="10.0.0.2").reason == "other_address"


def test_on_loopback_the_hello_is_believed():
    """A process outside a cluster has no pod: its boot stands for it."""
    assert ask(unauthenticated) == "uid-0"
    assert ask(unauthenticated, pb.Hello(boot_id="b")) == "b"
