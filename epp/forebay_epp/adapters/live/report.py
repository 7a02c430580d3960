"""What the live page shows, as JSON data.

It names models and tenants, as long as labels of metrics are, and holds nothing of any prompt. Its
size is bounded: of flows and endpoints it has the most telling ones, and the rest as a sum.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from forebay_control.plan import Between, Mode
from forebay_epp.adapters.live.beside import would_do
from forebay_epp.adapters.live.history import LONG_SECONDS, RECENT_SECONDS, quantile
from forebay_epp.observers import Observer
from forebay_epp.traffic import SECONDS_BUCKETS, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forebay_control.plan import BandPlan, Plan
    from forebay_epp.adapters.live.history import History, Sample
    from forebay_epp.core.terms import BandState, ControllerState, EndpointState

MAX_FLOWS = 12  # of a band
MAX_ENDPOINTS = 64

Data = dict[str, object]


class PolicyInForce(Observer):
    """Remembers the Plan in force and when it last changed.

    Attributes:
        plan: in force, None before the first.
        changed_at: seconds since 1970.
    """

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.changed_at = 0.0

    def reconfigured(self, plan: Plan) -> None:
        """Take note of a Plan; one that is equal to the last changes nothing."""
        if plan != self.plan:
            self.plan = plan
            self.changed_at = time.time()


def describe(
    state: ControllerState, policy: PolicyInForce, history: History, program: Data | None
) -> Data:
    """Return one event.

    Args:
        state: of the controller, at least `MAX_FLOWS` flows of each band.
        policy: the Plan in force.
        history: of the counters.
        program: where the Plan came from; None where that is a file.
    """
    now = time.monotonic()
    current = history.now(now)
    recent = history.before(now, RECENT_SECONDS)
    long = history.before(now, LONG_SECONDS)
    plans = {band.name: band for band in policy.plan.bands} if policy.plan else {}
    bands = sorted(state.bands, key=lambda band: -band.priority)
    return {
        "pool": printable(state.pool),
        "time": time.time(),
        "requests": state.requests,
        "size_bytes": state.size_bytes,
        "in_flight": state.in_flight,
        "saturation": state.saturation,
        "draining": state.draining,
        "window_seconds": now - long.at,
        "bands": [
            _band(band, plans.get(band.band), _first_token(band.band, current, recent, long))
            for band in bands
        ],
        **_endpoints(state.endpoints),
        "refusals": _refusals(current, recent, long),
        "policy": {"changed_at": policy.changed_at, **(program or {"source": "File"})},
        "observes": state.mode is Mode.OBSERVE,
        "shadow": would_do(state, history.shadow),
    }


def _band(state: BandState, plan: BandPlan | None, first_token: Data) -> Data:
    flows = sorted(state.flows, key=lambda flow: -flow.requests)[:MAX_FLOWS]
    return {
        "band": printable(state.band),
        "priority": state.priority,
        "requests": state.requests,
        "size_bytes": state.size_bytes,
        "oldest_seconds": state.oldest_seconds,
        "dispatches_per_second": state.drain_rate,
        "draining": state.draining,
        "flows": [
            {
                "model": None if flow.model is None else printable(flow.model),
                "tenant": None if flow.tenant is None else printable(flow.tenant),
                "requests": flow.requests,
            }
            for flow in flows
        ],
        "other_flows": state.flow_count - len(flows),
        "other_requests": state.requests - sum(flow.requests for flow in flows),
        "first_token": first_token,
        "policy": None if plan is None else _policy(plan),
    }


def _policy(plan: BandPlan) -> Data:
    inner = Between.TENANTS if plan.between is Between.MODELS else Between.MODELS
    levels = [f"{plan.fairness} between {plan.between.lower()}"]
    if plan.inner is not None:
        levels.append(f"{plan.inner.fairness} between {inner.lower()}")
    return {
        "fairness": ", ".join(levels),
        "ordering": str(plan.ordering),
        "ttl_seconds": plan.ttl_seconds,
        "max_requests": plan.max_requests,
        "max_saturation_percent": plan.max_saturation_percent,
        "reserved_percent": plan.reserved_percent,
    }


def _first_token(band: str, current: Sample, recent: Sample, long: Sample) -> Data:
    """Return what clients of a band see, seconds from arrival to the first chunk."""

    def since(sample: Sample) -> Data:
        counts, before = current.starts.get(band, ()), sample.starts.get(band, ())
        return {
            "count": sum(counts) - sum(before),
            "p50": quantile(SECONDS_BUCKETS, counts, before, 0.5) if counts else None,
            "p99": quantile(SECONDS_BUCKETS, counts, before, 0.99) if counts else None,
        }

    return {"now": since(recent), "ten_minutes": since(long)}


def _endpoints(states: Sequence[EndpointState]) -> Data:
    """Return those that are out, then the fullest; the rest as a sum."""
    ranked = sorted(states, key=lambda each: (not each.out, -_taken(each) / max(1, each.limit)))
    shown, others = ranked[:MAX_ENDPOINTS], ranked[MAX_ENDPOINTS:]
    shown.sort(key=lambda each: each.address)
    return {
        "endpoints": [
            asdict(each)
            | {
                "address": printable(each.address),
                "name": printable(each.name),
                "taken": _taken(each),
            }
            for each in shown
        ],
        "other_endpoints": {
            "count": len(others),
            "taken": sum(map(_taken, others)),
            "limit": sum(each.limit for each in others),
        },
    }


def _taken(state: EndpointState) -> int:
    return state.in_flight + state.foreign


def _refusals(current: Sample, recent: Sample, long: Sample) -> list[Data]:
    """Return what was refused, the most frequent of late first."""
    rows: list[tuple[int, int, Data]] = []
    for key, total in current.refusals.items():
        ten_minutes = total - long.refusals.get(key, 0)
        row: Data = {
            "band": printable(key[0]),
            "outcome": key[1],
            "now": total - recent.refusals.get(key, 0),
            "ten_minutes": ten_minutes,
            "total": total,
        }
        rows.append((ten_minutes, total, row))
    return [row for *_, row in sorted(rows, key=lambda each: each[:2], reverse=True)]
