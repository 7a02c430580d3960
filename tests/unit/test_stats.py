"""codec/stats.py: what an EPP reports to its operator."""

from __future__ import annotations

import random

from forebay_control.plan import Plan
from forebay_epp.codec.stats import stats
from forebay_epp.core.observation.shadowed import ShadowedController
from forebay_epp.core.terms import Endpoint, Outcome


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
