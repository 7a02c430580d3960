"""Keeps the control channel's certificates in a Secret, and their CAs published in ConfigMaps.

Every replica does this and serves what the Secret holds, the leading one and the others: of two
that write at once the API server accepts one, and the other reads again. The objects must exist,
because the operator may write them but not create any. Their content is decided in authority.py.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import datetime as dt
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from forebay_operator import metrics
from forebay_operator.certificates import authority
from forebay_operator.cluster.api import ApiError
from forebay_operator.pacing import Backoff, jittered

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from forebay_operator.cluster.denials import Denials

LOOK_SECONDS = 60.0
MIN_RETRY_SECONDS = 0.5
_RESOURCE = "configmaps"

_log = logging.getLogger(__name__)


class Objects(Protocol):
    """The calls needed of a cluster; cluster.Cluster fits."""

    async def get_object(self, plural: str, namespace: str, name: str) -> dict[str, Any]:
        """Return a Secret or ConfigMap."""

    async def put_object(
        self, plural: str, namespace: str, name: str, manifest: dict[str, Any]
    ) -> dict[str, Any]:
        """Replace it; 409 when another writer was faster."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where certificates are kept: a Secret, and ConfigMaps as (namespace, name)."""

    namespace: str
    secret: str
    config_maps: tuple[tuple[str, str], ...]


class Issuer:
    """Issues what is due, and knows what is to be served.

    Args:
        cluster: the API.
        places: where it is kept.
        server_name: the DNS name by which EPPs know the operator.
        denials: notified of ConfigMaps in which the CAs cannot be published.
        time_of_day: seconds since 1970.
    """

    def __init__(
        self,
        cluster: Objects,
        places: Places,
        server_name: str,
        denials: Denials,
        time_of_day: Callable[[], float] = time.time,
    ) -> None:
        self._cluster = cluster
        self._places = places
        self._server_name = server_name
        self._time_of_day = time_of_day
        self._denials = denials
        self._pair: tuple[bytes, bytes] | None = None

    @property
    def pair(self) -> tuple[bytes, bytes]:
        """Key and certificate to serve, as PEM.

        Raises:
            ValueError: there is none yet.
        """
        if self._pair is None:
            raise ValueError("no certificate has been issued yet")
        return self._pair

    async def first(self) -> None:
        """Issue until there is something to serve; publishing it is left to `run`."""
        backoff = Backoff(LOOK_SECONDS, MIN_RETRY_SECONDS, jitter=0.5)
        while True:
            if await self._try(self._issue_from_secret()):
                return
            await asyncio.sleep(backoff.next_seconds())

    async def run(self) -> None:
        """Look now and from time to time, until cancelled."""
        while True:
            await self._try(self.look())
            await asyncio.sleep(jittered(LOOK_SECONDS))

    async def _try(self, work: Awaitable[object]) -> bool:
        try:
            await work
        except ApiError as error:
            if error.status != 409:  # 409: another replica was faster
                _log.error("the control channel's certificates failed: %s", error)
            return False
        return True

    async def look(self) -> None:
        """Read what there is, issue what is due and serve it, then publish the CAs.

        Each ConfigMap separately: the failure of one does not affect the leaf or the others,
        and one that cannot be read counts as absent.

        Raises:
            ApiError: the Secret cannot be read or written; what was served before still is.
        """
        secret = await self._issue_from_secret()
        maps = await asyncio.gather(*map(self._config_map, self._places.config_maps))
        _, wanted = await self._issue(secret, [_bundle(each) for each in maps if each])
        await asyncio.gather(
            *(
                self._publish(place, each, wanted[authority.CA])
                for place, each in zip(self._places.config_maps, maps, strict=True)
                if each is not None
            )
        )

    async def _issue_from_secret(self) -> dict[str, Any]:
        """Issue and serve without a look at what is published; return the Secret.

        A leaf of an older CA stays where it is not known that the new CA is published.
        """
        secret = await self._cluster.get_object(
            "secrets", self._places.namespace, self._places.secret
        )
        secret, _ = await self._issue(secret, [b""])
        return secret

    async def _issue(
        self, secret: dict[str, Any], published: list[bytes]
    ) -> tuple[dict[str, Any], Mapping[str, bytes]]:
        """Store what is due in the Secret and serve it; return the Secret and what it holds."""
        now = dt.datetime.fromtimestamp(self._time_of_day(), dt.UTC)
        found = _decoded(secret)
        wanted = authority.renew(found, published, self._server_name, now)
        if wanted is not found:
            data = {key: base64.b64encode(pem).decode() for key, pem in wanted.items()}
            secret["data"] = {**(secret.get("data") or {}), **data}
            secret = await self._cluster.put_object(
                "secrets", self._places.namespace, self._places.secret, secret
            )
        self._serve(wanted)
        return secret, wanted

    async def _config_map(self, place: tuple[str, str]) -> dict[str, Any] | None:
        """Read one; None where that fails."""
        try:
            return await self._cluster.get_object("configmaps", *place)
        except ApiError as error:
            self._failed(place, "read", error)
            return None

    async def _publish(self, place: tuple[str, str], found: dict[str, Any], bundle: bytes) -> None:
        """Write the CAs into a ConfigMap that holds others."""
        if _bundle(found) != bundle:
            found["data"] = {**(found.get("data") or {}), authority.CA: bundle.decode()}
            try:
                await self._cluster.put_object("configmaps", *place, found)
            except ApiError as error:
                self._failed(place, "written", error)
                return
        self._denials.allow(_RESOURCE, place[0])

    def _failed(self, place: tuple[str, str], done: str, error: ApiError) -> None:
        """Report a ConfigMap; its failure stops nothing else."""
        if error.status == 409:  # another replica was faster
            return
        if 400 <= error.status < 500:
            self._denials.deny(_RESOURCE, place[0], f"{place[1]} cannot be {done}: {error}")
        else:  # the API server has troubles of its own
            _log.warning("ConfigMap %s/%s cannot be %s: %s", *place, done, error)

    def _serve(self, wanted: Mapping[str, bytes]) -> None:
        pair = (wanted[authority.LEAF_KEY], wanted[authority.LEAF])
        if pair == self._pair:
            return
        self._pair = pair
        until = authority.expires_at(wanted[authority.LEAF])
        metrics.CERTIFICATE_EXPIRES.set(until.timestamp())
        _log.info("certificate from the Secret", extra={"until": until.isoformat()})


def _decoded(secret: Mapping[str, Any]) -> dict[str, bytes]:
    """Read the Secret's data; what is no base64 counts as not there."""
    found = {}
    for key, text in (secret.get("data") or {}).items():
        try:
            found[key] = base64.b64decode(text, validate=True)
        except binascii.Error:
            _log.error("key %s of the Secret is not base64", key)
    return found


def _bundle(config_map: Mapping[str, Any]) -> bytes:
    return str((config_map.get("data") or {}).get(authority.CA, "")).encode()
