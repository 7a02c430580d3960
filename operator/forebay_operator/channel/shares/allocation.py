"""How many slots of a pool each of its EPPs should have: the theory, and the arithmetic.

With one EPP a slot that becomes free goes to the highest band that waits, in it to the flow whose
turn it is. With several, each knows only its own queue, and whoever holds a slot would refill it
with whatever waits there. So what they hold has to follow what waits at all of them together.

A claim is what a band has waiting *and running* at an EPP. Were all slots given out at this moment,
with nothing running, claims would be served by strict priority, and within a band by weighted
max-min fairness between flows, on one level or two (Bertsekas and Gallager, Data Networks, 1992,
6.5; a level inside another as in Bennett and Zhang, SIGCOMM 1996). What an EPP gets that way is its
*entitlement*. Requests are not interrupted, so it is reached as answers end: an EPP above its
entitlement gives back what becomes free, one below it is given that. A flow that is at several EPPs
divides what it gets by its claims there, which is first come, first served for equal rates.

Slots that no request claims are spread evenly, so that a request finds one wherever it comes in.
Slots must not go back and forth for nothing, so this is weak: an EPP is entitled to half of its
part of them only, and the other half stays where it is. For the same reason differences within the
one band that gets a part of its claims do not count until they are a `DEADBAND`-th of what an EPP
holds; a higher band counts at once.

Fairness here is in slots, hence in time on servers, whatever a band counts its service in: the
EPPs' own policies do the rest between the flows that each of them has.

In the short run, what runs is there to stay. A request whose band gets all of its claims, and that
waits all the same, is *urgent*: its EPP's slots are taken by lower bands for the moment. With one
EPP it would have the next slot that becomes free anywhere. So its EPP wants one more than it has,
and those that have lower bands running are to give one back, whatever they are entitled to.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping

    from forebay_control.shares import BandDemand, Flow, FlowDemand

DEADBAND = 16


@dataclass(frozen=True, slots=True)
class Entitlement:
    """How many slots an EPP should have, and how many it keeps while others have urgent need.

    `urgent` of its requests have such need.
    """

    slots: int
    kept: int
    urgent: int = 0


_K = TypeVar("_K")


def entitlements(
    demands: Mapping[str, Mapping[str, BandDemand]],
    held: Mapping[str, int],
    slots: int,
) -> dict[str, Entitlement]:
    """Return how many slots each EPP should have.

    Args:
        demands: by EPP and band.
        held: how many each has now.
        slots: how many there are. The sum of what is returned may be above it by urgent needs,
            deadbands and roundings, so the one who gives slots away has to count them.
    """
    firm = dict.fromkeys(demands, 0.0)
    marginal = dict.fromkeys(demands, 0.0)
    urgent = dict.fromkeys(demands, 0)
    left = float(slots)
    for band, amount in _by_band(_bands(demands), slots):
        claims = {epp: of_band[band].flows for epp, of_band in demands.items() if band in of_band}
        wanted = {epp: _claim(flows) for epp, flows in claims.items()}
        got = wanted if sum(wanted.values()) <= amount else _divided(claims, amount)
        target = firm if got is wanted else marginal
        for epp, part in got.items():
            target[epp] += part
            left -= part
            if got is wanted:
                urgent[epp] += sum(flow.waiting for flow in claims[epp].values())
    spare = max(0.0, left) / (2 * len(demands)) if demands else 0.0
    result = {}
    for epp, has in held.items():
        sure = firm[epp] + spare
        wanted_slots = sure + marginal[epp]
        if has < sure or abs(has - wanted_slots) >= max(1.0, has / DEADBAND):
            settled = int(wanted_slots + 0.5)
        else:
            settled = has
        if urgent[epp]:
            settled = max(settled, _running(demands[epp]) + urgent[epp])
        result[epp] = Entitlement(settled, min(settled, ceil(firm[epp])), urgent[epp])
    return result


def max_min(
    claims: Mapping[_K, float], weights: Mapping[_K, int], amount: float
) -> dict[_K, float]:
    """Divide an amount by weighted max-min fairness; no claim gets more than it is."""
    result = {}
    weight = sum(weights[key] for key in claims)
    for key in sorted(claims, key=lambda key: claims[key] / weights[key]):
        part = min(claims[key], max(0.0, amount) * weights[key] / weight)
        result[key] = part
        amount -= part
        weight -= weights[key]
    return result


def _bands(demands: Mapping[str, Mapping[str, BandDemand]]) -> dict[str, tuple[BandDemand, float]]:
    """Return the bands, the highest first, each with the claims on it of all EPPs."""
    claims: dict[str, float] = {}
    known: dict[str, BandDemand] = {}
    for of_band in demands.values():
        for name, band in of_band.items():
            known[name] = band
            claims[name] = claims.get(name, 0.0) + _claim(band.flows)
    names = sorted(known, key=lambda name: (-known[name].priority, name))
    return {name: (known[name], claims[name]) for name in names}


def _by_band(bands: Mapping[str, tuple[BandDemand, float]], slots: int) -> list[tuple[str, float]]:
    """Return what each band gets: first what is reserved for it, then by strict priority."""
    reserved = {
        name: min(claim, slots * band.reserved_percent / 100)
        for name, (band, claim) in bands.items()
    }
    free = slots - sum(reserved.values())
    got = []
    used = 0.0
    for name, (band, claim) in bands.items():
        ceiling = slots * band.max_saturation_percent / 100 - used
        part = reserved[name] + max(0.0, min(claim - reserved[name], free, ceiling))
        free -= part - reserved[name]
        used += part
        got.append((name, part))
    return got


def _claim(flows: Mapping[Flow, FlowDemand]) -> float:
    return float(sum(flow.waiting + flow.running for flow in flows.values()))


def _running(bands: Mapping[str, BandDemand]) -> int:
    return sum(flow.running for band in bands.values() for flow in band.flows.values())


def _divided(claims: Mapping[str, Mapping[Flow, FlowDemand]], amount: float) -> dict[str, float]:
    """Divide what a band gets between its flows, and what each gets between the EPPs it is at."""
    flows: dict[Flow, float] = {}
    weights: dict[Flow, tuple[int, ...]] = {}
    for of_flow in claims.values():
        for path, flow in of_flow.items():
            flows[path] = flows.get(path, 0.0) + flow.waiting + flow.running
            weights[path] = flow.weights or (1,) * len(path)
    parts = _levels(flows, weights, amount)
    result = dict.fromkeys(claims, 0.0)
    for epp, of_flow in claims.items():
        for path, flow in of_flow.items():
            if flows[path]:
                result[epp] += parts[path] * (flow.waiting + flow.running) / flows[path]
    return result


def _levels(
    flows: Mapping[Flow, float], weights: Mapping[Flow, tuple[int, ...]], amount: float
) -> dict[Flow, float]:
    outer: dict[str, dict[Flow, float]] = {}
    for path, claim in flows.items():
        outer.setdefault(path[0] if path else "", {})[path] = claim
    first = {name: next(iter(inner)) for name, inner in outer.items()}
    parts = max_min(
        {name: sum(inner.values()) for name, inner in outer.items()},
        {name: weights[path][0] if path else 1 for name, path in first.items()},
        amount,
    )
    result: dict[Flow, float] = {}
    for name, inner in outer.items():
        result |= max_min(
            inner, {path: weights[path][-1] if path else 1 for path in inner}, parts[name]
        )
    return result
