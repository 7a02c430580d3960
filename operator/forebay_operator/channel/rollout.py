"""The desired programs of a pool's EPPs, and the program that each is known to run.

An EPP of an older release is sent what it knows, so a pool may have several programs at a time.
What is known of an EPP outlives its stream: it is not forgotten before it dials again. Pure: the
moment is an argument, in monotonic seconds. When an EPP is sent a program belongs in session.py,
what `.status` says about it in status/.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from forebay_control import features
from forebay_control.channel import SILENCE_SECONDS
from forebay_control.v1 import control_pb2 as pb
from forebay_operator.channel.session import Desired
from forebay_operator.status.observed import EPP, EPPState

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from google.protobuf.message import Message

    from forebay_operator.channel.session import Session

REMEMBERED_PROGRAMS = 16
MAX_VARIANTS = 8  # of a snapshot: EPPs of a pool are of one or two releases


@dataclass(slots=True)
class _Record:
    """The known state of one EPP."""

    heard_at: float
    sha256: bytes = b""
    generations: Mapping[str, int] = field(default_factory=dict)
    features: frozenset[str] = features.NAMES
    stats: pb.Stats | None = None


class Rollout:
    """One pool."""

    def __init__(self) -> None:
        self._snapshot: pb.Snapshot | None = None
        self._sha256 = b""
        self._revision = 0
        self._variants: OrderedDict[frozenset[str], Desired | None] = OrderedDict()
        self._programs: OrderedDict[bytes, Mapping[str, int]] = OrderedDict()  # plans, too
        self._records: dict[str, _Record] = {}

    def want(self, snapshot: pb.Snapshot, revision: int) -> bool:
        """Set the desired program; return whether it is new."""
        sha256 = _hash(snapshot)
        if self._snapshot is not None and self._sha256 == sha256:
            return False
        self._snapshot = pb.Snapshot()
        self._snapshot.CopyFrom(snapshot)
        self._sha256, self._revision = sha256, revision
        self._variants.clear()
        return True

    @property
    def wants(self) -> bool:
        """Whether anything is planned; not before the first plan, nor once the pool is gone."""
        return self._snapshot is not None

    def desired_for(self, known: frozenset[str] = features.NAMES) -> Desired | None:
        """Return what EPPs that know these features should run; None for nothing new."""
        if self._snapshot is None:
            return None
        if known not in self._variants:
            self._variants[known] = self._made_for(self._snapshot, known)
            while len(self._variants) > MAX_VARIANTS:
                self._variants.popitem(last=False)
        return self._variants[known]

    def _made_for(self, snapshot: pb.Snapshot, known: frozenset[str]) -> Desired | None:
        restricted = features.restrict(snapshot, known)
        sent = restricted.snapshot
        if sent is None:
            return None
        data = sent.SerializeToString(deterministic=True)
        sha256 = hashlib.sha256(data).digest()
        generations = None
        if sent.HasField("plan"):
            generations = {source.uid: source.generation for source in sent.sources}
            self._remember(sha256, generations)
            self._remember(_hash(sent.plan), generations)
        return Desired(data, sha256, self._revision, generations, restricted.left_out)

    def _remember(self, sha256: bytes, generations: Mapping[str, int]) -> None:
        self._programs[sha256] = generations
        self._programs.move_to_end(sha256)
        while len(self._programs) > REMEMBERED_PROGRAMS:
            self._programs.popitem(last=False)

    def give_up(self) -> None:
        """Want nothing any more; EPPs keep what they have."""
        self._snapshot = None
        self._variants.clear()
        self._programs.clear()

    def runs(self, uid: str, applied: pb.Applied | None, known: frozenset[str], now: float) -> None:
        """Note what an EPP runs and knows, as its Hello says."""
        record = self._record(uid, now)
        record.heard_at, record.features = now, known
        record.sha256 = applied.sha256 if applied else b""
        self.desired_for(known)  # it may run just that
        # Nothing is known about a program of another leader, unless it is what is wanted now.
        plan_sha256 = applied.plan_sha256 if applied else b""
        record.generations = self._programs.get(record.sha256, self._programs.get(plan_sha256, {}))

    def acknowledged(self, uid: str, desired: Desired, now: float) -> None:
        """Note that an EPP has put a program into force; one without a plan leaves its plan."""
        record = self._record(uid, now)
        record.sha256 = desired.sha256
        if desired.generations is not None:
            record.generations = desired.generations

    def reported(self, uid: str, stats: pb.Stats, now: float) -> None:
        """Note an EPP's report."""
        self._record(uid, now).stats = stats

    def left(self, uid: str, heard_at: float) -> None:
        """Note that a stream has ended over which an EPP was last heard at this moment."""
        record = self._records.get(uid)
        if record is not None:
            record.heard_at = max(record.heard_at, heard_at)

    def retain(self, uids: Collection[str]) -> None:
        """Forget all other EPPs."""
        for uid in self._records.keys() - set(uids):
            del self._records[uid]

    def epps(
        self,
        expected: Mapping[str, str],
        sessions: Mapping[str, Session],
        leading_since: float,
        now: float,
    ) -> list[EPP]:
        """Return the state of the expected EPPs (name by pod uid), ordered by name."""
        return [
            self._picker(uid, name, sessions.get(uid), leading_since, now)
            for uid, name in sorted(expected.items(), key=lambda item: item[1])
        ]

    def _picker(
        self, uid: str, name: str, session: Session | None, leading_since: float, now: float
    ) -> EPP:
        record = self._record(uid, now)
        desired = self.desired_for(session.features if session else record.features)
        wanted = desired.sha256 if desired else b""
        heard_at = session.heard_at if session else max(record.heard_at, leading_since)
        if session is not None and session.nacked == wanted and wanted:
            state = EPPState.REJECTED
        elif now - heard_at > SILENCE_SECONDS:
            state = EPPState.STALE
        elif wanted and record.sha256 == wanted:
            state = EPPState.PROGRAMMED
        else:
            state = EPPState.PENDING
        return EPP(
            name=name,
            state=state,
            connected=session is not None,
            generations=record.generations,
            error=session.error if session else "",
            unsupported=desired.left_out if desired else (),
            stats=record.stats,
        )

    def _record(self, uid: str, now: float) -> _Record:
        return self._records.setdefault(uid, _Record(now))


def _hash(message: Message) -> bytes:
    return hashlib.sha256(message.SerializeToString(deterministic=True)).digest()
