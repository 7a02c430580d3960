"""What the EPPs of one pool and the leader tell each other about slots, as plain data.

An EPP *holds* slots of an endpoint: as many as its share, or as its requests there take if these
are more. It sends `Demand`, the leader answers with `Shares`. What a share does to dispatching does
not belong here (forebay_epp.core), nor who gets how many (forebay_operator.channel.shares).

Either message names of the endpoints only those that differ, and has a number. What an EPP holds
grows by a `Shares` alone; between two of them it only shrinks. So a `Demand` bounds what its sender
holds until it takes a later `Shares` than the one it names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

Flow = tuple[str, ...]  # names of a flow, outermost level first


@dataclass(frozen=True, slots=True)
class FlowDemand:
    """What one flow has and wants. `weights` are those of its levels, outermost first."""

    waiting: int
    running: int
    weights: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class BandDemand:
    """What a band has and wants at one EPP.

    Where the flows do not share the band, there is one flow, (), with all of its requests.
    """

    priority: int
    reserved_percent: int = 0
    max_saturation_percent: int = 100
    flows: Mapping[Flow, FlowDemand] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Held:
    """One endpoint as an EPP sees it.

    Attributes:
        slots: that the EPP holds.
        running: those of them that its requests take.
        limit: how many the endpoint has, by the EPP's estimate.
        inside: requests of all senders that the last scrape has shown in the server; 0 where
            scrapes do not count.
    """

    slots: int
    running: int
    limit: int
    inside: int = 0


@dataclass(frozen=True, slots=True)
class Demand:
    """One report of an EPP.

    Attributes:
        number: grows with each report of a stream.
        seen: the number of the last `Shares` taken over the stream; 0 for none.
        shared: whether it keeps to shares; otherwise it holds all that there is.
        full: whether all endpoints are named, so that those that are not hold nothing.
        bands: by name.
        endpoints: by address.
    """

    number: int
    seen: int
    shared: bool
    full: bool
    bands: Mapping[str, BandDemand]
    endpoints: Mapping[str, Held]


@dataclass(frozen=True, slots=True)
class Shares:
    """What an EPP may use.

    Attributes:
        number: grows with each message of a stream.
        total: how many slots the EPP keeps; what it holds beyond that it gives back as soon as no
            request takes it. None: the EPP is alone and needs no shares.
        slots: shares by address.
        most: bounds of shares by address, which raise none: slots that endpoints have lost.
        full: whether all endpoints are named, so that those that are not have none.
        epps: how many EPPs share.
        rank: which of these the EPP is, from 0.
    """

    number: int
    total: int | None
    slots: Mapping[str, int] = field(default_factory=dict)
    full: bool = False
    epps: int = 1
    rank: int = 0
    most: Mapping[str, int] = field(default_factory=dict)
