"""An EPP's answers to the programs of the control plane: a state machine.

Rules (those of xDS, and a fencing token as in Kleppmann, "How to do distributed locking", 2016):
1. Versions are totally ordered; only a strictly greater one is applied. What is applied never
   decreases, across streams and restarts.
2. A program has two parts, plan and endpoints. They are judged apart and each is applied whole or
   not at all: even if the plan is refused, no request goes to the address of a pod that is gone.
3. Every program gets exactly one answer, which covers both parts.
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

from forebay_control.limits import MAX_PLAN_BYTES, MAX_SNAPSHOT_BYTES
from forebay_control.mapping import plan_from_message
from forebay_control.plan import PlanError
from forebay_control.v1 import control_pb2 as pb
from forebay_epp.codec import plan as plan_codec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from google.protobuf.message import Message

    from forebay_control.plan import Plan
    from forebay_epp.core.terms import Endpoint

MAX_ERRORS = 32
MAX_ERROR_CHARACTERS = 512
_PARTLY = bytes(32)  # no program has this hash, so an operator sends the one it wants


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
    """The program in force.

    Attributes:
        version: of the last program of which any part is.
        sha256: of that program.
        plan_sha256: of the plan in force; empty where it is the built-in defaults.
        source: of the plan: Live, File for one that came from the disk, Defaults for none.
        whole: whether every part of the program is in force.
    """

    version: Version
    sha256: bytes
    plan_sha256: bytes = b""
    source: str = "Live"
    whole: bool = True

    def message(self) -> pb.Applied:
        """Return it as the channel shows it."""
        return pb.Applied(
            version=pb.Version(epoch=self.version.epoch, revision=self.version.revision),
            sha256=self.sha256 if self.whole else _PARTLY,
            source=self.source,
            plan_sha256=self.plan_sha256,
        )


@dataclass(frozen=True, slots=True)
class Nacked:
    """The refused parts; `problems` are (field path, what is wrong) pairs."""

    code: Code
    problems: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Accepted:
    """The parts of a program to apply, in one step.

    Attributes:
        applied: what is in force then.
        plan: None where the plan in force stays.
        endpoints: None where the endpoints in force stay.
        deleted: the pool is deleted.
        refused: why the other part is not taken; None where everything is.
        plan_data: the plan as a serialised message.
        endpoints_data: the endpoints as one.
    """

    applied: Applied
    plan: Plan | None = None
    endpoints: tuple[Endpoint, ...] | None = None
    deleted: bool = False
    refused: Nacked | None = None
    plan_data: bytes = b""
    endpoints_data: bytes = b""

    @property
    def parts(self) -> list[str]:
        """Name what is taken, as a Nack does."""
        parts = {"Plan": self.plan, "Endpoints": self.endpoints}
        return [name for name, part in parts.items() if part is not None]


class Programs:
    """Judges programs against what is in force.

    Args:
        pool: namespace/name of the pool this EPP serves.
        applied: what is in force, if anything.
        highest_epoch: ever seen.

    Attributes:
        quarantined: hashes of plans that are not to be used.
    """

    def __init__(self, pool: str, applied: Applied | None = None, highest_epoch: int = 0) -> None:
        self.pool = pool
        self.applied = applied
        self.highest_epoch = max(highest_epoch, applied.version.epoch if applied else 0)
        self.quarantined: frozenset[bytes] = frozenset()

    def judge(self, program: pb.Program) -> Accepted | Nacked | None:
        """Decide about a program; None: it is already in force and only acknowledged."""
        version = Version(program.version.epoch, program.version.revision)
        now = self.applied
        if version.epoch < self.highest_epoch or (now and version < now.version):
            text = f"epoch {version.epoch} revision {version.revision} is older than what was seen"
            return Nacked(Code.STALE_EPOCH, (("version", text),))
        if now and version == now.version:
            if program.sha256 != now.sha256:
                text = "another program has the same version"
                return Nacked(Code.HASH_CONFLICT, (("sha256", text),))
            if now.whole:
                return None
        self.highest_epoch = version.epoch
        if len(program.snapshot) > MAX_SNAPSHOT_BYTES:
            text = f"has {len(program.snapshot)} bytes, more than {MAX_SNAPSHOT_BYTES}"
            return Nacked(Code.TOO_LARGE, (("snapshot", text),))
        if hashlib.sha256(program.snapshot).digest() != program.sha256:
            return Nacked(Code.INVALID, (("sha256", "is not that of the snapshot"),))
        try:
            snapshot = pb.Snapshot.FromString(program.snapshot)
        except DecodeError:
            return Nacked(Code.INVALID, (("snapshot", "is not a Snapshot message"),))
        if snapshot.HasField("plan") and snapshot.plan.pool != self.pool:
            pool = snapshot.plan.pool
            text = f"{pool!r} is not the pool of this EPP, {self.pool!r}"
            return Nacked(Code.INVALID, (("plan.pool", text),))
        return self._take(version, program.sha256, snapshot)

    def _take(self, version: Version, sha256: bytes, snapshot: pb.Snapshot) -> Accepted | Nacked:
        """Judge the parts of a program for this pool."""
        plan = endpoints = None
        plan_data = endpoints_data = b""
        refusals: list[Nacked] = []
        paths = (path for path in _unknown(snapshot) if not path.startswith("endpoints."))
        if unknown := list(islice(paths, MAX_ERRORS)):
            text = "is not known to this release of the EPP: update it"
            problems = tuple((path, text) for path in unknown)
            refusals.append(Nacked(Code.UNSUPPORTED, problems))
        elif snapshot.HasField("plan"):
            plan_data = snapshot.plan.SerializeToString(deterministic=True)
            read = self.read_plan(plan_data)
            if isinstance(read, Nacked):
                refusals.append(read)
            else:
                plan = read
        if snapshot.HasField("endpoints"):
            endpoints_data = snapshot.endpoints.SerializeToString(deterministic=True)
            try:
                endpoints = plan_codec.parse_endpoints(snapshot.endpoints)
            except PlanError as error:
                refusals.append(Nacked(Code.INVALID, tuple(error.problems)))
        refused = None
        if refusals:
            problems = tuple(problem for refusal in refusals for problem in refusal.problems)
            refused = Nacked(refusals[0].code, problems)
            if plan is None and endpoints is None:
                return refused
        before = self.applied
        plan_sha256, source = hashlib.sha256(plan_data).digest(), "Live"
        if plan is None:
            plan_sha256 = before.plan_sha256 if before else b""
            source = before.source if before else "Defaults"
        return Accepted(
            Applied(version, sha256, plan_sha256, source, whole=refused is None),
            plan,
            endpoints,
            snapshot.deleted,
            refused,
            plan_data,
            endpoints_data,
        )

    def read_plan(self, data: bytes) -> Plan | Nacked:
        """Translate a serialised plan, wherever it comes from, and check it whole."""
        if len(data) > MAX_PLAN_BYTES:
            text = f"has {len(data)} bytes, more than {MAX_PLAN_BYTES}"
            return Nacked(Code.TOO_LARGE, (("plan", text),))
        if hashlib.sha256(data).digest() in self.quarantined:
            text = "the EPP has crashed under this plan: change it, or delete the pod"
            return Nacked(Code.INTERNAL, (("plan", text),))
        try:
            plan = plan_from_message(pb.Plan.FromString(data))
        except DecodeError:
            return Nacked(Code.INVALID, (("plan", "is not a Plan message"),))
        except PlanError as error:
            return Nacked(Code.INVALID, tuple(error.problems))
        if plan.pool != self.pool:
            text = f"{plan.pool!r} is not the pool of this EPP, {self.pool!r}"
            return Nacked(Code.INVALID, (("plan.pool", text),))
        return plan

    def read_endpoints(self, data: bytes) -> tuple[Endpoint, ...] | Nacked:
        """Translate serialised endpoints that come from the disk."""
        try:
            return plan_codec.parse_endpoints(pb.Endpoints.FromString(data))
        except DecodeError:
            return Nacked(Code.INVALID, (("endpoints", "is not an Endpoints message"),))
        except PlanError as error:
            return Nacked(Code.INVALID, tuple(error.problems))

    def took(self, accepted: Accepted) -> None:
        """Note what is in force."""
        self.applied = accepted.applied

    def ack(self, program: pb.Program, apply_seconds: float) -> pb.FromPicker:
        """Acknowledge a program that is in force."""
        return pb.FromPicker(
            ack=pb.Ack(
                nonce=program.nonce,
                version=program.version,
                sha256=program.sha256,
                apply_seconds=apply_seconds,
                plan_sha256=self.applied.plan_sha256 if self.applied else b"",
            )
        )

    def nack(
        self, program: pb.Program, refused: Nacked, applied: Iterable[str] = ()
    ) -> pb.FromPicker:
        """Refuse a program, but for the parts that were applied."""
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
                applied=applied,
            )
        )


def _unknown(message: Message, path: str = "") -> Iterator[str]:
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
