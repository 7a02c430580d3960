"""The cost of 20 plans a second to an EPP's data plane, against none in the same run.

A real EPP is saturated through a real Envoy by 200 requests a second while 1,000 more
wait in its lowest band. A process of its own sends health checks, which the data-plane thread
answers between requests: the slowest is the longest visible stall. Phases with and without plans
alternate. Each plan changes fairness, so that all waiting requests are reordered, and adds or
removes bands and models.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import grpc
from control_driver import Driver
from control_plane import EPPProcess
from envoy_process import Envoy
from ext_proc_peer import until
from ext_proc_queue import Waiting
from ledger import Traffic

from forebay_control.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable

POOL = "default/chat"
WAITING, REQUESTS_PER_SECOND, PLANS_PER_SECOND = 1000, 200, 20
PHASES = 4  # even: without and with in turn
PROBES_PER_SECOND = 200


def _snapshot(number: int, addresses: list[str]) -> pb.Snapshot:
    """Plan: the first is what all others vary."""
    lots = random.Random(number)
    extra = [f"extra-{band}" for band in range(8) if number and lots.random() < 0.5]
    return pb.Snapshot(
        plan=pb.Plan(
            pool=POOL,
            bands=[
                pb.Band(
                    name=name,
                    priority=priority,
                    fairness=("FCFS", "RoundRobin")[number % 2],
                    ordering="FCFS",
                    ttl_seconds=3600,
                    max_requests=WAITING if name == "Sheddable" else 50 + lots.randrange(50),
                    max_bytes=1 << 30,
                    flow_max_requests=WAITING,
                    flow_max_bytes=1 << 30,
                )
                for priority, name in enumerate(["Sheddable", "Standard", "Critical", *extra])
            ],
            models=[
                pb.Model(name="waiting", band="Sheddable"),
                *(
                    pb.Model(name=f"model-{model}", band=lots.choice(["Critical", *extra]))
                    for model in range(lots.randint(1, 500))
                ),
            ],
            limits=pb.Limits(max_requests=5000, max_bytes=1 << 30, max_body_bytes=8 << 20),
            saturation=pb.Saturation(
                mode="Concurrency", max_concurrency=4, kv_cache_usage_threshold=0.95
            ),
            unmatched=pb.Unmatched(action="Queue", band="Standard"),
            no_endpoints_ttl_seconds=3600,
        ),
        endpoints=pb.Endpoints(
            endpoints=[pb.Endpoint(address=address, name=address) for address in addresses]
        ),
    )


def _probe(port: int, seconds: float) -> None:
    """Run as the process that sends health checks; print each one's milliseconds."""
    took = []
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        check(b"", timeout=30)
        began = time.monotonic()
        pause = Event()
        while (now := time.monotonic()) - began < seconds:
            check(b"", timeout=30)
            took.append(1000 * (time.monotonic() - now))
            pause.wait(1 / PROBES_PER_SECOND)
    print(json.dumps(took))


class Phase:
    """What was measured with plans, or without."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.probes: list[float] = []
        self.lags: list[float] = []

    def figures(self, name: str) -> dict[str, float]:
        """Sum up."""
        cuts = statistics.quantiles(self.probes, n=1000)
        return {
            f"{name}_p50_ms": statistics.median(self.probes),
            f"{name}_p99_ms": cuts[989],
            f"{name}_max_ms": max(self.probes),
            f"{name}_loop_lag_max_ms": max(self.lags),
        }


def _phase(epp: EPPProcess, seconds: float, phase: Phase, put: Callable[[], None] | None) -> int:
    """Probe, and put plans into force if they are given; return how many."""
    epp.metric("forebay_loop_lag_max_seconds")  # it starts again from here
    command = [sys.executable, __file__, "--probe", str(epp.grpc), "--seconds", str(seconds)]
    probing = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    pause, sent, began = Event(), 0, time.monotonic()
    while probing.poll() is None:
        if put is not None:
            put()
            sent += 1
        pause.wait(max(0.0, began + (sent or 1) / PLANS_PER_SECOND - time.monotonic()) or 0.01)
    output, _ = probing.communicate()
    phase.probes += json.loads(output)
    phase.lags.append(1000 * epp.metric("forebay_loop_lag_max_seconds"))
    return sent


def _measure(folder: Path, seconds: float) -> dict[str, float]:
    driver = Driver()
    epp = EPPProcess(folder, "epp-0", "chat", driver.port)
    without, with_plans = Phase(), Phase()
    sent = 0
    try:
        driver.put(POOL, _snapshot(0, []))
        until(lambda: epp.serving, 60)
        envoy = Envoy(folder, epp.grpc)
        with (
            Traffic(service_seconds=0.1) as traffic,
            Waiting(driver.thread, epp.grpc) as waiting,
        ):
            for number in range(WAITING):
                waiting.enqueue(number, "waiting")
            requests = int(PHASES * (seconds + 3) * REQUESTS_PER_SECOND)
            loading = traffic.begin(
                envoy.http, requests, REQUESTS_PER_SECOND, lambda number: f"model-{number % 100}"
            )
            until(lambda: epp.queues()["requests"] > WAITING + 20, 60)
            plans = (_snapshot(number, traffic.addresses) for number in itertools.count(1))
            driver.put(POOL, next(plans))
            applied = epp.metric("forebay_programs_total", answer="ack")
            for number in range(PHASES):
                if number % 2:
                    sent += _phase(
                        epp, seconds, with_plans, lambda: driver.program(POOL, next(plans))
                    )
                else:
                    _phase(epp, seconds, without, None)
            applied = epp.metric("forebay_programs_total", answer="ack") - applied
            still_waiting = min(WAITING, epp.queues()["requests"])
            loading.cancel()
            envoy.stop()
    finally:
        epp.end()
        driver.stop()
    figures = {
        **without.figures("without"),
        **with_plans.figures("with"),
        "plans_sent": sent,
        "plans_applied": applied,
        "waiting": still_waiting,
    }
    return {**figures, "ratio_p99": figures["with_p99_ms"] / figures["without_p99_ms"]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each phase")
    parser.add_argument("--probe", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.probe:
        _probe(arguments.probe, arguments.seconds)
        return
    with tempfile.TemporaryDirectory() as folder:
        figures = _measure(Path(folder), arguments.seconds)
    for name, value in figures.items():
        print(f"{name:28}{value:12.3f}")
    if arguments.json:
        rounded = {name: round(value, 3) for name, value in figures.items()}
        arguments.json.write_text(json.dumps({"bench": "reconfigure", "figures": rounded}) + "\n")


if __name__ == "__main__":
    main()
