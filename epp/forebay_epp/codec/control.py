"""What an endpoint picker answers to the programs the control plane sends: a state machine.

Rules (those of xDS, and a fencing token as in Kleppmann, "How to do distributed locking", 2016):
1. Versions are totally ordered; only a strictly greater one is applied. What is applied never
   decreases, across streams and restarts.
2. A program is applied as a whole or not at all.
3. Every program gets exactly one answer.
Bytes come in, answers go out; where they travel and where they are kept does not belong here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from forebay_control.v1 import control_pb2 as pb
from forebay_epp.codec import plan as plan_codec
from forebay_epp.core.plan import PlanError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.message import Message

    from forebay_epp.core.plan import Plan
    from forebay_epp.core.terms import Endpoint

MAX_SNAPSHOT_BYTES = 1 << 20
MAX_ERRORS = 32
MAX_ERROR_CHARACTERS = 512


class Code(StrEnum):
    """Why a program was refused."""

    INVALID = "Invalid"
    UNSUPPORTED = "Unsupported"
    TOO_LARGE = "TooLarge"
    STALE_EPOCH = "StaleEpoch"
    HASH_CONFLICT = "HashConflict"
    INTERNAL = "Internal"


@dataclass(frozen=True, slots=True, order=True)
class Version:
    """Which leader, and which program of that leader."""

    epoch: int
    revision: int


@dataclass(frozen=True, slots=True)
class Applied:
    """The program in force. `source`: Live, or File for one that came from the disk."""

    version: Version
    sha256: bytes
    snapshot: bytes
    source: str = "Live"

    def message(self) -> pb.Applied:
        """Return it as the channel shows it."""
        return pb.Applied(
            version=pb.Version(epoch=self.version.epoch, revision=self.version.revision),
            sha256=self.sha256,
            source=self.source,
        )


@dataclass(frozen=True, slots=True)
class Accepted:
    """A program to apply: `plan` is None where the plan in force stays."""

    applied: Applied
    plan: Plan | None
    endpoints: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """A program that is not applied; `problems` are (field path, what is wrong) pairs."""

    code: Code
    problems: tuple[tuple[str, str], ...]


class Programs:
    """Judges programs against the one in force.

    Args:
        pool: namespace/name of the pool this picker serves.
        applied: what is in force, if anything.
        highest_epoch: ever seen.
    """

    def __init__(self, pool: str, applied: Applied | None = None, highest_epoch: int = 0) -> None:
        self.pool = pool
        self.applied = applied
        self.highest_epoch = max(highest_epoch, applied.version.epoch if applied else 0)
        self.quarantined: frozenset[bytes] = frozenset()

    def judge(self, program: pb.Program) -> Accepted | Refused | None:
        """Say what to do with a program; None: it is in force already and only acknowledged."""
        version = Version(program.version.epoch, program.version.revision)
        now = self.applied
        if version.epoch < self.highest_epoch or (now and version < now.version):
            text = f"epoch {version.epoch} revision {version.revision} is older than what was seen"
            return Refused(Code.STALE_EPOCH, (("version", text),))
        if now and version == now.version:
            if program.sha256 == now.sha256:
                return None
            return Refused(
                Code.HASH_CONFLICT, (("sha256", "another program has the same version"),)
            )
        self.highest_epoch = version.epoch
        if len(program.snapshot) > MAX_SNAPSHOT_BYTES:
            text = f"has {len(program.snapshot)} bytes, more than {MAX_SNAPSHOT_BYTES}"
            return Refused(Code.TOO_LARGE, (("snapshot", text),))
        if program.sha256 in self.quarantined:
            text = (
                "the endpoint picker has crashed under this program: change it, or delete the pod"
            )
            return Refused(Code.INTERNAL, (("snapshot", text),))
        return self.read(Applied(version, program.sha256, program.snapshot))

    def read(self, applied: Applied) -> Accepted | Refused:
        """Translate a program, wherever it comes from, and check it whole."""
        if hashlib.sha256(applied.snapshot).digest() != applied.sha256:
            return Refused(Code.INVALID, (("sha256", "is not that of the snapshot"),))
        try:
            snapshot = pb.Snapshot.FromString(applied.snapshot)
        except DecodeError:
            return Refused(Code.INVALID, (("snapshot", "is not a Snapshot message"),))
        unknown = list(islice(_unknown(snapshot, ""), MAX_ERRORS))
        if unknown:
            text = "is not known to this release of the endpoint picker: update it"
            return Refused(Code.UNSUPPORTED, tuple((path, text) for path in unknown))
        try:
            if snapshot.HasField("plan"):
                plan, endpoints = plan_codec.parse_snapshot(snapshot)
                if plan.pool != self.pool:
                    text = f"{plan.pool!r} is not the pool of this endpoint picker, {self.pool!r}"
                    return Refused(Code.INVALID, (("plan.pool", text),))
                return Accepted(applied, plan, endpoints)
            return Accepted(applied, None, plan_codec.parse_endpoints(snapshot.endpoints))
        except PlanError as error:
            return Refused(Code.INVALID, tuple(error.problems))

    def took(self, accepted: Accepted) -> None:
        """Note that a program is in force."""
        self.applied = accepted.applied

    def ack(self, program: pb.Program, apply_seconds: float) -> pb.FromPicker:
        """Acknowledge a program that is in force."""
        return pb.FromPicker(
            ack=pb.Ack(
                nonce=program.nonce,
                version=program.version,
                sha256=program.sha256,
                apply_seconds=apply_seconds,
            )
        )

    def nack(self, program: pb.Program, refused: Refused) -> pb.FromPicker:
        """Refuse a program."""
        return pb.FromPicker(
            nack=pb.Nack(
                nonce=program.nonce,
                version=program.version,
                code=refused.code.value,
                errors=[
                    pb.FieldError(
                        path=path[:MAX_ERROR_CHARACTERS], message=text[:MAX_ERROR_CHARACTERS]
                    )
                    for path, text in refused.problems[:MAX_ERRORS]
                ],
                still_running=self.applied.message() if self.applied else None,
                highest_epoch=self.highest_epoch,
            )
        )


def _unknown(message: Message, path: str) -> Iterator[str]:
    """Yield the path of every field that this release does not know."""
    for field in UnknownFieldSet(message):  # type: ignore[attr-defined]  # the stubs lack __iter__
        yield f"{path}field {field.field_number}"
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        name = f"{path}{field.json_name}"
        if field.is_repeated:
            for index, part in enumerate(value):
                yield from _unknown(part, f"{name}[{index}].")
        else:
            yield from _unknown(value, f"{name}.")
