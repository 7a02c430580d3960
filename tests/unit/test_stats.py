"""codec/stats.py: what an EPP reports to its operator."""

from __future__ import annotations

import random

from forebay_control.plan import Mode, Plan
from forebay_control.v1 import control_pb2 as pb
from forebay_epp.codec.stats import stats
from forebay_epp.core.observation.shadowed import ShadowedController
from forebay_epp.core.terms import Endpoint, Outcome
from forebay_epp.traffic import ShadowCounts


def test_outcomes_of_a_band_are_summed_over_models_by_kind():
    """What was answered without flow control is none of them, and no band's."""
    controller = ShadowedController(Plan(), random.Random(1))
    controller.set_endpoints([Endpoint("10.0.0.1:8000")], 0.0)
    outcomes = {
        ("Standard", "chat", Outcome.DISPATCHED): 5,
        ("Standard", "code", Outcome.DISPATCHED): 2,
        ("Standard", "chat", Outcome.REJECTED_QUEUE_FULL): 3,
        ("Standard", "chat", Outcome.EVICTED_TTL): 1,
        ("Standard", "chat", Outcome.EVICTED_CANCELLED): 1,
        ("", "", Outcome.ANSWERED): 9,
    }

    report = stats(controller.state(0.0), outcomes)

    (band,) = (band for band in report.bands if band.band == "Standard")
    assert (band.dispatched, band.rejected, band.evicted) == (7, 3, 2)
    assert (report.endpoints, report.endpoints_out, report.in_flight) == (1, 0, 0)


def test_what_a_policy_would_have_done_is_summed_over_models_by_band():
    """In mode Observe; before anything is decided every sum of a band is 0."""
    controller = ShadowedController(Plan(mode=Mode.OBSERVE), random.Random(1))
    counts = ShadowCounts()
    counts.outcomes.update(
        {
            ("Standard", "chat", Outcome.DISPATCHED): 5,
            ("Standard", "code", Outcome.REJECTED_QUEUE_FULL): 3,
            ("Standard", "code", Outcome.EVICTED_TTL): 1,
        }
    )
    counts.waited.update({("Standard", "chat"): 1.5, ("Standard", "code"): 0.5})
    counts.overtaken.update({("Standard", "chat"): 1, ("Standard", "code"): 1})

    shadow = {band.band: band for band in stats(controller.state(0.0), {}, counts).shadow}

    found = shadow["Standard"]
    assert (found.dispatched, found.rejected, found.evicted) == (5, 3, 1)
    assert (found.waited_seconds, found.overtaken) == (2.0, 2)
    assert shadow["Critical"] == pb.ShadowStats(band="Critical")
