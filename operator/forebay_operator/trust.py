"""Whether a control stream comes from an endpoint picker of the pool it names.

In a cluster a picker shows a projected service account token, bound to its pod and to our audience;
the API server says whose it is (TokenReview), and the pod has to be one behind the pool's endpoint
picker Service. With certificates instead, the service account stands in the certificate's URI
(spiffe://<trust domain>/ns/<namespace>/sa/<name>) and the pod is taken from the Hello. Without
either, on loopback, the Hello is believed. Sources: KEP-1205 (bound tokens), SPIFFE-ID.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import grpc

from forebay_operator.admission import RefusedError
from forebay_operator.cluster import ApiError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from forebay_control.v1 import control_pb2 as pb

MAX_TOKEN_BYTES = 16 << 10
MAX_REVIEWS = 4096
MAX_REVIEWING = 16  # at once: whoever reaches the port could otherwise load the API server
REVIEW_SECONDS = 600.0
_POD_NAME = "authentication.kubernetes.io/pod-name"
_POD_UID = "authentication.kubernetes.io/pod-uid"

_UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
_DENIED = grpc.StatusCode.PERMISSION_DENIED


async def believe(hello: pb.Hello, _metadata: Mapping[str, Any], _auth: Mapping[str, Any]) -> str:
    """Believe the Hello: everybody on this machine's loopback may program what runs here."""
    return hello.pod_uid or hello.boot_id


class TokenTrust:
    """Reviews tokens.

    Args:
        review: asks the API server about a token; see cluster.Cluster.review_token.
        expected: the endpoint pickers of a pool (name by pod uid), or None for an unknown pool.
        audience: the token has to be for us.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        review: Callable[[str, str], Awaitable[dict[str, Any]]],
        expected: Callable[[str], Mapping[str, str] | None],
        audience: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._review = review
        self._expected = expected
        self._audience = audience
        self._clock = clock
        self._reviews: OrderedDict[bytes, tuple[float, dict[str, Any]]] = OrderedDict()
        self._reviewing = asyncio.Semaphore(MAX_REVIEWING)

    async def __call__(
        self, hello: pb.Hello, metadata: Mapping[str, Any], _auth: Mapping[str, Any]
    ) -> str:
        """Return the pod's uid, or raise RefusedError."""
        scheme, _, token = str(metadata.get("authorization", "")).partition(" ")
        if scheme.lower() != "bearer" or not token or len(token) > MAX_TOKEN_BYTES:
            raise RefusedError(
                _UNAUTHENTICATED,
                "no_token",
                f"no bearer token: mount a service account token for audience {self._audience} "
                "and name it with --control-token-path",
            )
        status = await self._reviewed(token)
        if not status.get("authenticated") or self._audience not in (status.get("audiences") or ()):
            raise RefusedError(
                _UNAUTHENTICATED,
                "token",
                "the API server does not accept the token for audience "
                f"{self._audience}: {status.get('error') or 'not authenticated'}",
            )
        user = status.get("user") or {}
        extra = user.get("extra") or {}
        uid, name = (str((extra.get(key) or [""])[0]) for key in (_POD_UID, _POD_NAME))
        parts = str(user.get("username", "")).split(":")
        namespace = parts[2] if parts[:2] == ["system", "serviceaccount"] else ""
        if not uid or not namespace:
            raise RefusedError(
                _DENIED, "unbound_token", "the token is not bound to a pod: use a projected one"
            )
        if (hello.pod_uid, hello.pod_name, hello.pod_namespace) != (uid, name, namespace):
            raise RefusedError(
                _DENIED,
                "other_pod",
                f"the token is that of pod {namespace}/{name}, not the Hello's",
            )
        _check_pool(hello.pool, namespace, uid, self._expected)
        return uid

    async def _reviewed(self, token: str) -> dict[str, Any]:
        """Ask once per token and its life, so that an API outage does not cut pickers off."""
        key = hashlib.sha256(token.encode(errors="replace")).digest()
        now = self._clock()
        known = self._reviews.get(key)
        if known is not None and now < known[0]:
            return known[1]
        try:
            async with self._reviewing:
                status = await self._review(token, self._audience)
        except ApiError as error:
            raise RefusedError(
                grpc.StatusCode.UNAVAILABLE, "review", f"the token cannot be reviewed: {error}"
            ) from error
        if status.get("authenticated"):
            self._reviews[key] = (now + min(REVIEW_SECONDS, _life(token)), status)
            while len(self._reviews) > MAX_REVIEWS:
                self._reviews.popitem(last=False)
        return status


class CertificateTrust:
    """Reads the client's certificate; TLS has already checked its chain.

    Args:
        expected: the endpoint pickers of a pool (name by pod uid), or None for an unknown pool.
    """

    def __init__(self, expected: Callable[[str], Mapping[str, str] | None]) -> None:
        self._expected = expected

    async def __call__(
        self, hello: pb.Hello, _metadata: Mapping[str, Any], auth: Mapping[str, Any]
    ) -> str:
        """Return the pod's uid, or raise RefusedError."""
        names = [bytes(name).decode(errors="replace") for name in auth.get(_SAN, ())]
        found = [name.split("/") for name in names if name.startswith("spiffe://")]
        # spiffe: / "" / domain / ns / namespace / sa / name
        if not found or len(found[0]) != 7 or found[0][3] != "ns" or found[0][5] != "sa":
            raise RefusedError(
                _UNAUTHENTICATED,
                "certificate",
                "the certificate has no URI spiffe://<domain>/ns/<namespace>/sa/<name>",
            )
        namespace = found[0][4]
        if hello.pod_namespace != namespace:
            raise RefusedError(
                _DENIED, "other_pod", f"the certificate is for namespace {namespace}"
            )
        _check_pool(hello.pool, namespace, hello.pod_uid, self._expected)
        return hello.pod_uid


_SAN = "x509_subject_alternative_name"


def _check_pool(
    pool: str,
    namespace: str,
    uid: str,
    expected: Callable[[str], Mapping[str, str] | None],
) -> None:
    """Refuse a pod that is not one of the pool's endpoint pickers."""
    if pool.partition("/")[0] != namespace:
        raise RefusedError(
            _DENIED, "other_namespace", f"a pod of namespace {namespace} cannot serve pool {pool}"
        )
    pickers = expected(pool)
    if pickers is None:
        raise RefusedError(
            grpc.StatusCode.UNAVAILABLE, "no_pool", f"InferencePool {pool} is not known (yet)"
        )
    if uid not in pickers:
        raise RefusedError(
            grpc.StatusCode.UNAVAILABLE,
            "not_selected",
            f"the pod is not (yet) running behind the endpointPickerRef Service of {pool}: "
            "check the Service's selector",
        )


def _life(token: str) -> float:
    """Return how many seconds a JWT is still valid by its own account; 60 if it does not say."""
    try:
        payload = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return max(0.0, float(claims["exp"]) - time.time())
    except (IndexError, ValueError, KeyError, TypeError):
        return 60.0
