"""Plans the pools of namespaces that have changed, and programs their EPPs.

Level-triggered: nothing here depends on which event came, only on what the store holds. Making
a plan belongs in planning, reporting it in statuses.py.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from forebay_operator import metrics, planning
from forebay_operator.resources import (
    KINDS,
    SHADOW_LABEL,
    EndpointSlice,
    FlowControlPolicy,
    InferenceModel,
    InferenceObjective,
    InferencePool,
    InferencePoolV1Alpha2,
    Pod,
    Service,
)
from forebay_operator.status import advice, comparing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from forebay_operator.channel.server import ControlServer
    from forebay_operator.cluster.store import Entry, Store
    from forebay_operator.planning import Planned
    from forebay_operator.reconcile.deletion import Deletions
    from forebay_operator.resources import AnyPool, Kind, Resource
    from forebay_operator.status.observed import EPP

QUIET_SECONDS = 0.05  # plan once nothing has changed for this long,
MAX_DELAY_SECONDS = 0.5  # and after this long at the latest

# Objects of these kinds have to be known before endpoints are sent, and before a plan is.
ENDPOINT_KINDS = {kind for kind in KINDS if kind.model in (Service, Pod, EndpointSlice)}
_PLAN_KINDS = {
    kind for kind in KINDS if kind.model in (FlowControlPolicy, InferenceModel, InferenceObjective)
}

_log = logging.getLogger(__name__)


class Planner:
    """Keeps EPPs in step with the store.

    Args:
        store: all objects; a writer that changes it calls `touch`.
        control: the EPPs.
        controller: the operator's name; pools are its own whose EPP Service carries it as label
            forebay.dev/controller. None, without a cluster: all are, and their EPPs are those
            that are connected, since there are neither Services nor pods.
        replanned: called with a namespace whose pools were planned.
        deletions: hears of pools that come and go.
        clock: monotonic seconds.

    Attributes:
        standalone: there is no cluster.
        unread: returns the kinds whose objects in a namespace are not known yet.
    """

    def __init__(
        self,
        store: Store,
        control: ControlServer,
        controller: str | None,
        *,
        replanned: Callable[[str], None] = lambda _: None,
        deletions: Deletions | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._control = control
        self._controller = controller
        self.standalone = controller is None
        self._replanned = replanned
        self._deletions = deletions
        self._clock = clock
        self._planned: dict[str, tuple[AnyPool, Planned]] = {}
        self._advice: dict[str, tuple[str, ...]] = {}  # by pool
        self._others: dict[str, str] = {}  # pools that are not ours, by name: "" unclaimed
        self._dirty: set[str] = set()
        self._touched_at = 0.0
        self._wake = asyncio.Event()
        self.unread: Callable[[str], set[Kind]] = lambda _: set()

    def touch(self, namespaces: set[str]) -> None:
        """Plan these namespaces again soon."""
        if namespaces:
            self._dirty |= namespaces
            self._touched_at = self._clock()
            self._wake.set()

    def expected(self, pool: str) -> Mapping[str, str] | None:
        """Return the EPPs a pool should have (name by pod uid), None for no such pool."""
        found = self._planned.get(pool)
        if found is None:
            return None
        return self._control.connected(pool) if self.standalone else found[1].epps

    def epps(self, pool: str) -> list[EPP]:
        """Return the state of a pool's EPPs, without those that serve another pool."""
        expected = self.expected(pool) or {}
        found = self._planned.get(pool)
        if found is not None and found[1].shared_with:
            namespace = pool.partition("/")[0]
            elsewhere = {
                uid
                for other in found[1].shared_with
                for uid in self._control.connected(f"{namespace}/{other}")
            } - self._control.connected(pool).keys()
            expected = {uid: name for uid, name in expected.items() if uid not in elsewhere}
        return self._control.epps(pool, expected)

    def planned(self, namespace: str | None = None) -> list[tuple[AnyPool, Planned]]:
        """Return every pool, or every one of a namespace, and its plan, by name."""
        return [
            self._planned[pool]
            for pool in sorted(self._planned)
            if namespace in (None, pool.partition("/")[0])
        ]

    def find(self, pool: str) -> tuple[AnyPool, Planned] | None:
        """Return a pool and its plan, None where it does not exist or is not ours."""
        return self._planned.get(pool)

    def advice(self, pool: str) -> tuple[str, ...]:
        """Return what in the policy in force for a pool its author should look at again."""
        return self._advice.get(pool, ())

    def claimant(self, pool: str) -> str | None:
        """Return the controller whose pool it is, "" if none has it; None if it may be ours."""
        return self._others.get(pool)

    async def run(self) -> None:
        """Plan what is touched, until cancelled."""
        while True:
            await self._wake.wait()
            deadline = self._clock() + MAX_DELAY_SECONDS
            while (now := self._clock()) < min(deadline, self._touched_at + QUIET_SECONDS):  # noqa: ASYNC110  # quiet is the absence of events
                await asyncio.sleep(min(deadline, self._touched_at + QUIET_SECONDS) - now)
            self._wake.clear()
            await self.plan_touched()

    async def plan_touched(self) -> None:
        """Plan the namespaces that have been touched."""
        dirty, self._dirty = self._dirty, set()
        for namespace in sorted(dirty):
            for _ in self._plan(namespace):
                await asyncio.sleep(0)
            await asyncio.sleep(0)

    def acts_on(self, namespace: str) -> bool:
        """Return whether a pool of a namespace is this operator's."""
        resources = [
            entry.resource
            for entry in self._store.entries(namespace)
            if isinstance(entry.resource, (InferencePool, InferencePoolV1Alpha2, Service))
        ]
        return any(
            self._controller in (None, planning.claimant(pool, resources))
            for pool in planning.pools(resources)
        )

    def plan(self, namespace: str) -> None:
        """Plan the pools of a namespace and program their EPPs."""
        for _ in self._plan(namespace):
            pass

    def _plan(self, namespace: str) -> Iterator[None]:
        """Plan them, and yield after each pool, so that the loop turns.

        What is not known must not be taken for absent: where it is not known yet which Services
        and pods there are, nothing is done; where it is not known which policies, models and
        objectives there are, EPPs keep their plan and take the endpoints.
        """
        unread = self.unread(namespace)
        if unread & ENDPOINT_KINDS:
            return
        entries = list(self._store.entries(namespace))
        resources = [entry.resource for entry in entries if entry.resource is not None]
        everything = {
            f"{namespace}/{pool.metadata.name}": pool for pool in planning.pools(resources)
        }
        unclaimed = _within(namespace, self._others)
        pools = self._claimed(namespace, everything, resources)
        gone = self._dropped(namespace, pools, everything)
        if self._deletions is not None:
            # A pool whose Service goes first is unclaimed, and its EPPs are still connected.
            heard = {name: "" for name in unclaimed if self._control.connected(name)}
            for name, uid in (gone | heard).items():
                if name not in everything:
                    self._deletions.suspect(name, uid)
            for name in everything:
                self._deletions.exists(name)
        policies = [entry for entry in entries if entry.kind.model is FlowControlPolicy]
        holdings = planning.Holdings(resources)
        for name, pool in pools.items():
            yield
            invalid = [
                entry.metadata for entry in policies if _is_unread(entry, pool.metadata.name)
            ]
            try:
                with metrics.PLANNING.time():
                    planned = planning.plan(pool, holdings.of(pool), invalid)
            except Exception:  # one pool that cannot be planned must not stop the others
                metrics.PLANNING_FAILURES.inc()
                _log.exception("planning failed", extra={"pool": name})
                continue
            if unread & _PLAN_KINDS:
                planned = planning.held(planned)
            self._planned[name] = (pool, planned)
            self._advice[name] = _advice_of(pool, planned, holdings.of(pool))
            self._control.retain(name, self.expected(name) or ())
            self._control.program(name, planned.snapshot)
        self._replanned(namespace)

    def _dropped(
        self, namespace: str, pools: Mapping[str, AnyPool], everything: Mapping[str, AnyPool]
    ) -> dict[str, str]:
        """Give up the pools that are gone or no longer ours; return their uids by name."""
        dropped = {}
        for name in _within(namespace, self._planned):
            if name not in pools:
                pool, _ = self._planned.pop(name)
                dropped[name] = pool.metadata.uid
                self._advice.pop(name, None)
                self._control.forget(name)
                _log.info(
                    "pool is %s; its EPPs keep their program",
                    "not claimed any more" if name in everything else "gone",
                    extra={"pool": name},
                )
        return dropped

    def _claimed(
        self, namespace: str, pools: dict[str, AnyPool], resources: list[Resource]
    ) -> dict[str, AnyPool]:
        """Return the pools that are ours, and remember whose the others are."""
        for name in _within(namespace, self._others):
            del self._others[name]
        if self._controller is None:
            return pools
        claimants = {name: planning.claimant(pool, resources) for name, pool in pools.items()}
        self._others.update(
            (name, whose) for name, whose in claimants.items() if whose != self._controller
        )
        return {name: pool for name, pool in pools.items() if name not in self._others}


def _within(namespace: str, pools: Iterable[str]) -> list[str]:
    """Return those of the pools that are in a namespace."""
    return [name for name in pools if name.partition("/")[0] == namespace]


def _advice_of(pool: AnyPool, planned: Planned, resources: list[Resource]) -> tuple[str, ...]:
    """Return what the policy in force, if any, says that is surely not meant."""
    if planned.policy is None or planned.plan is None:
        return ()
    found = []
    for problem in advice.of_pool(pool, planned, resources):
        if problem.reason == "NoEndpointPickerRef":
            continue  # a pool without a Service is claimed only where there are none
        text = f"{problem.reason}: {problem.message}"
        own = problem.kind == "FlowControlPolicy"
        found.append(text if own else f"{problem.kind} {problem.name.partition('/')[2]}: {text}")
    return tuple(found)


def _is_unread(entry: Entry, pool: str) -> bool:
    """Return whether an invalid policy may be in force for a pool although we never saw it valid.

    A later generation than the first may have replaced a valid one while we were down, and the
    first may have been valid for an older operator.
    """
    return (
        entry.kind.model is FlowControlPolicy
        and entry.resource is None
        and not entry.metadata.deletion_timestamp
        and SHADOW_LABEL not in entry.metadata.labels
        and (entry.metadata.generation > 1 or comparing.was_in_force(entry.status))
        and any(name == pool for name, _ in targets(entry))
    )


def targets(entry: Entry) -> list[tuple[str, str]]:
    """Return (name, group) of the pools a policy is for, as far as it can be read.

    A pool named under both API groups is one pool: references mean it by its name alone.
    """
    if isinstance(entry.resource, FlowControlPolicy):
        groups = {ref.name: ref.group for ref in reversed(entry.resource.spec.target_refs)}
        return [
            (name, groups[name])
            for name in dict.fromkeys(ref.name for ref in entry.resource.spec.target_refs)
        ]
    found = entry.spec.get("targetRefs")
    references = found if isinstance(found, list) else []
    names = dict.fromkeys(
        reference["name"]
        for reference in references[:16]
        if isinstance(reference, dict) and isinstance(reference.get("name"), str)
    )
    return [(name, "inference.networking.k8s.io") for name in names]
