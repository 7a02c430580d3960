"""What an EPP has and wants: what waits, what runs, and which slots it holds. Pure reading.

Who gets which slots for it does not belong here (the operator decides), nor what a share does
(tracked.py).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from forebay_control.plan import FairnessName
from forebay_control.shares import BandDemand, Flow, FlowDemand, Held

if TYPE_CHECKING:
    from collections.abc import Iterable

    from forebay_epp.core.bands import Band
    from forebay_epp.core.endpoints import EndpointSet
    from forebay_epp.core.terms import Request

MAX_FLOWS = 64  # of a band; of more, those with the least requests count as one


@dataclass(frozen=True, slots=True)
class Holdings:
    """What an EPP has and wants: bands by name, endpoints by address.

    `shared` says whether it keeps to shares.
    """

    shared: bool
    bands: dict[str, BandDemand]
    endpoints: dict[str, Held]


def holdings(
    bands: Iterable[Band], endpoints: EndpointSet, in_flight: Iterable[Request]
) -> Holdings:
    """Return them; the bands are those with a request."""
    running: Counter[tuple[str, Flow]] = Counter()
    for request in in_flight:
        running[request.band, request.path] += 1
    claims = {}
    for band in bands:
        name = band.plan.name
        flows = _flows(band, {path: n for (of, path), n in running.items() if of == name})
        if flows:
            plan = band.plan
            claims[name] = BandDemand(
                plan.priority, plan.reserved_percent, plan.max_saturation_percent, flows
            )
    return Holdings(
        endpoints.shares is not None,
        claims,
        {
            tracked.address: Held(
                tracked.held,
                tracked.taken,
                tracked.limit.value,
                tracked.running + tracked.waiting if tracked.limit.learned else 0,
            )
            for tracked in endpoints.present
        },
    )


def _flows(band: Band, running: dict[Flow, int]) -> dict[Flow, FlowDemand]:
    """Return what the flows of a band have; none where it has nothing."""
    if not band.arrival and not running:
        return {}
    if band.plan.fairness is FairnessName.FCFS and band.plan.inner is None:
        return {(): FlowDemand(len(band.arrival), sum(running.values()))}
    flows: dict[Flow, FlowDemand] = {}
    for path, flow in band.levels.flows.items():
        runs = running.pop(path, 0)
        if flow.requests or runs:
            weights = (flow.weight,) if flow.outer is None else (flow.outer.weight, flow.weight)
            flows[path] = FlowDemand(flow.requests, runs, weights)
    if rest := sum(running.values()):
        flows[()] = FlowDemand(0, rest)
    if len(flows) > MAX_FLOWS:
        least = sorted(flows, key=lambda path: flows[path].waiting + flows[path].running)
        for path in least[: len(flows) - MAX_FLOWS + 1]:
            rare, one = flows.get((), FlowDemand(0, 0)), flows.pop(path)
            flows[()] = FlowDemand(rare.waiting + one.waiting, rare.running + one.running)
    return flows
