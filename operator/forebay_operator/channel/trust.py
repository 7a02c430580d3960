"""Authenticates a control stream: does it come from an EPP of the pool that it names?

In a cluster an EPP shows a projected service account token, bound to its pod and to our audience;
the API server authenticates it (TokenReview), and the pod must be behind the pool's EPP Service.
The token's own claims are checked first, so that forged tokens rarely reach the API server. With
certificates instead, the service account stands in the certificate's URI (spiffe://<trust
domain>/ns/<namespace>/sa/<name>) and the pod is taken from the Hello. Either must come from the
address of its pod, so that a stolen one is worth nothing elsewhere. Without either, on loopback,
the Hello is trusted. Sources: KEP-1205 (bound tokens), SPIFFE-ID.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import math
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc

from forebay_operator.channel.admission import RefusedError
from forebay_operator.cluster.api import ApiError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Mapping

    from forebay_control.v1 import control_pb2 as pb
    from forebay_operator.channel.admission import Caller

MAX_TOKEN_BYTES = 16 << 10
MAX_REVIEWS = 4096
MAX_REFUSALS = 1024
MAX_ERROR = 200
MAX_REVIEWING = 16  # at once: otherwise any peer of the port could load the API server
MAX_REVIEWING_PER_PEER = 4
REVIEW_SECONDS = 600.0
REFUSAL_SECONDS = 5.0
# Only the API server's clock counts exactly: ours may be a day wrong and EPPs still connect.
CLOCK_SECONDS = 90_000.0
_POD_NAME = "authentication.kubernetes.io/pod-name"
_POD_UID = "authentication.kubernetes.io/pod-uid"

_UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
_DENIED = grpc.StatusCode.PERMISSION_DENIED
_UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


async def unauthenticated(hello: pb.Hello, _caller: Caller) -> str:
    """Take a Hello as it is: on loopback every process may ask for a pool's program."""
    return hello.pod_uid or hello.boot_id


class _Pod(NamedTuple):
    uid: str
    name: str
    namespace: str


@dataclass(frozen=True, slots=True)
class Pods:
    """The known EPPs.

    Attributes:
        expected: the EPPs of a pool (name by pod uid), or None for an unknown pool.
        addresses: the IP addresses of a pod by its uid, or None where any address will do.
        is_deleted: whether an unknown pool is known to be deleted: any pod of its namespace may
            hear that.
    """

    expected: Callable[[str], Mapping[str, str] | None]
    addresses: Callable[[str], Collection[str]] | None
    is_deleted: Callable[[str], bool] = lambda _: False

    def check(self, pool: str, namespace: str, uid: str, address: str) -> None:
        """Raise RefusedError unless the pod is an EPP of the pool and has this address."""
        if pool.partition("/")[0] != namespace:
            raise RefusedError(
                _DENIED,
                "other_namespace",
                f"a pod of namespace {namespace} cannot serve pool {pool}",
            )
        expected = self.expected(pool)
        if expected is None and self.is_deleted(pool):
            return
        if expected is None:
            raise RefusedError(_UNAVAILABLE, "no_pool", f"InferencePool {pool} is not known (yet)")
        if uid not in expected:
            raise RefusedError(
                _UNAVAILABLE,
                "not_selected",
                f"the pod is not (yet) running behind the endpointPickerRef Service of {pool}: "
                "check the Service's selector",
            )
        if self.addresses is not None and address not in self.addresses(uid):
            raise RefusedError(
                _UNAVAILABLE,  # the pod may have a new one that is not known yet
                "other_address",
                f"the stream comes from {address or 'no IP address'}, which is not (yet) the "
                "pod's: where the network or a mesh rewrites addresses, run the operator with "
                "--control-peer-address any",
            )


class TokenTrust:
    """Reviews tokens.

    Args:
        review: asks the API server about a token; see cluster.Cluster.review_token.
        pods: what is known of EPPs.
        audience: the token has to be for us.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        review: Callable[[str, str], Awaitable[dict[str, Any]]],
        pods: Pods,
        audience: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._review = review
        self._pods = pods
        self._audience = audience
        self._clock = clock
        self._accepted = _Remembered(MAX_REVIEWS)
        self._refused = _Remembered(MAX_REFUSALS)
        self._reviewing = asyncio.Semaphore(MAX_REVIEWING)
        self._reviewing_for: Counter[str] = Counter()  # by address

    async def __call__(self, hello: pb.Hello, caller: Caller) -> str:
        """Return the pod's uid, or raise RefusedError."""
        scheme, _, token = str(caller.metadata.get("authorization", "")).partition(" ")
        if scheme.lower() != "bearer" or not token or len(token) > MAX_TOKEN_BYTES:
            raise RefusedError(
                _UNAUTHENTICATED,
                "no_token",
                f"no bearer token: mount a service account token for audience {self._audience} "
                "and name it with --control-token-path",
            )
        self._check(hello, caller, self._claimed(token))
        status = await self._reviewed(token, caller.address)
        if not status.get("authenticated") or self._audience not in (status.get("audiences") or ()):
            why = str(status.get("error") or "not authenticated")[:MAX_ERROR]
            raise self._bad_token(f"the API server says: {why}")
        pod = _pod_of(status)
        self._check(hello, caller, pod)  # for good, and again: asking has taken its time
        return pod.uid

    def _check(self, hello: pb.Hello, caller: Caller, pod: _Pod) -> None:
        """Refuse a pod that is not the Hello's, or not one of the pool's EPPs."""
        if not pod.uid or not pod.namespace:
            raise RefusedError(
                _DENIED, "unbound_token", "the token is not bound to a pod: use a projected one"
            )
        if (hello.pod_uid, hello.pod_name, hello.pod_namespace) != pod:
            raise RefusedError(
                _DENIED,
                "other_pod",
                # It does not say whose the token is, which may not be verified yet.
                f"the token is not that of pod {hello.pod_namespace}/{hello.pod_name}",
            )
        self._pods.check(hello.pool, pod.namespace, pod.uid, caller.address)

    def _bad_token(self, why: str) -> RefusedError:
        return RefusedError(
            _UNAUTHENTICATED,
            "token",
            f"the token is not accepted for audience {self._audience}: {why}",
        )

    def _claimed(self, token: str) -> _Pod:
        """Return the pod that a token claims to be of, unverified.

        Raises:
            RefusedError: the API server would not accept it.
        """
        claims = _claims(token)
        if claims is None or not isinstance(claims.get("iss"), str) or not claims["iss"]:
            raise self._bad_token("it is not a service account token")
        audiences = claims.get("aud")
        if self._audience not in (audiences if isinstance(audiences, list) else [audiences]):
            raise self._bad_token("it is for another audience")
        now = time.time()
        begins, ends = _number(claims.get("nbf", 0)), _number(claims.get("exp"))
        if not (begins - CLOCK_SECONDS <= now <= ends + CLOCK_SECONDS):
            raise self._bad_token("it has expired or is not valid yet")
        bound = _table(claims.get("kubernetes.io"))
        pod = _table(bound.get("pod"))
        return _Pod(
            *(str(part or "") for part in (pod.get("uid"), pod.get("name"), bound.get("namespace")))
        )

    async def _reviewed(self, token: str, address: str) -> dict[str, Any]:
        """Ask once per token and its life, so that an API outage does not cut EPPs off.

        A refusal is remembered for seconds: the pod may be too young for the API server's cache.
        """
        key = hashlib.sha256(token.encode(errors="replace")).digest()
        now = self._clock()
        known = self._accepted.get(key, now) or self._refused.get(key, now)
        if known is not None:
            return known
        if self._reviewing_for[address] >= MAX_REVIEWING_PER_PEER:
            raise RefusedError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "reviews",
                f"{MAX_REVIEWING_PER_PEER} tokens from {address} are being reviewed already",
            )
        self._reviewing_for[address] += 1
        try:
            async with self._reviewing:
                status = await self._review(token, self._audience)
        except ApiError as error:
            raise RefusedError(
                _UNAVAILABLE, "review", f"the token cannot be reviewed: {error}"
            ) from error
        finally:
            self._reviewing_for[address] -= 1
            if not self._reviewing_for[address]:
                del self._reviewing_for[address]
        if status.get("authenticated"):
            self._accepted.put(key, status, now + min(REVIEW_SECONDS, _life(token)))
        else:
            self._refused.put(
                key, {"error": str(status.get("error") or "")[:MAX_ERROR]}, now + REFUSAL_SECONDS
            )
        return status


class _Remembered:
    """The API server's answers by token hash, each for a while; the oldest is dropped first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._answers: OrderedDict[bytes, tuple[float, dict[str, Any]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: bytes, now: float) -> dict[str, Any] | None:
        until, answer = self._answers.get(key, (0.0, None))
        return answer if answer is not None and now < until else None

    def put(self, key: bytes, answer: dict[str, Any], until: float) -> None:
        self._answers[key] = (until, answer)
        while len(self._answers) > self._most:
            self._answers.popitem(last=False)


class CertificateTrust:
    """Reads the client's certificate; TLS has already checked its chain.

    Args:
        pods: what is known of EPPs.
    """

    def __init__(self, pods: Pods) -> None:
        self._pods = pods

    async def __call__(self, hello: pb.Hello, caller: Caller) -> str:
        """Return the pod's uid, or raise RefusedError."""
        names = [bytes(name).decode(errors="replace") for name in caller.auth.get(_SAN, ())]
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
        self._pods.check(hello.pool, namespace, hello.pod_uid, caller.address)
        return hello.pod_uid


_SAN = "x509_subject_alternative_name"


def _pod_of(status: dict[str, Any]) -> _Pod:
    """Return the pod that the API server says a token is bound to; unknown parts are empty."""
    user = status.get("user") or {}
    extra = user.get("extra") or {}
    uid, name = (str((extra.get(key) or [""])[0]) for key in (_POD_UID, _POD_NAME))
    parts = str(user.get("username", "")).split(":")
    namespace = parts[2] if parts[:2] == ["system", "serviceaccount"] else ""
    return _Pod(uid, name, namespace)


def _claims(token: str) -> dict[str, Any] | None:
    """Return what a JWT says, unverified; None for what is not a JWT."""
    parts = token.split(".")
    if len(parts) != 3 or not all(parts):
        return None
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (ValueError, RecursionError):
        return None
    return claims if isinstance(claims, dict) else None


def _table(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float:
    """Return a time from a token; NaN if it is not one."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e15 else math.nan


def _life(token: str) -> float:
    """Return for how many seconds a JWT is still valid by its own account and our clock."""
    return max(0.0, _number((_claims(token) or {}).get("exp")) - time.time())
