"""Observed state of EPPs, and of the object that a status is for.

Putting it into `.status` does not belong here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from forebay_control.v1 import control_pb2 as pb

CONTROLLER_DOMAIN = "forebay.dev/"
CONTROLLER_NAME = f"{CONTROLLER_DOMAIN}operator"  # of an operator without a name of its own


class EPPState(StrEnum):
    """An EPP's progress with the program it should run."""

    PROGRAMMED = "Programmed"
    PENDING = "Pending"
    REJECTED = "Rejected"
    STALE = "Stale"


@dataclass(frozen=True, slots=True)
class EPP:
    """One EPP as the operator sees it.

    Attributes:
        name: its pod.
        connected: whether it has a stream.
        generations: uid -> generation of the objects in the program it has acknowledged.
        error: what it said when it refused, for people; the first word is the code.
        unsupported: what of the plan it is not sent since it does not know it, as field paths.
        stats: what it reported last.
    """

    name: str
    state: EPPState
    connected: bool = False
    generations: Mapping[str, int] = field(default_factory=dict)
    error: str = ""
    unsupported: tuple[str, ...] = ()
    stats: pb.Stats | None = None


@dataclass(frozen=True, slots=True)
class Attachment:
    """One pool a policy or model is for, and how it fares there.

    `refused` is the reason and message why it does not count there, if it does not. `epps` is
    None where the pool does not exist. `service` is the one behind which they should be; None:
    the pool names none; "": there are no Services. `held_by` is the invalid policy for whose sake
    the pool's EPPs keep the plan they have. `shadow_of` is the policy in force that it is the
    shadow of. `unsent` is the reason and message why they do, if they
    would refuse the new one. `shared_with` are other pools that name the same Service. `advice` is
    what is valid there and surely not meant.
    """

    pool: str
    group: str
    epps: Sequence[EPP] | None
    refused: tuple[str, str] | None = None
    service: str | None = None
    notes: tuple[str, ...] = ()
    endpoints: int = 0
    held_by: str = ""
    unsent: tuple[str, str] | None = None
    shared_with: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    shadow_of: str = ""


@dataclass(frozen=True, slots=True)
class Subject:
    """The object a status is for. `problems`: its latest generation is not valid."""

    uid: str
    namespace: str
    generation: int
    problems: Sequence[tuple[str, str]] = ()
    valid_generation: int | None = None
