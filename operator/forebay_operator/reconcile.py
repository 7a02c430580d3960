"""Turns changed objects into programmed EPPs and correct statuses.

Two loops over one store: planning (what changed is planned again and handed to the control server)
and reporting (statuses are computed and written when they differ). Level-triggered: nothing here
depends on which event came, only on the current state. What to write belongs in status/, where it
goes in the Reporter.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from forebay_operator import metrics, planning
from forebay_operator.cluster.api import ApiError, now_text
from forebay_operator.resources import (
    CONTROLLER_LABEL,
    KINDS,
    EndpointSlice,
    FlowControlPolicy,
    InferenceModel,
    InferenceObjective,
    InferencePool,
    InferencePoolV1Alpha2,
    Pod,
    Service,
)
from forebay_operator.status import advice, comparing, conditions
from forebay_operator.status.comparing import Transition
from forebay_operator.status.observed import CONTROLLER_NAME, Attachment, EPPState, Subject

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from forebay_operator.channel.server import ControlServer
    from forebay_operator.cluster.store import Entry, Store
    from forebay_operator.deletion import Deletions
    from forebay_operator.planning import Planned
    from forebay_operator.resources import AnyPool, Kind, Resource
    from forebay_operator.status.observed import EPP

QUIET_SECONDS = 0.05  # plan once nothing has changed for this long,
MAX_DELAY_SECONDS = 0.5  # and after this long at the latest
SETTLE_SECONDS = 0.3  # acknowledgements come within it, and one write is enough
PENDING_SECONDS = 2.0  # a status that waits for acknowledgements is worth writing after this,
REPLACED_PENDING_SECONDS = 15.0  # and after this where it would replace a good one
NUMBERS_SECONDS = 30.0
NUMBERS_PER_SECOND = 5.0
LOOK_SECONDS = 5.0
TICK_SECONDS = 0.1
MAX_WRITES = 16  # at once
MAX_BACKOFF_SECONDS = 30.0
_POOL = "InferencePool"

# Of which it has to be known what there is before endpoints are told, and before a plan is.
_ENDPOINTS = {kind for kind in KINDS if kind.model in (Service, Pod, EndpointSlice)}
_PLAN = {
    kind for kind in KINDS if kind.model in (FlowControlPolicy, InferenceModel, InferenceObjective)
}

_log = logging.getLogger(__name__)


class Reporter(Protocol):
    """Where statuses go."""

    async def write(self, entry: Entry, status: dict[str, Any]) -> dict[str, Any] | None:
        """Write an object's status and return the object as it is then, if that is known.

        Raises:
            ApiError: it was not written.
        """

    async def announce(self, entry: Entry, changes: list[Transition]) -> None:
        """Tell people of conditions that have changed."""


@dataclass(slots=True)
class _Pending:
    """A status that has to be written. `meaning`: more than numbers has changed."""

    status: dict[str, Any]
    meaning: bool
    noticed_at: float
    due_at: float = 0.0
    retry_at: float = 0.0
    backoff_seconds: float = 0.5
    writing: bool = False


class Reconciler:
    """Keeps EPPs and statuses in step with the store.

    Args:
        store: all objects; who changes it calls `touch`.
        control: the EPPs.
        reporter: where statuses go.
        controller: the operator's name; pools are its own whose EPP Service carries it as label
            forebay.dev/controller. None, without a cluster: all are, and their EPPs are those
            that are connected, since there are neither Services nor pods.
        deletions: hears of pools that come and go.
        clock: monotonic seconds.

    Attributes:
        reporting: whether statuses are written.
        alive_at: when a loop has last turned.
        unread: returns the kinds whose objects in a namespace are not known yet.
        denied: returns in sentences what may not be read there.
    """

    def __init__(
        self,
        store: Store,
        control: ControlServer,
        reporter: Reporter,
        controller: str | None,
        *,
        deletions: Deletions | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._control = control
        self._reporter = reporter
        self._controller = controller
        self._standalone = controller is None
        self._name = f"forebay.dev/{controller}" if controller else CONTROLLER_NAME
        self._clock = clock
        self._deletions = deletions
        self._planned: dict[str, tuple[AnyPool, Planned]] = {}
        self.unread: Callable[[str], set[Kind]] = lambda _: set()
        self.denied: Callable[[str], list[str]] = lambda _: []
        self._advice: dict[str, tuple[str, ...]] = {}  # by pool
        self._not_ours: dict[str, str] = {}  # other pools, and whose they are; "" if unclaimed
        self._problems: dict[str, set[str]] = {}  # already reported, by pool
        self._dirty: set[str] = set()
        self._touched_at = 0.0
        self._wake = asyncio.Event()
        self._unreported: set[str] = set()
        self._report_wake = asyncio.Event()
        self._pending: dict[tuple[Any, str], _Pending] = {}
        self._written_at: dict[tuple[Any, str], float] = {}
        self._paused_until = 0.0
        self._looked_at = clock()
        self._numbers = NUMBERS_PER_SECOND
        self._numbers_at = clock()
        self._writes: set[asyncio.Task[None]] = set()
        self.reporting = False
        self.alive_at = clock()

    # --- what others say

    def touch(self, namespaces: set[str]) -> None:
        """Plan these namespaces again soon."""
        if namespaces:
            self._dirty |= namespaces
            self._touched_at = self._clock()
            self._wake.set()

    def epps_changed(self, pool: str) -> None:
        """Look at the statuses that this pool's EPPs are part of."""
        self._unreported.add(pool.partition("/")[0])
        self._report_wake.set()

    def expected(self, pool: str) -> Mapping[str, str] | None:
        """Return the EPPs a pool should have (name by pod uid), None for no such pool."""
        found = self._planned.get(pool)
        if found is None:
            return None
        return self._control.connected(pool) if self._standalone else found[1].pickers

    def _epps(self, pool: str) -> list[EPP]:
        """Return how the EPPs of a pool stand, without those that serve another pool."""
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

    def planned(self) -> list[tuple[AnyPool, Planned]]:
        """Return every pool and its plan, by name."""
        return [self._planned[pool] for pool in sorted(self._planned)]

    # --- planning

    async def run_planning(self) -> None:
        """Plan what is touched, until cancelled."""
        while True:
            await self._wake.wait()
            deadline = self._clock() + MAX_DELAY_SECONDS
            while (now := self._clock()) < min(deadline, self._touched_at + QUIET_SECONDS):  # noqa: ASYNC110  # quiet is the absence of events
                await asyncio.sleep(min(deadline, self._touched_at + QUIET_SECONDS) - now)
            self._wake.clear()
            await self.plan_touched()
            self.alive_at = self._clock()

    async def plan_touched(self) -> None:
        """Plan the namespaces that have been touched."""
        dirty, self._dirty = self._dirty, set()
        for namespace in sorted(dirty):
            for _ in self._plan(namespace):
                await asyncio.sleep(0)
            await asyncio.sleep(0)

    def acts_on(self, namespace: str) -> bool:
        """Say whether a pool of a namespace is this operator's."""
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
        """Do it, and yield after each pool, so that the loop turns.

        What is not known must not be taken for absent: where it is not known yet which Services
        and pods there are, nothing is done; where it is not known which policies, models and
        objectives there are, EPPs keep their plan and take the endpoints.
        """
        unread = self.unread(namespace)
        if unread & _ENDPOINTS:
            return
        entries = list(self._store.entries(namespace))
        resources = [entry.resource for entry in entries if entry.resource is not None]
        everything = {
            f"{namespace}/{pool.metadata.name}": pool for pool in planning.pools(resources)
        }
        pools = self._claimed(namespace, everything, resources)
        for name in [name for name in self._planned if name.partition("/")[0] == namespace]:
            if name not in pools:
                gone, _ = self._planned.pop(name)
                self._advice.pop(name, None)
                self._control.forget(name)
                if self._deletions is not None and name not in everything:
                    self._deletions.suspect(name, gone.metadata.uid)
                self._tell_of_pool(name, gone, {})
                _log.info(
                    "pool is %s; its endpoint pickers keep their program",
                    "not claimed any more" if name in everything else "gone",
                    extra={"pool": name},
                )
        if self._deletions is not None:
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
            if unread & _PLAN:
                planned = planning.held(planned)
            self._planned[name] = (pool, planned)
            self._advice[name] = _advice(pool, planned, holdings.of(pool))
            self._control.retain(name, self.expected(name) or ())
            self._control.program(name, planned.snapshot)
        self._unreported.add(namespace)
        self._report_wake.set()

    def _claimed(
        self, namespace: str, pools: dict[str, AnyPool], resources: list[Resource]
    ) -> dict[str, AnyPool]:
        """Return the pools that are ours, and remember whose the others are."""
        for name in [name for name in self._not_ours if name.partition("/")[0] == namespace]:
            del self._not_ours[name]
        if self._controller is None:
            return pools
        claimants = {name: planning.claimant(pool, resources) for name, pool in pools.items()}
        self._not_ours.update(
            (name, whose) for name, whose in claimants.items() if whose != self._controller
        )
        return {name: pool for name, pool in pools.items() if name not in self._not_ours}

    # --- reporting

    async def run_reporting(self) -> None:
        """Write statuses that differ, until cancelled."""
        while True:
            timeout = TICK_SECONDS if self._pending else 1.0
            with suppress(TimeoutError):
                await asyncio.wait_for(self._report_wake.wait(), timeout)
            self._report_wake.clear()
            self.alive_at = self._clock()
            if self.reporting:
                await self.report()
            if self._pending:  # at most one look per tick, however many acknowledgements come
                await asyncio.sleep(TICK_SECONDS / 2)

    async def report(self) -> None:
        """Look at what has changed and start the writes that are due."""
        for namespace in self._to_look_at():
            try:
                self._look(namespace, self._clock())
            except Exception:  # one namespace that cannot be reported on must not stop the others
                _log.exception("statuses failed", extra={"namespace": namespace})
            await asyncio.sleep(0)
        self._write_due(self._clock())

    def _to_look_at(self) -> list[str]:
        """Return the namespaces of which something has changed; now and then all of them."""
        now = self._clock()
        if now - self._looked_at >= LOOK_SECONDS:
            self._looked_at = now
            self._unreported.update(self._store.namespaces())
            for key in [key for key in self._written_at if self._store.get(*key) is None]:
                del self._written_at[key]
        namespaces, self._unreported = self._unreported, set()
        return sorted(namespaces)

    def statuses(self, namespace: str) -> Iterator[tuple[Entry, dict[str, Any]]]:
        """Return what the status of each object of a namespace should be, as far as is known."""
        if self.unread(namespace) & _ENDPOINTS:
            return
        for entry in list(self._store.entries(namespace)):
            if not entry.kind.ours_to_report or entry.metadata.deletion_timestamp:
                continue
            subject = Subject(
                uid=entry.metadata.uid,
                namespace=namespace,
                generation=entry.metadata.generation,
                problems=entry.problems,
                valid_generation=(
                    entry.resource.metadata.generation
                    if entry.problems and entry.resource is not None
                    else None
                ),
            )
            if entry.kind.model is FlowControlPolicy:
                status = self._policy_status(entry, subject)
                if status is not None:
                    yield entry, status
            elif isinstance(entry.resource, InferenceModel):
                reference = entry.resource.spec.pool_ref
                if (refused := planning.not_a_pool(reference)) is not None:
                    attachment = Attachment(reference.name, reference.group, None, refused)
                    yield entry, conditions.model_status(subject, attachment)
                    continue
                if f"{namespace}/{reference.name}" in self._not_ours:
                    continue
                attachment = self._attachment(entry, reference.name, reference.group, namespace)
                yield entry, conditions.model_status(subject, attachment)
            else:
                yield entry, conditions.model_status(subject, Attachment("", "", None))

    def _policy_status(self, entry: Entry, subject: Subject) -> dict[str, Any] | None:
        """Return the status of a policy; None where every pool it names is another controller's.

        What is said of all its pools together is left to the controller of the first of them.
        """
        targets = _targets(entry)
        others = {
            name: self._not_ours.get(f"{subject.namespace}/{name}", "") for name, _ in targets
        }
        attachments = [
            self._attachment(entry, *target, subject.namespace)
            for target in targets
            if not others[target[0]]
        ]
        if targets and not attachments:
            wrote = any(
                ancestor.get("controllerName") == self._name
                for ancestor in entry.status.get("ancestors") or ()
            )
            return {"ancestors": []} if wrote else None
        claimed = [
            name
            for name, _ in targets
            if others[name] or f"{subject.namespace}/{name}" in self._planned
        ]
        summary = not (claimed and others[claimed[0]])
        return conditions.policy_status(subject, attachments, self._name, summary=summary)

    def _attachment(self, entry: Entry, pool: str, group: str, namespace: str) -> Attachment:
        name = f"{namespace}/{pool}"
        found = self._planned.get(name)
        if name in self._not_ours:
            message = (
                f"no operator of forebay acts on InferencePool {pool}: give the Service that its "
                f"endpointPickerRef names the label {CONTROLLER_LABEL}, with the name of one"
            )
            return Attachment(pool, group, (), refused=(conditions.NOT_CLAIMED, message))
        if found is None:
            return Attachment(pool, group, None)
        resource, planned = found
        mine = (entry.kind.kind, f"{namespace}/{entry.metadata.name}")
        refused = next(
            (
                (problem.reason, problem.message)
                for problem in planned.problems
                if (problem.kind, problem.name) == mine
            ),
            None,
        )
        notes = [p.message for p in planned.problems if p.kind == _POOL]
        endpoints = len(planned.snapshot.endpoints.endpoints)
        notes += [f"the operator is denied {what}" for what in self.denied(namespace)]
        if not endpoints:
            notes.append(f"InferencePool {pool} has no ready endpoints: requests wait for some")
        return Attachment(
            pool=pool,
            group=resource_group(resource),
            epps=self._epps(name),
            refused=refused,
            service="" if self._standalone else resource.picker_service,
            notes=tuple(notes),
            endpoints=endpoints,
            held_by=planned.held_by,
            too_large=planned.too_large,
            shared_with=() if self._standalone else planned.shared_with,
            advice=self._advice.get(name, ()),
        )

    def _look(self, namespace: str, now: float) -> None:
        """Find out which statuses of a namespace have to be written, and when."""
        numbers: dict[str, list[EPP]] = {}
        for name, (pool, planned) in list(self._planned.items()):
            if name.partition("/")[0] == namespace:
                epps = numbers[name] = self._epps(name)
                problems = {p.reason: p.message for p in planned.problems if p.kind == _POOL}
                problems |= conditions.pool_problems(epps)
                told = problems.keys() if planned.policy is None else problems.keys() - {"Stale"}
                self._tell_of_pool(name, pool, problems, told)
        statuses = list(self.statuses(namespace))
        _measure(namespace, numbers, statuses)
        for entry, status in statuses:
            key = (entry.kind, entry.metadata.uid)
            pending = self._pending.get(key)
            if pending is not None and pending.writing:
                continue  # it is looked at again when that is done
            difference = comparing.differs(status, entry.status, self._name)
            if not difference:
                self._pending.pop(key, None)
                continue
            meaning = difference == "meaning"
            if pending is None:
                pending = self._pending[key] = _Pending(status, meaning, now)
            elif pending.meaning != meaning:
                pending.meaning, pending.noticed_at = meaning, now
            pending.status = status
            patience = self._patience(entry, status, now, meaning=meaning)
            pending.due_at = now + patience if not meaning else pending.noticed_at + patience

    def _tell_of_pool(
        self, name: str, pool: AnyPool, problems: Mapping[str, str], announced: Collection[str] = ()
    ) -> None:
        """Tell of problems (message by reason) that are new, and of those that are over.

        Events are posted of the reasons in `announced`; a policy's own Event tells of the others.

        A pool's own status belongs to gateways, so there are log, metric and Event.
        """
        before = self._problems.pop(name, set())
        if problems:
            self._problems[name] = set(problems)
        for reason in before - problems.keys():
            metrics.POOL_PROBLEMS.remove(name, reason)
            _log.info("pool is better", extra={"pool": name, "reason": reason})
        new = [reason for reason in problems if reason not in before]
        for reason in new:
            metrics.POOL_PROBLEMS.labels(name, reason).set(1)
            text = problems[reason]
            _log.warning("pool has a problem", extra={"pool": name, "reason": reason, "text": text})
        kind = next(kind for kind in KINDS if kind.model is type(pool))
        entry = self._store.get(kind, pool.metadata.uid)
        changes = [
            Transition("Degraded", "True", reason, problems[reason])
            for reason in new
            if reason in announced
        ]
        if changes and entry is not None:
            task = asyncio.create_task(self._announce(entry, changes))
            self._writes.add(task)
            task.add_done_callback(self._writes.discard)

    async def _announce(self, entry: Entry, changes: list[Transition]) -> None:
        try:
            await self._reporter.announce(entry, changes)
        except ApiError as error:  # what it says stands in the status or the log as well
            _log.info("event not posted", extra={"error": str(error)})

    def _patience(
        self, entry: Entry, status: dict[str, Any], now: float, *, meaning: bool
    ) -> float:
        """Return how long a difference may wait for a better status before it is written."""
        if not meaning:
            written_at = self._written_at.setdefault((entry.kind, entry.metadata.uid), now)
            return max(0.0, written_at + NUMBERS_SECONDS - now)
        if not comparing.unsettled(status):
            return SETTLE_SECONDS
        programmed = any(
            condition.get("type") == "Programmed"
            and condition.get("status") == "True"
            and condition.get("observedGeneration") == entry.metadata.generation
            for condition in entry.status.get("conditions") or ()
        )
        return REPLACED_PENDING_SECONDS if programmed else PENDING_SECONDS

    def _write_due(self, now: float) -> None:
        """Start the writes that are due, as many as may run at once."""
        self._numbers = min(
            NUMBERS_PER_SECOND, self._numbers + (now - self._numbers_at) * NUMBERS_PER_SECOND
        )
        self._numbers_at = now
        if now < self._paused_until:
            return
        for (kind, uid), pending in list(self._pending.items()):
            if len(self._writes) >= MAX_WRITES:
                return
            if pending.writing or max(pending.due_at, pending.retry_at) > now:
                continue
            entry = self._store.get(kind, uid)
            if entry is None:
                del self._pending[kind, uid]
                continue
            if not pending.meaning:
                if self._numbers < 1.0:
                    continue
                self._numbers -= 1.0
            pending.writing = True
            task = asyncio.create_task(self._write(entry, pending))
            self._writes.add(task)
            task.add_done_callback(self._writes.discard)

    async def _write(self, entry: Entry, pending: _Pending) -> None:
        """Write one status; an error is tried again, ever more slowly."""
        key = (entry.kind, entry.metadata.uid)
        before = entry.status
        stamped = comparing.with_times(pending.status, before, now_text(), self._name)
        began_at = self._clock()
        try:
            written = await self._reporter.write(entry, stamped)
        except Exception as error:
            self._not_written(entry, pending, error)
            return
        metrics.STATUS_WRITES.labels(entry.kind.kind, "ok").inc()
        self._pending.pop(key, None)
        now = self._clock()
        self._written_at[key] = now
        if written is None:
            entry.status = stamped
        else:
            self.touch(self._store.put(entry.kind, written, now, began_at))
        self._unreported.add(entry.metadata.namespace)
        changes = comparing.transitions(pending.status, before)
        if changes:
            await self._announce(entry, changes)

    def _not_written(self, entry: Entry, pending: _Pending, error: Exception) -> None:
        """Try again later: what has been deleted meanwhile is gone from the store by then."""
        metrics.STATUS_WRITES.labels(entry.kind.kind, "error").inc()
        now = self._clock()
        pending.retry_at = now + pending.backoff_seconds
        pending.backoff_seconds = min(2 * pending.backoff_seconds, MAX_BACKOFF_SECONDS)
        pending.writing = False
        level, trace = logging.WARNING, None
        if not isinstance(error, ApiError):
            level, trace = logging.ERROR, error
        elif error.status in (404, 409):  # deleted, or another object under its name
            level = logging.INFO
        elif error.retry_after_seconds:  # the server has too much to do, whoever asks
            self._paused_until = max(self._paused_until, now + error.retry_after_seconds)
        _log.log(
            level,
            "status not written; trying again",
            extra={"kind": entry.kind.kind, "object": entry.metadata.name, "error": str(error)},
            exc_info=trace,
        )

    def forget_pending(self) -> None:
        """Stop writing and measuring: another replica leads."""
        self._pending.clear()
        for pool, reasons in self._problems.items():
            for reason in reasons:
                metrics.POOL_PROBLEMS.remove(pool, reason)
        self._problems.clear()
        for series in (
            metrics.DESIRED,
            metrics.CONNECTED,
            metrics.PROGRAMMED,
            metrics.CONDITIONS,
        ):
            series.clear()


def _advice(pool: AnyPool, planned: Planned, resources: list[Resource]) -> tuple[str, ...]:
    """Return what the policy in force, if any, says of what is surely not meant."""
    if planned.policy is None or not planned.snapshot.HasField("plan"):
        return ()
    found = []
    for told in advice.of_pool(pool, planned, resources):
        if told.reason == "NoEndpointPickerRef":
            continue  # a pool without a Service is claimed only where there are none
        text = f"{told.reason}: {told.message}"
        own = told.kind == "FlowControlPolicy"
        found.append(text if own else f"{told.kind} {told.name.partition('/')[2]}: {text}")
    return tuple(found)


def _measure(
    namespace: str,
    epps: Mapping[str, list[EPP]],
    statuses: list[tuple[Entry, dict[str, Any]]],
) -> None:
    """Show how the EPPs of the pools of a namespace stand, and the conditions of its policies."""
    metrics.DESIRED.show(namespace, {(pool,): len(found) for pool, found in epps.items()})
    metrics.CONNECTED.show(
        namespace,
        {(pool,): sum(epp.connected for epp in found) for pool, found in epps.items()},
    )
    metrics.PROGRAMMED.show(
        namespace,
        {
            (pool,): sum(epp.state is EPPState.PROGRAMMED for epp in found)
            for pool, found in epps.items()
        },
    )
    metrics.CONDITIONS.show(
        namespace,
        {
            (namespace, entry.metadata.name, condition["type"], condition["status"]): 1
            for entry, status in statuses
            if entry.kind.model is FlowControlPolicy
            for condition in status.get("conditions") or ()
        },
    )


def resource_group(pool: AnyPool) -> str:
    """Return a pool's API group."""
    return (
        "inference.networking.k8s.io"
        if isinstance(pool, InferencePool)
        else "inference.networking.x-k8s.io"
    )


def _targets(entry: Entry) -> list[tuple[str, str]]:
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


def _is_unread(entry: Entry, pool: str) -> bool:
    """Say whether an invalid policy may be in force for a pool although we never saw it valid.

    A later generation than the first may have replaced a valid one while we were down, and the
    first may have been valid for an older operator.
    """
    return (
        entry.kind.model is FlowControlPolicy
        and entry.resource is None
        and not entry.metadata.deletion_timestamp
        and (entry.metadata.generation > 1 or comparing.was_in_force(entry.status))
        and any(name == pool for name, _ in _targets(entry))
    )
