"""Who may connect. TokenReview is a fake here; tests/cluster asks the real API server."""

from __future__ import annotations

import asyncio
import base64
import json
import time

import grpc
import pytest

from forebay_control.v1 import control_pb2 as pb
from forebay_operator.admission import RefusedError
from forebay_operator.cluster import ApiError
from forebay_operator.trust import (
    MAX_REVIEWING,
    MAX_REVIEWS,
    CertificateTrust,
    TokenTrust,
    believe,
)

AUDIENCE = "forebay-control"
HELLO = pb.Hello(pool="serving/chat", pod_namespace="serving", pod_name="epp-0", pod_uid="uid-0")


def token(life_seconds: float = 3600.0, **claims) -> str:
    payload = json.dumps({"exp": time.time() + life_seconds, **claims}).encode()
    return f"e30.{base64.urlsafe_b64encode(payload).decode().rstrip('=')}.c2ln"


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

    def trust(self, pools: dict | None = None) -> TokenTrust:
        pools = {"serving/chat": {"uid-0": "epp-0"}} if pools is None else pools
        return TokenTrust(self, pools.get, AUDIENCE, lambda: self.now)


def ask(trust, hello=HELLO, bearer: str | None = None, auth=None) -> str:
    metadata = {"authorization": f"Bearer {bearer}"} if bearer is not None else {}
    return asyncio.run(trust(hello, metadata, auth or {}))


def refusal(trust, hello=HELLO, bearer=None, auth=None) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        ask(trust, hello, bearer, auth)
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
    """Its pool would be its own business only."""
    reviews = FakeReviews(review_status(namespace="other"))
    hello = pb.Hello(pool="serving/chat", pod_namespace="other", pod_name="epp-0", pod_uid="uid-0")

    assert refusal(reviews.trust(), hello, token()).reason == "other_namespace"


@pytest.mark.parametrize(
    ("pools", "reason"), [({}, "no_pool"), ({"serving/chat": {"uid-9": "epp-9"}}, "not_selected")]
)
def test_a_pod_that_is_not_one_of_the_pool_s_pickers_yet(pools, reason):
    """It may become one: it is to try again."""
    refused = refusal(FakeReviews().trust(pools), bearer=token())

    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, reason)


def test_a_review_is_good_for_the_token_s_life_and_ten_minutes_at_most():
    """An outage of the API server does not cut pickers off."""
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
    trust, bearer = reviews.trust(pools), token()
    ask(trust, bearer=bearer)
    pools["serving/chat"] = {}

    assert refusal(trust, bearer=bearer).reason == "not_selected"


def test_a_refusal_is_not_remembered():
    """The pod may have been too young for the API server's cache."""
    reviews = FakeReviews({})
    trust, bearer = reviews.trust(), token()
    refusal(trust, bearer=bearer)
    reviews.status = review_status()

    assert ask(trust, bearer=bearer) == "uid-0"


@pytest.mark.parametrize("bearer", ["opaque", "a.b.c", "a.e30.c", token(exp="x"), token(exp=0)])
def test_a_token_that_does_not_tell_its_life_is_reviewed(bearer):
    """Whatever it looks like: the API server decides."""
    assert ask(FakeReviews().trust(), bearer=bearer) == "uid-0"


def test_what_is_remembered_is_bounded():
    """Tokens are renewed for months."""
    reviews = FakeReviews()
    trust = reviews.trust()

    async def many() -> None:
        for number in range(MAX_REVIEWS + 5):
            await trust(HELLO, {"authorization": f"Bearer {token(n=number)}"}, {})

    asyncio.run(many())
    assert len(trust._reviews) == MAX_REVIEWS


def test_few_reviews_run_at_once():
    """Whoever reaches the port must not load the API server through us."""
    running, most = 0, 0

    async def review(_token: str, _audience: str) -> dict:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return {}

    async def flood() -> None:
        trust = TokenTrust(review, {}.get, AUDIENCE)
        calls = [trust(HELLO, {"authorization": f"Bearer {n}"}, {}) for n in range(500)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(result, RefusedError) for result in results)

    asyncio.run(flood())
    assert most == MAX_REVIEWING


# --- certificates


def san(*names: str) -> dict:
    return {"x509_subject_alternative_name": [name.encode() for name in names]}


def certificate_trust() -> CertificateTrust:
    return CertificateTrust({"serving/chat": {"uid-0": "epp-0"}}.get)


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


def test_on_loopback_the_hello_is_believed():
    """A process outside a cluster has no pod: its boot stands for it."""
    assert ask(believe) == "uid-0"
    assert ask(believe, pb.Hello(boot_id="b")) == "b"
