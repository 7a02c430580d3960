"""Several EPP processes of one pool, the leader that shares its slots, and an Envoy before them."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from control_plane import Process
from data_plane import Answer, Clients, snapshot
from envoy_process import Envoy
from ext_proc_peer import until
from ports import free_port

if TYPE_CHECKING:
    from concurrent.futures import Future

    from data_plane import Behaviour

POOL = "test/pool"
START_SECONDS = 60
SETTLING_SECONDS = 3.0


class Leader(Process):
    """What of the operator the EPPs talk to."""

    def __init__(self, folder: Path, content: dict) -> None:
        plan = folder / "leader.json"
        plan.write_text(json.dumps(content))
        self.port, http = free_port(), free_port()
        program = Path(__file__).with_name("leader.py")
        command = [
            *(sys.executable, "-P", str(program), str(self.port), str(http), str(plan)),
            str(SETTLING_SECONDS),
        ]
        super().__init__(command, folder / "leader.log", http)
        until(lambda: self.page("/metrics") is not None, START_SECONDS)

    def slots(self) -> dict[str, int]:
        """How many slots each EPP that keeps to shares may hold."""
        samples = self.samples("forebay_share_slots")
        return {sample.labels["epp"]: int(sample.value) for sample in samples}

    def moved(self) -> float:
        """How many slots have gone to an EPP."""
        return self.metric("forebay_share_moves_total")


class SharedEpp(Process):
    """An EPP that the leader programs."""

    def __init__(self, folder: Path, name: str, control_port: int, *flags: str) -> None:
        self.name = name
        self.grpc, self.health, http = free_port(), free_port(), free_port()
        namespace, _, pool = POOL.partition("/")
        command = [
            *(sys.executable, "-P", "-m", "forebay_epp", "--secure-serving=false"),
            *(f"--pool-namespace={namespace}", f"--pool-name={pool}", "--control-insecure"),
            *(f"--control-address=127.0.0.1:{control_port}", f"--pod-name={name}"),
            *(f"--pod-uid={name}", "--bind-address=127.0.0.1", f"--grpc-port={self.grpc}"),
            *(f"--grpc-health-port={self.health}", f"--metrics-port={http}"),
            *("--advertised-address=127.0.0.1", "--drain-timeout=5s", "--verbosity=1", *flags),
        ]
        super().__init__(command, folder / f"{name}.log", http)

    def state(self) -> dict:
        """What waits and runs."""
        return json.loads(self.page("/debug/queues") or "{}")


class SeveralEpps(Clients):
    """Servers, leader, EPPs, Envoy and clients of one test; all end with it.

    Args:
        folder: for plan, logs and configuration.
        epps: how many EPPs to start.
        spare: how many more Envoy knows of, for `add`.
        behaviours: one model server each.
        addresses: model servers that run elsewhere, instead.
        responses: whether answers are observed or pass through the EPPs.
        plan: arguments of `data_plane.snapshot`.
    """

    def __init__(
        self,
        folder: Path,
        epps: int,
        *behaviours: Behaviour,
        spare: int = 0,
        addresses: list[str] | None = None,
        responses: str = "Observe",
        **plan,
    ) -> None:
        super().__init__(*behaviours)
        self._processes: list[Process] = []
        try:
            content = snapshot(addresses or self.servers.addresses, **plan)
            self._start(folder, epps, spare, responses, content)
        except BaseException:
            self.stop()  # or its thread would keep the worker
            raise

    def _start(self, folder: Path, epps: int, spare: int, responses: str, content: dict) -> None:
        self.leader = Leader(folder, content)
        self._processes.append(self.leader)
        self.epps = []
        for number in range(epps + spare):
            self.epps.append(SharedEpp(folder, f"epp-{number}", self.leader.port))
            self._processes.append(self.epps[-1])
        first, *more = (epp.grpc for epp in self.epps)
        self._spare = self.epps[epps:]
        del self.epps[epps:]
        for epp in self._spare:
            epp.kill()
        for epp in self.epps:
            until(lambda epp=epp: "serving" in epp.log, START_SECONDS)
        self.envoy = Envoy(folder, first, more_grpc=tuple(more), responses=responses)
        until(lambda: self.send("critical")[0].result(60).outcome == "200", START_SECONDS)
        if epps > 1:
            until(lambda: len(self.leader.slots()) == epps, START_SECONDS)
        self.forget()

    def add(self) -> SharedEpp:
        """Start one of those that Envoy knows of already."""
        epp = self._spare.pop()
        epp.restart()
        self.epps.append(epp)
        return epp

    def steadily(
        self, model: str, per_second: float, seconds: float, envoy: Envoy | None = None
    ) -> Future[list[Answer]]:
        """Begin to send requests at a steady rate, whatever comes of them.

        Args:
            model: whose.
            per_second: how many.
            seconds: for how long.
            envoy: to which; None for the one of all EPPs.
        """
        http = (envoy or self.envoy).http
        return self.thread.submit(self._steadily(model, per_second, seconds, http))

    async def _steadily(
        self, model: str, per_second: float, seconds: float, http: int
    ) -> list[Answer]:
        began = time.monotonic()
        asked = []
        for number in range(round(per_second * seconds)):
            await asyncio.sleep(max(0.0, began + number / per_second - time.monotonic()))
            request = f"{model}-{self._sent}"
            self._sent += 1
            body = json.dumps({"model": model, "prompt": "x" * 20}).encode()
            asked.append(asyncio.create_task(self._ask(request, b"", body, None, http)))
        return list(await asyncio.gather(*asked))

    def stop(self) -> None:
        """End everything."""
        if hasattr(self, "envoy"):
            self.envoy.stop()
        for process in self._processes:
            process.end()
        self.thread.stop()
