"""An EPP that takes over from one that was killed: its predecessor's answers still run."""

from __future__ import annotations

from random import Random

import pytest

from forebay_control.plan import Plan
from forebay_epp.core.controller import FlowController
from forebay_epp.core.terms import Dispatched, Endpoint, EndpointMetrics, Request

SERVERS = [f"10.0.0.{number}:8000" for number in range(4)]
PAGE_SECONDS = 0.1


@pytest.mark.parametrize("batch", [8, 32, 256])
@pytest.mark.parametrize("steps", [None, 10.0])
def test_full_servers_get_less_than_a_batch_to_queue(batch, steps):
    """From the first moment, before any page, and as long as no answer ends."""
    controller = FlowController(Plan(), Random(1))
    controller.set_endpoints([Endpoint(address) for address in SERVERS], 0.0)
    waiting = dict.fromkeys(SERVERS, 0)
    for number in range(4 * batch):
        controller.submit(Request(number, "m", 100), 0.0)
    for page in range(50):
        now = page * PAGE_SECONDS
        for decision in controller.poll(now):
            assert isinstance(decision, Dispatched)
            waiting[decision.endpoint] += 1
        assert max(waiting.values()) < batch
        for address in SERVERS:
            counted = None if steps is None else steps * page
            controller.observe(
                EndpointMetrics(
                    address, batch, waiting[address], 0.5, now, PAGE_SECONDS, counted, batch * page
                ),
                now,
            )
