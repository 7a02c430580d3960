"""Computes the status that each object should have, as far as is known.

Writing it belongs in writing.py.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from forebay_operator import planning
from forebay_operator.reconcile.planner import ENDPOINT_KINDS, targets
from forebay_operator.resources import (
    CONTROLLER_LABEL,
    FlowControlPolicy,
    InferenceModel,
    InferenceObjective,
    InferencePool,
)
from forebay_operator.status import conditions
from forebay_operator.status.observed import CONTROLLER_DOMAIN, CONTROLLER_NAME, Attachment, Subject

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from forebay_control.plan import Plan
    from forebay_operator.cluster.store import Entry, Store
    from forebay_operator.reconcile.planner import Planner
    from forebay_operator.resources import AnyPool

POOL_KIND = "InferencePool"


class Statuses:
    """Says what statuses should be.

    Args:
        store: all objects.
        planner: what is planned for them.
        controller: the operator's name; None without a cluster.

    Attributes:
        name: the controller's name in a status.
        denied: returns in sentences what may not be read in a namespace.
    """

    def __init__(self, store: Store, planner: Planner, controller: str | None) -> None:
        self._store = store
        self._planner = planner
        self.name = f"{CONTROLLER_DOMAIN}{controller}" if controller else CONTROLLER_NAME
        self.denied: Callable[[str], list[str]] = lambda _: []

    def of(self, namespace: str) -> Iterator[tuple[Entry, dict[str, Any]]]:
        """Return what the status of each object of a namespace should be, as far as is known."""
        if self._planner.unread(namespace) & ENDPOINT_KINDS:
            return
        bands_of = cache(self._bands_of)  # a pool may have a thousand objectives
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
            elif isinstance(entry.resource, InferenceModel | InferenceObjective):
                reference = entry.resource.spec.pool_ref
                if (refused := planning.not_a_pool(reference)) is not None:
                    attachment = Attachment(reference.name, reference.group, None, refused)
                elif self._is_anothers(entry, f"{namespace}/{reference.name}"):
                    continue
                else:
                    attachment = self._attachment(entry, reference.name, reference.group, namespace)
                yield entry, self._of_one_pool(entry, subject, attachment, bands_of)
            else:
                nowhere = Attachment("", "", None)
                yield entry, self._of_one_pool(entry, subject, nowhere, bands_of)

    def _is_anothers(self, entry: Entry, pool: str) -> bool:
        """Return whether the status of a model or objective is not this operator's to write.

        The controller that has claimed the pool writes it. Where none has, any operator corrects
        what one wrote before: while there was no such pool, or while it was claimed.
        """
        claimant = self._planner.claimant(pool)
        if claimant is None:
            return False
        return bool(claimant) or not conditions.was_reported(entry.status)

    def _of_one_pool(
        self,
        entry: Entry,
        subject: Subject,
        attachment: Attachment,
        bands_of: Callable[[str], dict[str, str]],
    ) -> dict[str, Any]:
        """Return the status of a model or objective."""
        if entry.kind.model is InferenceModel:
            return conditions.model_status(subject, attachment)
        pool = f"{subject.namespace}/{attachment.pool}"
        band = bands_of(pool).get(entry.metadata.name)
        return conditions.objective_status(subject, attachment, self._plan_of(pool), band)

    def _plan_of(self, pool: str) -> Plan | None:
        found = self._planner.find(pool)
        return found[1].plan if found else None

    def _bands_of(self, pool: str) -> dict[str, str]:
        """Return the band of each objective by the pool's plan."""
        plan = self._plan_of(pool)
        return {objective.name: objective.band for objective in plan.objectives} if plan else {}

    def _policy_status(self, entry: Entry, subject: Subject) -> dict[str, Any] | None:
        """Return the status of a policy; None where every pool it names is another controller's.

        What is said of all its pools together is left to the controller of the first of them.
        """
        references = targets(entry)
        others = {
            name: self._planner.claimant(f"{subject.namespace}/{name}") or ""
            for name, _ in references
        }
        attachments = [
            self._attachment(entry, *target, subject.namespace)
            for target in references
            if not others[target[0]]
        ]
        if references and not attachments:
            wrote = any(
                ancestor.get("controllerName") == self.name
                for ancestor in entry.status.get("ancestors") or ()
            )
            return {"ancestors": []} if wrote else None
        claimed = [
            name
            for name, _ in references
            if others[name] or self._planner.find(f"{subject.namespace}/{name}") is not None
        ]
        summary = not (claimed and others[claimed[0]])
        return conditions.policy_status(subject, attachments, self.name, summary=summary)

    def _attachment(self, entry: Entry, pool: str, group: str, namespace: str) -> Attachment:
        name = f"{namespace}/{pool}"
        found = self._planner.find(name)
        if self._planner.claimant(name) is not None:
            message = (
                f"no operator of forebay acts on InferencePool {pool}: give the Service that its "
                f"endpointPickerRef names the label {CONTROLLER_LABEL}, with the name of one"
            )
            return Attachment(pool, group, (), refused=(conditions.NOT_CLAIMED, message))
        if found is None:
            return Attachment(pool, group, None)
        resource, planned = found
        policy, shadow = planned.policy, planned.shadow
        is_shadow = shadow is not None and shadow.metadata.uid == entry.metadata.uid
        mine = (entry.kind.kind, f"{namespace}/{entry.metadata.name}")
        refused = next(
            (
                (problem.reason, problem.message)
                for problem in planned.problems
                if (problem.kind, problem.name) == mine
            ),
            None,
        )
        notes = [p.message for p in planned.problems if p.kind == POOL_KIND]
        endpoints = len(planned.snapshot.endpoints.endpoints)
        notes += [f"the operator is denied {what}" for what in self.denied(namespace)]
        if not endpoints:
            notes.append(f"InferencePool {pool} has no ready endpoints: requests wait for some")
        return Attachment(
            pool=pool,
            group=_group_of(resource),
            epps=self._planner.epps(name),
            refused=refused,
            service="" if self._planner.standalone else resource.picker_service,
            notes=tuple(notes),
            endpoints=endpoints,
            held_by=planned.held_by,
            unsent=planned.unsent,
            shared_with=() if self._planner.standalone else planned.shared_with,
            advice=() if is_shadow else self._planner.advice(name),
            shadow_of=policy.metadata.name if is_shadow and policy is not None else "",
        )


def _group_of(pool: AnyPool) -> str:
    """Return a pool's API group."""
    return (
        "inference.networking.k8s.io"
        if isinstance(pool, InferencePool)
        else "inference.networking.x-k8s.io"
    )
