"""What the endpoint pickers of a pool should run, and what each is known to run.

Knowledge of a picker outlives its stream: one that dials again is not forgotten in between. Pure:
the moment is an argument, in monotonic seconds. What a picker is sent when is session.py's
business, what people are told about it conditions.py's.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from forebay_operator.conditions import Picker, PickerState
from forebay_operator.session import Desired

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from forebay_control.v1 import control_pb2 as pb
    from forebay_operator.session import Session

SILENCE_SECONDS = 30.0
REMEMBERED_PROGRAMS = 16


@dataclass(slots=True)
class _Record:
    """What is known of one picker."""

    heard_at: float
    sha256: bytes = b""
    generations: Mapping[str, int] = field(default_factory=dict)
    stats: pb.Stats | None = None


class Rollout:
    """One pool. `desired` is None until something is planned, and again once the pool is gone."""

    def __init__(self) -> None:
        self.desired: Desired | None = None
        self._programs: OrderedDict[bytes, Mapping[str, int]] = OrderedDict()
        self._records: dict[str, _Record] = {}

    def want(self, snapshot: pb.Snapshot, revision: int) -> bool:
        """Say what the pickers should run; return whether that is news."""
        data = snapshot.SerializeToString(deterministic=True)
        sha256 = hashlib.sha256(data).digest()
        if self.desired is not None and self.desired.sha256 == sha256:
            return False
        generations = {source.uid: source.generation for source in snapshot.sources}
        self.desired = Desired(data, sha256, revision, generations)
        self._programs[sha256] = generations
        self._programs.move_to_end(sha256)
        while len(self._programs) > REMEMBERED_PROGRAMS:
            self._programs.popitem(last=False)
        return True

    def give_up(self) -> None:
        """Want nothing any more; pickers keep what they have."""
        self.desired = None
        self._programs.clear()

    def runs(self, uid: str, sha256: bytes, now: float) -> None:
        """Note what a picker runs, as it has just said."""
        record = self._record(uid, now)
        record.heard_at = now
        record.sha256 = sha256
        # Nothing is known about a program of another leader.
        record.generations = self._programs.get(sha256, {})

    def acknowledged(self, uid: str, desired: Desired, now: float) -> None:
        """Note that a picker has put a program into force."""
        record = self._record(uid, now)
        record.sha256, record.generations = desired.sha256, desired.generations

    def reported(self, uid: str, stats: pb.Stats, now: float) -> None:
        """Note a picker's report."""
        self._record(uid, now).stats = stats

    def left(self, uid: str, heard_at: float) -> None:
        """Note that a stream has ended over which a picker was last heard at this moment."""
        record = self._records.get(uid)
        if record is not None:
            record.heard_at = max(record.heard_at, heard_at)

    def retain(self, uids: Collection[str]) -> None:
        """Forget all other pickers."""
        for uid in self._records.keys() - set(uids):
            del self._records[uid]

    def pickers(
        self,
        expected: Mapping[str, str],
        sessions: Mapping[str, Session],
        leading_since: float,
        now: float,
    ) -> list[Picker]:
        """Say how the expected pickers (name by pod uid) stand, in order of their names."""
        return [
            self._picker(uid, name, sessions.get(uid), leading_since, now)
            for uid, name in sorted(expected.items(), key=lambda item: item[1])
        ]

    def _picker(
        self, uid: str, name: str, session: Session | None, leading_since: float, now: float
    ) -> Picker:
        record = self._record(uid, now)
        wanted = self.desired.sha256 if self.desired else b""
        heard_at = session.heard_at if session else max(record.heard_at, leading_since)
        if session is not None and session.nacked == wanted and wanted:
            state = PickerState.REJECTED
        elif now - heard_at > SILENCE_SECONDS:
            state = PickerState.STALE
        elif wanted and record.sha256 == wanted:
            state = PickerState.PROGRAMMED
        else:
            state = PickerState.PENDING
        return Picker(
            name=name,
            state=state,
            connected=session is not None,
            generations=record.generations,
            error=session.error if session else "",
            stats=record.stats,
        )

    def _record(self, uid: str, now: float) -> _Record:
        return self._records.setdefault(uid, _Record(now))
