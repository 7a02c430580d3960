"""Leader election: a Lease, and an epoch that grows with each leadership.

The Lease alone does not keep an old leader from acting (it may have been asleep while its lease
ran out), so every leadership has an epoch and EPPs refuse a lower one. The epoch is an
annotation on the Lease, written by the same compare-and-swap that takes it. `leaseTransitions`
would not do: it does not grow when a container restarts under its old name, and starts again when
the Lease is deleted. A new epoch is at least the time of day in seconds, so that it is above those
before also where the Lease was deleted or restored from a backup; a clock that steps back makes it
grow by one. Lease times are monotonic; other machines' clocks are never compared with ours.

The Lease lasts 15 s; a leader that could not renew it for 10 s is quiet; it tries every 2 s (as in
client-go).

A leader takes a new epoch when an EPP has seen one above its own, because that EPP would refuse
every program. With each new epoch every EPP is programmed again, so `Claims` limits what an EPP can
claim: one that lies causes one new epoch, not one after the other.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import math
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from forebay_operator import metrics
from forebay_operator.cluster.api import ApiError

if TYPE_CHECKING:
    from collections.abc import Callable

LEASE_SECONDS = 15.0
RENEW_DEADLINE_SECONDS = 10.0
RETRY_SECONDS = 2.0
HEAL_SECONDS = 10.0  # between epochs that are taken because of what EPPs have seen
MAX_HEAL_SECONDS = 3600.0
MAX_EPOCH_AHEAD = 1000
MAX_EPOCH = 1 << 62
EPOCH = "forebay.dev/epoch"

_log = logging.getLogger(__name__)


class Leases(Protocol):
    """The calls needed of a cluster; api.Cluster has them."""

    async def get_lease(self, namespace: str, name: str) -> dict[str, Any] | None:
        """Return the Lease or None."""

    async def put_lease(self, namespace: str, name: str, lease: dict[str, Any]) -> dict[str, Any]:
        """Replace, or without a resourceVersion create; ApiError when another writer was faster."""


@dataclass(frozen=True, slots=True)
class Leadership:
    """Leadership; `epoch` is None on a standby, `quiet` means in doubt, `holder` is the leader."""

    epoch: int | None = None
    quiet: bool = False
    holder: str = ""


class Claims:
    """Judges epochs that EPPs claim to have seen while one process leads without a break. Pure.

    Epochs are times of day, so one far ahead of the clock is forged. What an EPP has seen of other
    leaders cannot grow while we lead: the first claim of a pod may be true, a second one that is
    higher is forged. Anyone who may create pods has many first claims, so a namespace's are heeded
    at growing intervals; other namespaces' claims do not wait for them.
    """

    def __init__(self) -> None:
        self._heeded: set[str] = set()  # pod uids
        self._due: dict[str, tuple[float, float]] = {}  # by namespace: (not before, then wait)

    def problem(
        self, epoch: int, mine: int, uid: str, namespace: str, now: float, time_of_day: float
    ) -> str:
        """Return why a claim is not to be heeded, or nothing if it is; heeding it is noted.

        Args:
            epoch: claimed by the EPP; at least `mine` and above all that were heeded before.
            mine: the epoch of the leadership.
            uid: of the EPP's pod, authenticated.
            namespace: of that pod.
            now: monotonic seconds.
            time_of_day: seconds since 1970.
        """
        if epoch > max(mine, time_of_day) + MAX_EPOCH_AHEAD:
            return "it is far ahead of the clock"
        if uid in self._heeded:
            return "the pod has claimed a lower one before, and no other leader has led since"
        not_before, wait = self._due.get(namespace, (-math.inf, HEAL_SECONDS))
        if now < not_before:
            return "EPPs of its namespace have had new epochs taken too often"
        self._due[namespace] = (now + wait, min(2 * wait, MAX_HEAL_SECONDS))
        self._heeded.add(uid)
        return ""


class Elector:
    """Takes the Lease when it is free and holds on to it.

    Args:
        leases: the cluster.
        namespace: of the Lease.
        name: of the Lease.
        identity: this process, as `instance/boot`. A process that finds a Lease of its own
            instance under another boot is its successor (the container has restarted) and takes
            it at once.
        changed: called at each change.
        clock: monotonic seconds.
        time_of_day: seconds since 1970.
    """

    def __init__(
        self,
        leases: Leases,
        namespace: str,
        name: str,
        identity: str,
        changed: Callable[[Leadership], None],
        clock: Callable[[], float] = time.monotonic,
        time_of_day: Callable[[], float] = time.time,
    ) -> None:
        self._leases = leases
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._changed = changed
        self._clock = clock
        self._time_of_day = time_of_day
        self._leadership = Leadership()
        self._seen_record: object = None
        self._seen_at = clock()
        self._renewed_at = clock()
        self._known = False
        self._gone_at: float | None = None
        self._claims = Claims()
        self._seen_epoch = 0
        self._heal_at = -math.inf
        self._told_at = -math.inf
        self._wake = asyncio.Event()
        self._writing = asyncio.Lock()
        self._released = False

    @property
    def leadership(self) -> Leadership:
        """The leadership state."""
        return self._leadership

    def see_epoch(self, epoch: int, uid: str, namespace: str) -> None:
        """Take an epoch that an EPP claims to have seen: ours must be above it.

        Args:
            epoch: claimed.
            uid: of the EPP's pod.
            namespace: of the EPP's pod.
        """
        mine = self._leadership.epoch
        if mine is None or epoch < mine:
            return
        now = self._clock()
        if epoch > self._seen_epoch:
            problem = self._claims.problem(epoch, mine, uid, namespace, now, self._time_of_day())
            if problem:
                self._refuse(problem, epoch, mine, uid, namespace)
                return
            self._seen_epoch = epoch
        if now >= self._heal_at:
            self._wake.set()

    def _refuse(self, problem: str, epoch: int, mine: int, uid: str, namespace: str) -> None:
        metrics.REFUSALS.labels("epoch").inc()
        if self._clock() < self._told_at + HEAL_SECONDS:
            return
        self._told_at = self._clock()
        _log.error(
            "an EPP claims to have seen a higher epoch than ours; the claim is refused: %s. "
            "If it is right, set annotation %s of the Lease to more than that",
            problem,
            EPOCH,
            extra={"epoch": epoch, "ours": mine, "uid": uid, "namespace": namespace},
        )

    async def run(self) -> None:
        """Take and renew the Lease until it is released."""
        while not self._released:
            self._doubt()  # this process may have been asleep
            try:
                await asyncio.wait_for(self._step(), self._patience())
            except (ApiError, TimeoutError) as error:
                _log.debug("lease: %s", error)
            self._doubt()
            self._wake.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), min(RETRY_SECONDS, self._patience()))

    async def release(self) -> None:
        """Give the Lease up, so that the next leader need not wait for it to run out."""
        self._released = True
        self._wake.set()
        async with self._writing:
            if self._leadership.epoch is None:
                return
            self._set(Leadership())
            try:
                lease = await self._leases.get_lease(self._namespace, self._name)
                spec = (lease or {}).get("spec") or {}
                if lease is not None and spec.get("holderIdentity") == self._identity:
                    lease["spec"] = {**spec, "holderIdentity": ""}
                    await self._leases.put_lease(self._namespace, self._name, lease)
            except ApiError as error:
                _log.info("the lease was not released and will expire: %s", error)

    async def _step(self) -> None:
        async with self._writing:
            if not self._released:
                await self._try()

    async def _try(self) -> None:
        lease = await self._leases.get_lease(self._namespace, self._name)
        now = self._clock()
        if self._may_be_uninstalled(lease, now):
            return
        spec = (lease or {}).get("spec") or {}
        holder = str(spec.get("holderIdentity") or "")
        record = (holder, spec.get("renewTime"), spec.get("acquireTime"))
        if record != self._seen_record:
            self._seen_record, self._seen_at = record, now
        epoch = _epoch(lease)
        if holder == self._identity and self._leadership.epoch == epoch:
            heal = self._seen_epoch >= epoch and now >= self._heal_at
            if heal:
                self._heal_at = now + HEAL_SECONDS
                _log.warning(
                    "epoch raised above the EPPs'", extra={"from": epoch, "past": self._seen_epoch}
                )
            await self._write(lease, self._next_epoch(epoch) if heal else epoch, now, take=heal)
        elif self._free(lease, holder, spec, now):
            await self._write(lease, self._next_epoch(epoch), now, take=True)
        else:
            self._set(Leadership(holder=holder))

    def _may_be_uninstalled(self, lease: dict[str, Any] | None, now: float) -> bool:
        """Return whether the Lease was deleted so recently that this process may be next.

        Where it was deleted with the release, a new Lease would be left behind.
        """
        if lease is not None:
            self._known, self._gone_at = True, None
            return False
        if self._gone_at is None:
            self._gone_at = now
        return self._known and now - self._gone_at < LEASE_SECONDS

    def _next_epoch(self, epoch: int) -> int:
        above = max(epoch, self._seen_epoch, self._leadership.epoch or 0) + 1
        return max(above, min(int(self._time_of_day()), MAX_EPOCH))

    def _free(
        self, lease: dict[str, Any] | None, holder: str, spec: dict[str, Any], now: float
    ) -> bool:
        if lease is None or not holder:
            return True
        instance = self._identity.rpartition("/")[0]
        if instance and holder.rpartition("/")[0] == instance:
            return True
        seconds = spec.get("leaseDurationSeconds")
        lasts = float(seconds) if isinstance(seconds, int) and seconds > 0 else LEASE_SECONDS
        return now - self._seen_at > lasts

    async def _write(
        self, lease: dict[str, Any] | None, epoch: int, now: float, *, take: bool
    ) -> None:
        """Take or renew the Lease by compare-and-swap on its resourceVersion."""
        spec = dict((lease or {}).get("spec") or {})
        moment = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec.update(
            holderIdentity=self._identity,
            renewTime=moment,
            leaseDurationSeconds=round(LEASE_SECONDS),
        )
        if take:
            spec["acquireTime"] = moment
            spec["leaseTransitions"] = int(spec.get("leaseTransitions") or 0) + bool(lease)
        metadata = dict((lease or {}).get("metadata") or {})
        metadata.pop("managedFields", None)
        metadata.update(name=self._name, namespace=self._namespace)
        metadata["annotations"] = {**(metadata.get("annotations") or {}), EPOCH: str(epoch)}
        body = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": metadata,
            "spec": spec,
        }
        await self._leases.put_lease(self._namespace, self._name, body)
        # The lease counts from before the request: it cannot have been written earlier.
        self._renewed_at = now
        self._seen_record, self._seen_at = (self._identity, moment, spec.get("acquireTime")), now
        self._set(Leadership(epoch=epoch, holder=self._identity))

    def _patience(self) -> float:
        """Return how long to wait at most: for a leader until it has to be quiet."""
        if self._leadership.epoch is None or self._leadership.quiet:
            return RENEW_DEADLINE_SECONDS
        return max(0.0, self._renewed_at + RENEW_DEADLINE_SECONDS - self._clock())

    def _doubt(self) -> None:
        """Become quiet when the Lease may have expired unnoticed."""
        leading = self._leadership
        late = self._clock() - self._renewed_at >= RENEW_DEADLINE_SECONDS
        if leading.epoch is not None and late and not leading.quiet:
            self._set(Leadership(epoch=leading.epoch, quiet=True, holder=leading.holder))

    def _set(self, leadership: Leadership) -> None:
        if leadership != self._leadership:
            if leadership.epoch is None:
                self._claims = Claims()
            self._leadership = leadership
            _log.info(
                "leadership",
                extra={
                    "epoch": leadership.epoch,
                    "quiet": leadership.quiet,
                    "holder": leadership.holder,
                },
            )
            self._changed(leadership)


def _epoch(lease: dict[str, Any] | None) -> int:
    """Read the epoch of a Lease; 0 where it is not one we wrote."""
    annotations = ((lease or {}).get("metadata") or {}).get("annotations") or {}
    text = str(annotations.get(EPOCH, ""))
    return int(text) if text.isdecimal() and len(text) < 19 else 0
