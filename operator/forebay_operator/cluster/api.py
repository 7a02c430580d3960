"""The only caller of the Kubernetes API besides kopf's watches.

Lists, watches of pods, server-side apply of statuses, Events, leases, token reviews, the control
channel's certificates: each one request, with the credentials that kopf logs in with. Nothing is
retried here except an expired login: the caller knows how long an answer is worth
waiting for.
kopf.ConnectionInfo and aiohttp in place of the kubernetes client, which alone would be more than
half of the operator's memory.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import json
import time
from typing import TYPE_CHECKING, Any

import aiohttp
import kopf

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from forebay_operator.resources import Kind

FIELD_MANAGER = "forebay-operator"
REQUEST_SECONDS = 30.0
LOGIN_SECONDS = 60.0  # a service account's token file is renewed while we run
PAGE_OBJECTS = 250  # pods of 5.6 KB: 15 ms to parse
MAX_REQUESTS = 32  # at once, besides watches
WATCH_SECONDS = 300
MAX_LINE_BYTES = 8 << 20  # etcd's objects have 1.5 MB
MAX_EVENT_MESSAGE = 1024

_APPLY = "application/apply-patch+yaml"


class ApiError(Exception):
    """The API server answered with an error, or could not be asked (status 0)."""

    def __init__(self, status: int, message: str, retry_after_seconds: float = 0.0) -> None:
        super().__init__(f"{status}: {message}" if status else message)
        self.status = status
        self.retry_after_seconds = retry_after_seconds


def login() -> kopf.ConnectionInfo:
    """Find credentials: a pod's service account, else the kubeconfig.

    Raises:
        ApiError: there are none.
    """
    settings = kopf.OperatorSettings()
    info = kopf.login_with_service_account(settings=settings) or kopf.login_with_kubeconfig(
        settings=settings
    )
    if info is None:
        raise ApiError(0, "no credentials: not in a pod, and no kubeconfig (set KUBECONFIG)")
    return info


def now_text() -> str:
    """Return the wall-clock time as Kubernetes writes it."""
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclasses.dataclass(frozen=True, slots=True)
class Page:
    """A part of a LIST; `version` is the whole LIST's, from which a watch may continue."""

    items: list[dict[str, Any]]
    version: str


class Cluster:
    """One API server.

    Args:
        get_login: finds credentials.
        manager: owns the fields that are written by server-side apply.
    """

    def __init__(
        self,
        get_login: Callable[[], kopf.ConnectionInfo] = login,
        manager: str = FIELD_MANAGER,
    ) -> None:
        self._manager = manager
        self._get_login = get_login
        self._info: kopf.ConnectionInfo | None = None
        self._session: aiohttp.ClientSession | None = None
        self._login_at = 0.0
        self._requests = asyncio.Semaphore(MAX_REQUESTS)

    async def close(self) -> None:
        """Close connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def pages(self, kind: Kind, namespace: str = "") -> AsyncIterator[Page]:
        """Yield all objects of a kind, of one namespace or of all, as a quorum read in pages.

        Raises:
            ApiError: status 404 where the kind's CRD does not exist.
        """
        query = {"limit": str(PAGE_OBJECTS)}
        if kind.label:
            query["labelSelector"] = kind.label
        while True:
            page = await self.request("GET", _path(kind, namespace), query=query)
            if not str(page.get("kind", "")).endswith("List"):
                # An unlisted object counts as deleted: no proxy's page may pass for an empty list.
                raise ApiError(0, f"expected a List, got {str(page)[:100]}")
            metadata = page.get("metadata") or {}
            yield Page(page.get("items") or [], str(metadata.get("resourceVersion") or ""))
            query["continue"] = metadata.get("continue") or ""
            if not query["continue"]:
                return

    async def watch(
        self, kind: Kind, namespace: str, version: str
    ) -> AsyncIterator[dict[str, Any]]:
        """Yield the events after a version until the API server ends the watch, in some minutes.

        Raises:
            ApiError: it cannot be watched; 410 where the version is too old.
        """
        session, info = await self._connect(fresh=False)
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(WATCH_SECONDS),
        }
        headers = {**info.as_http_headers(), "accept": "application/json"}
        timeout = aiohttp.ClientTimeout(total=WATCH_SECONDS + 30.0, sock_connect=10.0)
        url = info.server.rstrip("/") + _path(kind, namespace)
        try:
            async with session.get(url, params=query, headers=headers, timeout=timeout) as answer:
                if answer.status >= 400:
                    raise await _error(answer)
                async for line in _lines(answer):
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        status = event["object"]
                        message = str(status.get("message", ""))
                        raise ApiError(int(status.get("code") or 0), message[:500])
                    yield event
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError) as error:
            text = str(error) or type(error).__name__
            raise ApiError(0, f"the watch broke: {text}") from error

    async def apply_status(
        self, kind: Kind, namespace: str, name: str, uid: str, status: dict[str, Any]
    ) -> dict[str, Any]:
        """Write the parts of a status that are ours and return the object.

        The uid is a condition: the status of a deleted object never lands on its successor.
        """
        body = {
            "apiVersion": kind.api_version,
            "kind": kind.kind,
            "metadata": {"name": name, "namespace": namespace, "uid": uid},
            "status": status,
        }
        return await self.request(
            "PATCH",
            f"{_path(kind, namespace)}/{name}/status",
            body=body,
            query={"fieldManager": self._manager, "force": "true"},
            content_type=_APPLY,
        )

    async def event(
        self,
        *,
        api_version: str,
        kind: str,
        namespace: str,
        name: str,
        uid: str = "",
        warning: bool,
        reason: str,
        message: str,
    ) -> None:
        """Post a Kubernetes Event about an object."""
        now = now_text()
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"generateName": f"{name[:200]}.", "namespace": namespace},
            "involvedObject": {
                "apiVersion": api_version,
                "kind": kind,
                "namespace": namespace,
                "name": name,
                "uid": uid,
            },
            "type": "Warning" if warning else "Normal",
            "reason": reason,
            "message": message[:MAX_EVENT_MESSAGE],
            "source": {"component": FIELD_MANAGER},
            "reportingComponent": "forebay.dev/operator",
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        await self.request("POST", f"/api/v1/namespaces/{namespace}/events", body=body)

    async def review_token(self, token: str, audience: str) -> dict[str, Any]:
        """Have the API server authenticate a token; return its TokenReviewStatus."""
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [audience]},
        }
        answer = await self.request("POST", "/apis/authentication.k8s.io/v1/tokenreviews", body)
        status = answer.get("status")
        return status if isinstance(status, dict) else {}

    async def get_lease(self, namespace: str, name: str) -> dict[str, Any] | None:
        """Return a Lease, or None where there is none."""
        try:
            return await self.request("GET", f"{_leases(namespace)}/{name}")
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def put_lease(self, namespace: str, name: str, lease: dict[str, Any]) -> dict[str, Any]:
        """Replace the Lease whose resourceVersion it carries, or without one create it.

        PUT creates Leases too, and unlike POST it names what it creates, so that the right to do so
        can be given for one name.

        Raises:
            ApiError: 409 when another writer was faster; 422 when it was to be created and exists.
        """
        return await self.request("PUT", f"{_leases(namespace)}/{name}", lease)

    async def get_object(self, plural: str, namespace: str, name: str) -> dict[str, Any]:
        """Return a Secret or ConfigMap.

        Raises:
            ApiError: 404 where there is none.
        """
        return await self.request("GET", f"/api/v1/namespaces/{namespace}/{plural}/{name}")

    async def put_object(
        self, plural: str, namespace: str, name: str, manifest: dict[str, Any]
    ) -> dict[str, Any]:
        """Replace the Secret or ConfigMap whose resourceVersion the manifest carries.

        Raises:
            ApiError: 409 when another writer was faster.
        """
        path = f"/api/v1/namespaces/{namespace}/{plural}/{name}"
        return await self.request("PUT", path, manifest)

    async def request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        query: dict[str, str] | None = None,
        content_type: str = "application/json",
    ) -> dict[str, Any]:
        """Send one request.

        Raises:
            ApiError: the answer is an error, or does not come.
        """
        for fresh in (False, True):
            session, info = await self._connect(fresh=fresh)
            headers = {**info.as_http_headers(), "accept": "application/json"}
            if body is not None:
                headers["content-type"] = content_type
            try:
                async with (
                    self._requests,
                    session.request(
                        *(method, info.server.rstrip("/") + path),
                        json=body,
                        params=query,
                        headers=headers,
                    ) as answer,
                ):
                    if answer.status == 401:
                        continue
                    if answer.status >= 400:
                        raise await _error(answer)
                    found = await answer.json()
                    return found if isinstance(found, dict) else {}
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                text = str(error) or type(error).__name__
                raise ApiError(0, f"request to the API server failed: {text}") from error
        raise ApiError(401, "the API server does not accept our credentials")

    async def _connect(self, *, fresh: bool) -> tuple[aiohttp.ClientSession, kopf.ConnectionInfo]:
        """Return a session with credentials that are recent, or new ones."""
        now = time.monotonic()
        if self._info is None or fresh or now - self._login_at > LOGIN_SECONDS:
            try:
                info = self._get_login()
                tls = info.as_ssl_context()
            except ApiError:
                raise
            except Exception as error:
                # A file that is being renewed may be read in part, and whole by the next request.
                raise ApiError(0, f"the credentials cannot be read: {error!r}") from error
            self._login_at = now
            if self._session is None or _anonymous(info) != _anonymous(self._info):
                await self.close()
                self._session = aiohttp.ClientSession(
                    connector=aiohttp.TCPConnector(ssl=tls, limit=0),
                    timeout=aiohttp.ClientTimeout(total=REQUEST_SECONDS, sock_connect=10.0),
                    headers={"user-agent": FIELD_MANAGER},
                )
            self._info = info
        if self._session is None:
            raise AssertionError("a login makes a session")
        return self._session, self._info


def _anonymous(info: kopf.ConnectionInfo | None) -> kopf.ConnectionInfo | None:
    """Return what connections depend on, so that a new token does not close them."""
    return info and dataclasses.replace(info, token=None)


async def _lines(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Yield the lines of an answer, which may be longer than aiohttp allows by itself."""
    rest = b""
    async for chunk in answer.content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line
        if len(rest) > MAX_LINE_BYTES:
            raise ValueError("an event is larger than 8 MiB")


def _path(kind: Kind, namespace: str) -> str:
    root = f"/apis/{kind.group}/{kind.version}" if kind.group else f"/api/{kind.version}"
    return f"{root}/namespaces/{namespace}/{kind.plural}" if namespace else f"{root}/{kind.plural}"


def _leases(namespace: str) -> str:
    return f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"


async def _error(answer: aiohttp.ClientResponse) -> ApiError:
    try:
        retry_after = min(60.0, max(0.0, float(answer.headers.get("retry-after", ""))))
    except ValueError:
        retry_after = 0.0
    text = (await answer.text())[:2000]
    try:
        message = str((await answer.json()).get("message") or text)
    except (ValueError, aiohttp.ClientError, AttributeError):
        message = text
    return ApiError(answer.status, message[:500], retry_after)
