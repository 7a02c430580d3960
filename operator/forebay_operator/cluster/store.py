"""The known objects: one entry per uid, corrected by LISTs.

kopf's own index keeps objects that were deleted while a watch was broken (facts: kopf never diffs a
LIST against what it knew), so every event goes here and a regular LIST sweeps. Pure: the moment is
an argument, in monotonic seconds. What objects mean belongs in planning.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from forebay_operator import resources
from forebay_operator.resources import Metadata, messages

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from forebay_operator.resources import Kind, Resource

EMPTY_SECONDS = 10.0  # a LIST that wipes out a kind has to be confirmed after this long
MAX_REMEMBERED = 10_000


@dataclass(slots=True)
class Entry:
    """One object.

    Attributes:
        metadata: of the latest generation seen.
        resource: the latest valid generation; None when none was ever seen.
        problems: (field path, what is wrong) pairs of the latest generation, if it is not valid.
        status: what the object's `.status` holds, for the kinds we report on.
        spec: the latest generation as written, for what can be read of an invalid one.
    """

    kind: Kind
    metadata: Metadata
    resource: Resource | None
    problems: tuple[tuple[str, str], ...]
    status: dict[str, Any]
    spec: dict[str, Any]
    resource_version: str
    seen_at: float


@dataclass(slots=True)
class Swept:
    """What a LIST has corrected.

    Attributes:
        changed: namespaces to plan again.
        corrected: uids of what was wrong; a working watch delivers these as well.
        held: the LIST would have wiped out the kind, so nothing was removed.
    """

    changed: set[str] = field(default_factory=set)
    corrected: set[str] = field(default_factory=set)
    held: bool = False


class Store:
    """All objects, by uid, by name and by namespace."""

    def __init__(self) -> None:
        self._entries: dict[tuple[Kind, str], Entry] = {}
        self._by_name: dict[tuple[Kind, str, str], str] = {}
        self._by_namespace: dict[str, dict[tuple[Kind, str], Entry]] = {}
        self._removed: OrderedDict[str, tuple[str, float]] = OrderedDict()
        self._empty_since: dict[tuple[Kind, str], float] = {}

    def namespaces(self) -> list[str]:
        """Return the namespaces that hold anything."""
        return sorted(name for name, entries in self._by_namespace.items() if entries)

    def entries(self, namespace: str) -> Iterator[Entry]:
        """Return what a namespace holds."""
        return iter(self._by_namespace.get(namespace, {}).values())

    def get(self, kind: Kind, uid: str) -> Entry | None:
        """Return the object of this uid."""
        return self._entries.get((kind, uid))

    def named(self, kind: Kind, namespace: str, name: str) -> Entry | None:
        """Return the object of this name."""
        uid = self._by_name.get((kind, namespace, name))
        return None if uid is None else self._entries.get((kind, uid))

    def __len__(self) -> int:
        return len(self._entries)

    def put(
        self, kind: Kind, manifest: dict[str, Any], now: float, began_at: float = -math.inf
    ) -> set[str]:
        """Take an object as it is now.

        An event may be late: it counts only if its version is newer than what was known, the
        object's deletion included. An answer is the truth about everything seen before it was asked
        for: where its version is older, etcd was restored from a backup.

        Args:
            kind: of the object.
            manifest: the object.
            now: the moment.
            began_at: when the request began, a LIST or a write, that this is the answer to.

        Returns:
            the namespaces to plan again; none where nothing has changed that planning looks at.
        """
        metadata = _metadata(manifest)
        if metadata is None:
            return set()
        version = str(manifest.get("metadata", {}).get("resourceVersion", ""))
        removed_version, removed_at = self._removed.get(metadata.uid, ("", -math.inf))
        # It comes back, with a newer version, when a label brings it back into what is watched.
        if removed_at > began_at and not _older(removed_version, version):
            return set()
        self._removed.pop(metadata.uid, None)
        key = (kind, metadata.uid)
        before = self._entries.get(key)
        if (
            before is not None
            and before.seen_at >= began_at
            and _older(version, before.resource_version)
        ):
            return set()
        entry = _entry(kind, metadata, manifest, before, version, now)
        name = (kind, metadata.namespace, metadata.name)
        other = self._by_name.get(name)
        changed: set[str] = set()
        if other is not None and other != metadata.uid:  # deleted and made again under its name
            changed = self.remove(kind, other, now)
        self._entries[key] = entry
        self._by_name[name] = metadata.uid
        self._by_namespace.setdefault(metadata.namespace, {})[key] = entry
        if before is None or not _same(before, entry):
            changed.add(metadata.namespace)
        return changed

    def remove(self, kind: Kind, uid: str, now: float, version: str = "") -> set[str]:
        """Forget an object, and ignore its late, older events.

        Args:
            kind: of the object.
            uid: of the object.
            now: the moment.
            version: the resourceVersion of its end; without one only a LIST can bring it back.

        Returns:
            the namespaces to plan again.
        """
        entry = self._entries.pop((kind, uid), None)
        self._removed[uid] = (version, now)
        self._removed.move_to_end(uid)
        while len(self._removed) > MAX_REMEMBERED:
            self._removed.popitem(last=False)
        if entry is None:
            return set()
        metadata = entry.metadata
        name = (kind, metadata.namespace, metadata.name)
        if self._by_name.get(name) == uid:
            del self._by_name[name]
        held = self._by_namespace[metadata.namespace]
        del held[kind, uid]
        if not held:
            del self._by_namespace[metadata.namespace]
        return {metadata.namespace}

    def begin_sweep(self, kind: Kind, namespace: str, began_at: float) -> Sweep:
        """Begin to correct what is known of a kind in a namespace, "" for all, by a LIST."""
        return Sweep(self, kind, namespace, began_at)

    def forget(self, kind: Kind, namespace: str, now: float) -> None:
        """Drop what is known of a kind in a namespace; only a LIST brings it back."""
        for uid, _ in self.of(kind, namespace):
            self.remove(kind, uid, now)

    def of(self, kind: Kind, namespace: str) -> list[tuple[str, Entry]]:
        """Return what is known of a kind in a namespace, "" for all, by uid."""
        entries = self._by_namespace.get(namespace, {}) if namespace else self._entries
        return [(uid, entry) for (other, uid), entry in entries.items() if other == kind]

    def empty_since(self, kind: Kind, namespace: str, now: float | None) -> float:
        """Return since when LISTs would wipe out a kind: `now` if not before, None to clear."""
        if now is None:
            return self._empty_since.pop((kind, namespace), math.inf)
        return self._empty_since.setdefault((kind, namespace), now)


class Sweep:
    """A LIST, taken in page by page; made by `Store.begin_sweep`.

    What the LIST does not hold is removed only if it was last seen before the LIST began. A LIST
    that would remove the last object of a kind in its namespace has to come a second time, ten
    seconds later: an API server that has lost its data for a moment must not wipe out all queues.
    """

    def __init__(self, store: Store, kind: Kind, namespace: str, began_at: float) -> None:
        self._store = store
        self._kind = kind
        self._namespace = namespace
        self._began_at = began_at
        self._listed: set[str] = set()
        self.swept = Swept()

    def take(self, manifests: Iterable[dict[str, Any]], now: float) -> None:
        """Take objects that the LIST holds."""
        for manifest in manifests:
            uid = str(manifest.get("metadata", {}).get("uid", ""))
            self._listed.add(uid)
            known = self._store.get(self._kind, uid)
            version = str(manifest.get("metadata", {}).get("resourceVersion", ""))
            same = known is not None and known.resource_version == version != ""
            if known is not None and same and not self._kind.ours_to_report:
                # Most of 10,000 pods: to read them again would make as many new objects, which
                # Python's collector would then have to look at.
                known.seen_at = now
                continue
            if changed := self._store.put(self._kind, manifest, now, self._began_at):
                self.swept.changed |= changed
                self.swept.corrected.add(uid)
            elif known is not None:
                known.seen_at = now

    def finish(self, now: float) -> Swept:
        """Remove what the LIST, which is complete, does not hold."""
        mine = self._store.of(self._kind, self._namespace)
        gone = [
            uid for uid, entry in mine if uid not in self._listed and entry.seen_at < self._began_at
        ]
        if gone and len(gone) == len(mine):
            since = self._store.empty_since(self._kind, self._namespace, now)
            if now - since < EMPTY_SECONDS:
                self.swept.held = True
                return self.swept
        self._store.empty_since(self._kind, self._namespace, None)
        for uid in gone:
            self.swept.changed |= self._store.remove(self._kind, uid, now)
            self.swept.corrected.add(uid)
        return self.swept


def _metadata(manifest: dict[str, Any]) -> Metadata | None:
    try:
        metadata = Metadata.model_validate(manifest.get("metadata"))
    except ValidationError:
        return None  # no API server writes one like it
    return metadata if metadata.uid else None


def _entry(
    kind: Kind,
    metadata: Metadata,
    manifest: dict[str, Any],
    before: Entry | None,
    version: str,
    now: float,
) -> Entry:
    problems: tuple[tuple[str, str], ...] = ()
    resource: Resource | None = before.resource if before else None
    spec = manifest.get("spec")
    status = manifest.get("status")
    try:
        # Our own kind forbids unknown fields, and a server may add anything to metadata.
        resource = resources.read(kind, manifest)
    except resources.ResourceError as error:
        problems = tuple((path, messages.printable(what)) for path, what in error.problems)
    reported = kind.ours_to_report
    return Entry(
        kind=kind,
        metadata=metadata if problems or resource is None else resource.metadata,
        resource=resource,
        problems=problems,
        status=status if reported and isinstance(status, dict) else {},
        spec=spec if problems and isinstance(spec, dict) else {},
        resource_version=version,
        seen_at=now,
    )


def _older(version: str, known: str) -> bool:
    """Compare resource versions, which etcd's API servers write as numbers."""
    return version.isdecimal() and known.isdecimal() and int(version) < int(known)


def _same(before: Entry, after: Entry) -> bool:
    """Return whether two states of an object lead to the same plan and the same conditions.

    For pods the whole resource decides, since readiness is in the status; for what we report on
    generation and spec do, or each status we write would lead to the next.
    """
    if before.problems != after.problems:
        return False
    old, new = before.resource, after.resource
    if old is None or new is None:
        return old is new and before.metadata.generation == after.metadata.generation
    if after.kind.ours_to_report:
        return (
            before.metadata.generation == after.metadata.generation
            and before.metadata.deletion_timestamp == after.metadata.deletion_timestamp
            and getattr(old, "spec", None) == getattr(new, "spec", None)
        )
    return old == new
