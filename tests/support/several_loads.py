"""Loads for several EPPs in virtual time, and what they show of priority and fairness."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from sharing import EPPs, plan

from forebay_control.plan import BandPlan, Between, FairnessName, ModelPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MANY = 100_000
LATE_SECONDS = 0.15
CRITICAL = BandPlan("Critical", 100, max_requests=MANY, flow_max_requests=MANY, ttl_seconds=3600)
LOW = BandPlan("Sheddable", -100, max_requests=MANY, flow_max_requests=MANY, ttl_seconds=3600)
MODELS = (ModelPlan("chat", "Critical"), ModelPlan("batch", "Sheddable"))


def arrivals(
    rate: float,
    seconds: float,
    model: str,
    epp_of: Callable[[Random], int],
    tenant: str = "",
    seed: int = 1,
) -> Iterator[tuple[float, int, str, str]]:
    """Yield requests at random moments, `epp_of(random)` says where each comes in."""
    random, now = Random(seed), 0.0
    while (now := now + random.expovariate(rate)) < seconds:
        yield now, epp_of(random), model, tenant


def spread(*weights: float) -> Callable[[Random], int]:
    """Return a choice of EPPs in proportion to these weights."""
    return lambda random: random.choices(range(len(weights)), weights)[0]


def mixed(
    epps: int,
    chat: Callable[[Random], int],
    batch: Callable[[Random], int],
    seconds: float = 60.0,
    slots: int = 8,
    scale: int = 1,
) -> EPPs:
    """Run 40 requests/s of chat and twice what is left of batch over 8 servers of 1 s, or more."""
    run = EPPs(plan(CRITICAL, LOW, slots=slots, models=MODELS), epps, 8 * scale, 1.0)
    run.measured_from = 10.0
    run.load(
        [
            *arrivals(40 * scale, seconds, "chat", chat),
            *arrivals(48 * scale, seconds, "batch", batch, seed=2),
        ]
    )
    run.run(seconds)
    return run


def waits(run: EPPs, model: str) -> list[float]:
    """How long the requests of a model waited, the shortest first."""
    return sorted(s.sent_at - s.arrived_at for s in run.sent if s.model == model)


def inverted(waited: Sequence[tuple[float, float]], low: Sequence[float]) -> float:
    """Return the part of what was sent of a lower band while a higher one had waited for long.

    Args:
        waited: from when till when each request of the higher band did.
        low: when each of the lower band was sent.
    """
    late = [(a + LATE_SECONDS, b) for a, b in waited if a + LATE_SECONDS < b]
    return sum(any(a < at < b for a, b in late) for at in low) / max(1, len(low))


def p99(values: Sequence[float]) -> float:
    """Return the 99th percentile of sorted values."""
    return values[-(len(values) // 100) - 1]


def tenants(epps: int, seconds: float = 40.0) -> EPPs:
    """Have two tenants want all slots, each with nine tenths of its requests at another EPP."""
    band = BandPlan(
        "Standard",
        0,
        FairnessName.ROUND_ROBIN,
        between=Between.TENANTS,
        max_requests=MANY,
        flow_max_requests=MANY,
        ttl_seconds=3600,
    )
    others = [1 / (epps - 1)] * (epps - 1)
    run = EPPs(plan(band, slots=8), epps, 8 * max(1, epps // 4), 1.0)
    rate = 64 * max(1, epps // 4)
    run.load(
        [
            *arrivals(rate, seconds, "m", spread(9, *others), tenant="a"),
            *arrivals(rate, seconds, "m", spread(*others, 9), tenant="b", seed=2),
        ]
    )
    run.run(seconds)
    return run


def fair_share_error(epps: int) -> float:
    """Return by how much, of its half, the share of one of two equal tenants is off."""
    run = tenants(epps)
    got = [sum(s.tenant == tenant and s.sent_at > 10 for s in run.sent) for tenant in "ab"]
    return abs(got[0] / sum(got) - 0.5) / 0.5
