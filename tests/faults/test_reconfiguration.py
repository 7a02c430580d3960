"""Plans that change under load: whatever changes, each request has one outcome and keeps its turn.

A real EPP process is programmed over the control stream. Faults T32 and T33 of the
fault list.
"""

from __future__ import annotations

import logging
import random
import threading
import time

import pytest
from control_driver import Driver
from control_plane import EPPProcess, check_log, policy, pool
from envoy_process import Envoy
from ext_proc_peer import until
from ext_proc_queue import Waiting
from ledger import Traffic
from manifest_reading import resource_of

from forebay_control.v1 import control_pb2 as pb
from forebay_operator import planning, resources

POOL = "default/chat"
BANDS = ("Critical", "Standard", "Sheddable")
MODELS = tuple(f"model-{number}" for number in range(6))
PLANS_PER_SECOND, REQUESTS_PER_SECOND, SECONDS = 20, 200, 30
START_SECONDS = 60

_log = logging.getLogger(__name__)


@pytest.fixture
def driver():
    driver = Driver()
    yield driver
    driver.stop()


@pytest.fixture
def epp(tmp_path, driver):
    """An EPP that is programmed by the driver."""
    epp = EPPProcess(tmp_path, "epp-0", "chat", driver.port)
    yield epp
    epp.end()


def random_snapshot(lots: random.Random, addresses: list[str]) -> pb.Snapshot:
    """A plan in which anything may differ from the one before, but that always serves."""
    extra = [f"extra-{number}" for number in range(4) if lots.random() < 0.5]
    bands = [
        pb.Band(
            name=name,
            priority=priority,
            fairness=lots.choice(("FCFS", "RoundRobin")),
            ordering="FCFS",
            ttl_seconds=lots.choice((0.05, 2, 60)),
            max_requests=lots.choice((5, 50, 1000)),
            max_bytes=lots.choice((4_000, 1 << 20)),
            flow_max_requests=lots.choice((3, 1000)),
            flow_max_bytes=1 << 20,
        )
        for priority, name in enumerate(lots.sample([*BANDS, *extra], 3 + len(extra)))
    ]
    names = [band.name for band in bands]
    models = lots.sample(MODELS, lots.randint(1, len(MODELS)))
    return pb.Snapshot(
        plan=pb.Plan(
            pool=POOL,
            bands=bands,
            models=[pb.Model(name=name, band=lots.choice(names)) for name in models],
            limits=pb.Limits(
                max_requests=lots.choice((20, 2000)),
                max_bytes=lots.choice((20_000, 1 << 24)),
                max_body_bytes=8 << 20,
            ),
            saturation=pb.Saturation(
                mode="Concurrency",
                max_concurrency=lots.choice((1, 4, 16)),
                kv_cache_usage_threshold=0.95,
            ),
            unmatched=pb.Unmatched(action="Queue", band=lots.choice(names)),
            no_endpoints_ttl_seconds=lots.choice((0.05, 30)),
        ),
        endpoints=pb.Endpoints(
            endpoints=[
                pb.Endpoint(address=address, name=address)
                for address in lots.sample(addresses, lots.randint(0, len(addresses)))
            ]
        ),
    )


def last_snapshot(lots: random.Random, addresses: list[str]) -> pb.Snapshot:
    """One under which everything that waits is dispatched."""
    snapshot = random_snapshot(lots, addresses)
    del snapshot.endpoints.endpoints[:]
    snapshot.endpoints.endpoints.extend(pb.Endpoint(address=a, name=a) for a in addresses)
    return snapshot


def test_each_request_has_one_outcome_while_20_plans_a_second_change_everything(
    driver, epp, tmp_path
):
    """T32: bands, models, limits and endpoints come and go under 200 requests a second."""
    lots = random.Random(1)
    traffic = Traffic(service_seconds=0.1)
    with traffic:
        driver.put(POOL, last_snapshot(lots, traffic.addresses))
        until(lambda: epp.serving, START_SECONDS)
        envoy = Envoy(tmp_path, epp.grpc)
        try:
            loading = traffic.begin(
                envoy.http,
                SECONDS * REQUESTS_PER_SECOND,
                REQUESTS_PER_SECOND,
                lambda number: MODELS[number % len(MODELS)],
            )
            began, pause, pushed = time.monotonic(), threading.Event(), 0
            while pushed < SECONDS * PLANS_PER_SECOND:
                driver.program(POOL, random_snapshot(lots, traffic.addresses))
                pushed += 1
                pause.wait(max(0.0, began + pushed / PLANS_PER_SECOND - time.monotonic()))
            driver.put(POOL, last_snapshot(lots, traffic.addresses))
            loading.result()
        finally:
            envoy.stop()
    ledger = traffic.ledger
    applied = epp.metric("forebay_programs_total", answer="ack")
    _log.info("%s plans, %.0f applied; %s", pushed, applied, dict(ledger.totals))
    ledger.check()
    assert len(ledger.sent) == SECONDS * REQUESTS_PER_SECOND
    until(epp.idle)
    # I1: what the EPP counts is what clients were told.
    assert epp.outcomes() == {
        "Dispatched" if outcome == "200" else outcome: count
        for outcome, count in ledger.totals.items()
    }
    assert applied > pushed / 4
    assert epp.metric("forebay_programs_total", answer="nack") == 0
    check_log(epp.log)


WAITERS, CYCLES = 1000, 100
SLICE = {
    "apiVersion": "discovery.k8s.io/v1",
    "kind": "EndpointSlice",
    "metadata": {"name": "one", "labels": {resources.POOL_LABEL: "chat"}},
    "endpoints": [{"addresses": ["10.0.0.1"]}],
    "ports": [{"port": 8000}],
}


def planned(*manifests: dict) -> pb.Snapshot:
    """What the operator plans for the pool from these."""
    found = [resource_of(manifest) for manifest in (pool("chat"), *manifests)]
    return planning.plan(found[0], found).snapshot


def test_requests_keep_their_turn_while_their_policy_is_deleted_and_made_again(driver, epp):
    """T33: 1,000 wait while their policy comes and goes 100 times; none is lost or overtaken."""
    chat = policy(
        "chat",
        "chat",
        bands=[
            {"name": "Critical", "fairness": [{"between": "Models", "policy": "RoundRobin"}]},
            {"name": "Standard", "queue": {"maxRequests": 2000, "ttl": "1h"}},
            {"name": "Sheddable", "queue": {"maxRequests": 600, "ttl": "1h"}},
        ],
        models=[
            {"name": "a", "band": "Critical"},
            {"name": "b", "band": "Sheddable"},
        ],
        saturation={"type": "Concurrency", "concurrency": {"maxRequestsPerEndpoint": 1}},
        noEndpoints={"ttl": "1h"},
    )
    driver.put(POOL, planned(chat))
    until(lambda: epp.serving, START_SECONDS)
    with Waiting(driver.thread, epp.grpc) as waiting:
        for number in range(WAITERS):
            waiting.enqueue(number, "abc"[number % 3])
        for _ in range(CYCLES):
            driver.put(POOL, planned())
            driver.put(POOL, planned(chat))
        assert epp.queues()["requests"] == WAITERS
        driver.put(POOL, planned(chat, SLICE))
        dispatched = waiting.serve_all()
    expected = [
        number for model in "acb" for number in range(WAITERS) if "abc"[number % 3] == model
    ]
    assert dispatched == expected
    assert waiting.refused == {}
    until(epp.idle)
    assert epp.outcomes() == {"Dispatched": WAITERS}
    check_log(epp.log)
