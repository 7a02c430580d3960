"""Which resources belong to a pool: its servers, its EPPs and their Service, what refers to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay_operator.resources import (
    CONTROLLER_LABEL,
    AnyPool,
    InferencePool,
    InferencePoolV1Alpha2,
    Pod,
    Service,
    messages,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from forebay_operator.resources import Resource
    from forebay_operator.resources.inference import PoolReference

POOL_GROUPS = ("inference.networking.k8s.io", "inference.networking.x-k8s.io")


def pools(resources: Iterable[Resource]) -> list[AnyPool]:
    """Return the pools among the resources, by name; of two with one name the v1."""
    found: dict[tuple[str, str], AnyPool] = {}
    for resource in resources:
        name = (resource.metadata.namespace, resource.metadata.name)
        if isinstance(resource, InferencePool) or (
            isinstance(resource, InferencePoolV1Alpha2) and name not in found
        ):
            found[name] = resource
    return [found[name] for name in sorted(found)]


def means(reference: PoolReference, name: str = "") -> bool:
    """Return whether a reference is to a pool, or given a name, to that pool."""
    return (
        reference.kind == "InferencePool"
        and reference.group in POOL_GROUPS
        and name in ("", reference.name)
    )


def not_a_pool(reference: PoolReference) -> tuple[str, str] | None:
    """Return reason and message if a reference cannot mean a pool."""
    if means(reference):
        return None
    message = (
        f"spec.poolRef names a {reference.kind} of group {messages.shown(reference.group)}, and "
        f"only an InferencePool of {' or '.join(POOL_GROUPS)} counts"
    )
    return "InvalidPoolRef", message


def claimant(pool: AnyPool, resources: Iterable[Resource]) -> str:
    """Return the controller that the label of the pool's EPP Service names; "" for none."""
    service = _epp_service(pool, resources)
    return service.metadata.labels.get(CONTROLLER_LABEL, "") if service else ""


class Holdings:
    """The resources of a namespace, indexed so that a pool's pods are found without a scan."""

    def __init__(self, resources: Iterable[Resource]) -> None:
        self._others: list[Resource] = []
        self._pods: list[Pod] = []
        self._by_label: dict[tuple[str, str], list[Pod]] = {}
        for resource in resources:
            if not isinstance(resource, Pod):
                self._others.append(resource)
                continue
            self._pods.append(resource)
            for label in resource.metadata.labels.items():
                self._by_label.setdefault(label, []).append(resource)

    def of(self, pool: AnyPool) -> list[Resource]:
        """Return what matters to a pool: of the pods only its servers and its EPPs."""
        found = {pod.metadata.uid: pod for pod in self._selected(pool.selector)}
        service = _epp_service(pool, self._others)
        if service is not None and service.spec.selector:
            found.update((p.metadata.uid, p) for p in self._selected(service.spec.selector))
        return [*self._others, *found.values()]

    def _selected(self, selector: dict[str, str]) -> list[Pod]:
        lists = [self._by_label.get(label, []) for label in selector.items()]
        return [pod for pod in min(lists, key=len, default=self._pods) if selects(selector, pod)]


def epps(pool: AnyPool, resources: list[Resource]) -> dict[str, str]:
    """Return the running pods behind the pool's EPP Service: name by uid."""
    service = _epp_service(pool, resources)
    if service is None or not service.spec.selector:
        return {}
    return {
        resource.metadata.uid: resource.metadata.name
        for resource in resources
        if isinstance(resource, Pod)
        and resource.running
        and selects(service.spec.selector, resource)
    }


def _epp_service(pool: AnyPool, resources: Iterable[Resource]) -> Service | None:
    return next(
        (
            resource
            for resource in resources
            if isinstance(resource, Service)
            and resource.metadata.name == pool.picker_service
            and resource.metadata.namespace == pool.metadata.namespace
        ),
        None,
    )


def selects(selector: dict[str, str], pod: Pod) -> bool:
    """Return whether a pod has all labels of a selector."""
    labels = pod.metadata.labels
    return all(labels.get(name) == value for name, value in selector.items())
