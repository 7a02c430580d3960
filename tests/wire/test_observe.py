"""Mode Observe through a real Envoy: nothing is held, and the metrics tell what would be."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace

from envoy_process import Envoy, ModelServer
from ext_proc_peer import until

from forebay_control.plan import Mode, Plan, SaturationMode, SaturationPlan

SLOTS = 2
PLAN = Plan(saturation=SaturationPlan(SaturationMode.CONCURRENCY, SLOTS), mode=Mode.OBSERVE)
PATIENCE_SECONDS = 30.0


def test_all_requests_reach_the_server_at_once_and_the_shadow_holds_the_rest(start, tmp_path):
    """Ten for two slots; then the plan is enforced, and the next ones wait for these."""
    server = ModelServer()
    server.hold.clear()
    epp = start(plan=PLAN, endpoints=(server.address,))
    envoy = Envoy(tmp_path, epp.transport.port)
    sent = []

    def send(count):
        for _ in range(count):
            connection = envoy.connect()
            connection.request("POST", "/v1/chat/completions", json.dumps({"model": "m"}), {})
            sent.append(connection)

    try:
        send(10)
        until(lambda: len(server.seen) == 10, PATIENCE_SECONDS)
        state = epp.state()
        assert (state.requests, state.in_flight) == (0, 10)
        assert (state.shadow.requests, state.shadow.in_flight) == (8, SLOTS)
        assert state.saturation == 10 / SLOTS

        epp.ask(lambda now: epp.data_plane.reconfigure(replace(PLAN, mode=Mode.ENFORCE), now))
        send(3)
        until(lambda: epp.state().requests == 3, PATIENCE_SECONDS)
        assert len(server.seen) == 10
        assert epp.state().shadow is None

        epp.ask(lambda now: epp.data_plane.reconfigure(PLAN, now))
        until(lambda: len(server.seen) == 13, PATIENCE_SECONDS)
        server.hold.set()
        for connection in sent:
            with closing(connection):
                assert connection.getresponse().status == 200
        until(lambda: epp.state().in_flight == 0, PATIENCE_SECONDS)
    finally:
        envoy.stop()
        server.stop()
