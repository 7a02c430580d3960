"""2 and 4 EPPs against one: throughput, priority, fairness, and what the loss of one costs.

`real.` figures: EPP processes behind one Envoy, with the operator's control server as a process;
model servers and clients are in this process. With `split.` all Critical requests enter at one
EPP and all Sheddable at another, each through an Envoy of its own. `virtual.`: the real cores and
ledger in virtual time, with 20 EPPs too. Ratios are against one EPP, with the same load.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from envoy_process import Envoy
from ext_proc_peer import until
from several_epps import SeveralEpps
from several_loads import fair_share_error, inverted, mixed, p99, spread, waits

if TYPE_CHECKING:
    from data_plane import Answer

SERVERS, SLOTS = 4, 16
ANSWER_SECONDS = 0.8
PER_SECOND = SERVERS * SLOTS / ANSWER_SECONDS
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
ID = re.compile(rb"\r\nx-id: (\S+)\r\n", re.IGNORECASE)
WARM_SECONDS = 4.0
TICKS = os.sysconf("SC_CLK_TCK")


class Servers:
    """What happens at the model servers: when each request comes, and how many run at once."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.came_at: dict[str, float] = {}
        self.running = [0] * SERVERS
        self.most = 0

    def behaviour(self, number: int) -> Any:
        """Return how one of the servers answers."""

        async def behave(head: bytes, writer: asyncio.StreamWriter) -> None:
            found = ID.search(head)
            if found is None:  # an EPP asks for the models
                writer.write(ANSWER)
                return
            request = found[1].decode()
            self.came_at[request] = time.monotonic()
            self.running[number] += 1
            self.most = max(self.most, self.running[number])
            await asyncio.sleep(ANSWER_SECONDS * (0.5 + hash(request) % 1000 / 1000))
            self.running[number] -= 1
            writer.write(ANSWER)

        return behave


def cpu_seconds(pids: list[int]) -> float:
    """Return what processes have used of a CPU so far."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS


class Run:
    """One load on some EPPs: Critical for 40 % of the slots, Sheddable for 90 %."""

    def __init__(self, folder: Path, epps: int, seconds: float, *, split: bool = False) -> None:
        """Run it."""
        folder.mkdir()
        self.servers = Servers()
        behaviours = [self.servers.behaviour(number) for number in range(SERVERS)]
        pool = SeveralEpps(folder, epps, *behaviours, slots=SLOTS)
        envoys = [pool.envoy]
        try:
            if split:
                envoys += [Envoy(folder, epp.grpc, responses="Observe") for epp in pool.epps[:2]]
            began = time.monotonic()
            loads = [
                pool.steadily("critical", 0.4 * PER_SECOND, seconds, envoys[split]),
                pool.steadily("sheddable", 0.9 * PER_SECOND, seconds, envoys[2 * split]),
            ]
            time.sleep(WARM_SECONDS)
            pids = [epp.pid for epp in pool.epps]
            used = cpu_seconds(pids)
            time.sleep(began + seconds - time.monotonic())
            self.cpu_seconds = cpu_seconds(pids) - used
            answers = [answer for load in loads for answer in load.result(120)]
            self.moves = pool.leader.moved()
        finally:
            for envoy in envoys[1:]:
                envoy.stop()
            pool.stop()
        self._measure(answers, began + WARM_SECONDS, began + seconds)

    def _measure(self, answers: list[Answer], begin: float, end: float) -> None:
        came = self.servers.came_at
        served = [answer for answer in answers if answer.id in came]
        self.failed = len(answers) - len(served)
        self.per_second = sum(begin <= came[a.id] < end for a in served) / (end - begin)
        spans = [(answer.sent_at, came[answer.id]) for answer in served if "critical" in answer.id]
        self.critical_p99 = p99(sorted(b - a for a, b in spans if a >= begin))
        low = [came[a.id] for a in served if "sheddable" in a.id and begin <= came[a.id] < end]
        self.inversion_share = inverted(spans, low)
        self.server_waiting = max(0, self.servers.most - SLOTS)


def killed(folder: Path) -> dict[str, float]:
    """Kill one of two EPPs under overload."""
    folder.mkdir()
    servers = Servers()
    pool = SeveralEpps(folder, 2, *map(servers.behaviour, range(SERVERS)), slots=SLOTS)
    try:
        load = pool.steadily("standard", 1.2 * PER_SECOND, 8.0)
        time.sleep(WARM_SECONDS)
        at = time.monotonic()
        pool.epps[0].kill()
        until(lambda: not pool.leader.slots(), 20)
        took = time.monotonic() - at
        answers = load.result(120)
    finally:
        pool.stop()
    bad = [answer for answer in answers if answer.outcome != "200"]
    return {
        "kill.failures_later": sum(answer.sent_at > at for answer in bad),
        "kill.failures_before": sum(answer.sent_at <= at for answer in bad),
        "kill.takeover_seconds": took,
    }


def operator_away(folder: Path) -> dict[str, float]:
    """Kill the operator under overload, for longer than shares are believed."""
    folder.mkdir()
    servers = Servers()
    pool = SeveralEpps(folder, 2, *map(servers.behaviour, range(SERVERS)), slots=SLOTS)
    away = 14.0
    try:
        load = pool.steadily("standard", 1.2 * PER_SECOND, 2 * WARM_SECONDS + away)
        time.sleep(2 * WARM_SECONDS)
        at = time.monotonic()
        pool.leader.kill()
        time.sleep(away)
        pool.leader.restart()
        until(lambda: pool.leader.page("/metrics") is not None, 60)
        back_at = time.monotonic()
        until(lambda: len(pool.leader.slots()) == 2, 60)
        back = time.monotonic() - back_at
        answers = load.result(120)
    finally:
        pool.stop()

    def rate(begin: float, end: float) -> float:
        return sum(begin <= a < end for a in servers.came_at.values()) / (end - begin)

    return {
        "operator_away.throughput_ratio": rate(at, at + away) / rate(at - WARM_SECONDS, at),
        "operator_away.failures": sum(answer.outcome != "200" for answer in answers),
        "operator_away.back_seconds": back,
    }


def real(seconds: float) -> dict[str, float]:
    """Measure processes."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one = Run(folder / "1", 1, seconds)
        figures["n1.critical_p99_ms"] = 1000 * one.critical_p99
        figures["n1.inversion_share"] = one.inversion_share
        for prefix, epps, split in (("n2", 2, False), ("n2.split", 2, True), ("n4", 4, False)):
            several = Run(folder / prefix, epps, seconds, split=split)
            figures |= {
                f"{prefix}.throughput_ratio": several.per_second / one.per_second,
                f"{prefix}.critical_p99_extra_ms": 1000 * (several.critical_p99 - one.critical_p99),
                f"{prefix}.inversion_share": several.inversion_share,
                f"{prefix}.server_waiting": several.server_waiting,
                f"{prefix}.failed": several.failed,
                f"{prefix}.cpu_ratio": several.cpu_seconds / one.cpu_seconds,
            }
            print(prefix, "has run", figures, file=sys.stderr)
        figures |= killed(folder / "kill") | operator_away(folder / "away")
    return figures


def virtual() -> dict[str, float]:
    """Measure cores and ledger in virtual time."""
    figures: dict[str, float] = {}
    ones = {scale: mixed(1, spread(1), spread(1), scale=scale) for scale in (1, 5)}
    even = {number: spread(*[1] * number) for number in (2, 4, 20)}
    for name, epps, chat, batch in (
        ("virtual.n2", 2, even[2], even[2]),
        ("virtual.n2.split", 2, spread(1, 0), spread(0, 1)),
        ("virtual.n4", 4, even[4], even[4]),
        ("virtual.n4.split", 4, spread(1, 0, 0, 0), spread(0, 1, 0, 0)),
        ("virtual.n4.uneven", 4, spread(9, 1, 1, 1), spread(1, 1, 1, 9)),
        ("virtual.n20", 20, even[20], even[20]),
    ):
        scale = 5 if epps == 20 else 1  # of the pool, so that each has some slots
        run, one = mixed(epps, chat, batch, scale=scale), ones[scale]
        figures |= {
            f"{name}.throughput_ratio": run.occupancy() / one.occupancy(),
            f"{name}.critical_p99_extra_ms": 1000
            * (p99(waits(run, "chat")) - p99(waits(one, "chat"))),
            f"{name}.inversion_share": inverted(
                [(s.arrived_at, s.sent_at) for s in run.sent if s.model == "chat"],
                [s.sent_at for s in run.sent if s.model == "batch"],
            ),
            f"{name}.server_waiting": max(0, max(run.most_running.values()) - 8),
            f"{name}.reports_per_second": run.reports / run.now / epps,
            f"{name}.report_bytes": run.report_bytes / run.reports,
        }
    for epps in (2, 4, 20):
        figures[f"virtual.n{epps}.fair_share_error"] = fair_share_error(epps)
    return figures


def main() -> None:
    """Print the figures, and write them if they are wanted."""
    parser = argparse.ArgumentParser(prog="hack/bench replicas", description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=16.0, help="of each real run")
    parser.add_argument("--virtual", action="store_true", help="no processes")
    arguments = parser.parse_args()
    figures = virtual()
    if not arguments.virtual:
        figures |= real(arguments.seconds)
    rounded = {name: round(value, 4) for name, value in figures.items()}
    for name, value in rounded.items():
        print(f"{name:40} {value:g}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"bench": "replicas", "figures": rounded}) + "\n")


if __name__ == "__main__":
    main()
