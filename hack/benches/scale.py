"""An operator's needs in a large cluster: memory, and how long its event loop stands still.

A real API server with 10,000 pods of 5.6 KB, spread over 100 pools (and half as many again in
namespaces without a pool). Measured: VmHWM of the operator's process, the longest step of an event
loop in CPU time of its thread, which a busy machine does not change, and from outside the slowest
answer of its /livez page, which it does. All from the start until the last pool is planned, over
two sweeps, and while a server of each pool changes. Needs what tests/cluster needs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import api_server
import control_plane
from control_plane import NAME, Authority, Operator

from forebay_operator.cluster.api import Cluster

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable

PODS, POOLS, NAMESPACES = 10_000, 100, 20
PADDING = 2_600  # makes 5.6 KB of a pod, with what the API server adds
AT_ONCE = 32
SWEEP_SECONDS = 10
WAIT_SECONDS = 300.0
# Python runs it at the start of the operator's process.
STEPS = """
import asyncio.events, os, threading, time
_run = asyncio.events.Handle._run
def run(self):
    began = time.thread_time()
    _run(self)
    took_ms = (time.thread_time() - began) * 1000
    if took_ms > 10:
        with open(os.environ["FOREBAY_STEPS"], "a") as file:
            print(f"{took_ms:.1f} {threading.current_thread().name} {self!r:.300}", file=file)
asyncio.events.Handle._run = run
"""


def _pod(name: str, app: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "labels": {"app": app, "pod-template-hash": "5d4f8c7b9", "tier": "serving"},
            "annotations": {"example.com/padding": "x" * PADDING},
        },
        "spec": {"containers": [{"name": "server", "image": "vllm/vllm-openai:v0.11.0"}]},
    }


def _status(number: int) -> dict[str, Any]:
    ip = f"10.{number // 65536}.{number // 256 % 256}.{number % 256}"
    return {
        "status": {
            "phase": "Running",
            "podIP": ip,
            "podIPs": [{"ip": ip}],
            "conditions": [{"type": "Ready", "status": "True"}],
        }
    }


async def _all(work: Iterable[Awaitable[Any]]) -> None:
    """Await many, some at once."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(each: Awaitable[Any]) -> None:
        async with gate:
            await each

    await asyncio.gather(*(one(each) for each in work))


async def _fill(server: api_server.ApiServer, api: Cluster, pods: int, namespaces: int) -> int:
    """Make pools and pods; return the bytes of one pod."""
    names = [f"scale-{number}" for number in range(namespaces)]
    for name in [*names, "elsewhere"]:
        server.kubectl("create", "namespace", name)
    await asyncio.sleep(5)  # until the controllers have made accounts
    for number in range(POOLS):
        namespace, pool = names[number % namespaces], f"pool-{number}"
        control_plane.apply(
            server,
            namespace,
            control_plane.service(f"{pool}-epp"),
            control_plane.pool(pool, service=f"{pool}-epp", selector=pool),
            control_plane.policy(pool, pool),
        )

    async def make(number: int, namespace: str) -> None:
        path, name = f"/api/v1/namespaces/{namespace}/pods", f"server-{number}"
        await api.request("POST", path, _pod(name, f"pool-{number % POOLS}"))
        await api.request(
            "PATCH",
            f"{path}/{name}/status",
            _status(number),
            content_type="application/merge-patch+json",
        )

    await _all(make(number, names[number % POOLS % namespaces]) for number in range(pods))
    await _all(make(number, "elsewhere") for number in range(pods, pods * 3 // 2))
    found = await api.request("GET", f"/api/v1/namespaces/{names[0]}/pods/server-0")
    return len(json.dumps(found))


class _Probe:
    """Asks a page all the time and keeps how long each answer took; reads the log of steps."""

    def __init__(self, url: str, steps: Path) -> None:
        self._url = url
        self._steps = steps
        self.slowest_ms: list[float] = []

    def longest_steps(self) -> list[str]:
        """Return the longest steps since the last call, each as "MILLISECONDS THREAD CALLBACK"."""
        lines = self._steps.read_text().splitlines()
        self._steps.write_text("")
        return sorted(lines, key=lambda line: -float(line.split()[0]))[:5]

    async def run(self) -> None:
        async with aiohttp.ClientSession() as session:
            while True:
                began = time.monotonic()
                try:
                    async with session.get(self._url) as answer:
                        await answer.read()
                except aiohttp.ClientError:
                    await asyncio.sleep(0.05)
                    continue
                self.slowest_ms.append((time.monotonic() - began) * 1000)
                await asyncio.sleep(0.005)


def _peak_mb(operator: Operator) -> float:
    status = Path(f"/proc/{operator.pid}/status").read_text()
    return int(next(n for n in status.splitlines() if n.startswith("VmHWM")).split()[1]) / 1000


async def _measure(
    server: api_server.ApiServer, folder: Path, pods: int, namespaces: int
) -> dict[str, Any]:
    api = Cluster()
    tls = Authority(folder / "ca").leaf(NAME)
    try:
        size_bytes = await _fill(server, api, pods, namespaces)
        steps = folder / "steps"
        steps.mkdir()
        (steps / "sitecustomize.py").write_text(STEPS)
        (steps / "log").touch()
        operator = Operator(
            *(server, folder, tls, f"--sweep-interval={SWEEP_SECONDS}s"),
            lease_namespace="default",
            env={"PYTHONPATH": str(steps), "FOREBAY_STEPS": str(steps / "log")},
        )
        probe = _Probe(f"http://127.0.0.1:{operator.http}/livez", steps / "log")
        probing = asyncio.create_task(probe.run())
        try:
            found = await _phases(server, api, operator, probe, pods, namespaces)
        finally:
            probing.cancel()
            operator.end()
        return {"pod_bytes": size_bytes, **found}
    finally:
        await api.close()


async def _phases(
    server: api_server.ApiServer,
    api: Cluster,
    operator: Operator,
    probe: _Probe,
    pods: int,
    namespaces: int,
) -> dict[str, Any]:
    found: dict[str, Any] = {"pods": pods, "pools": POOLS, "namespaces": namespaces}
    began = time.monotonic()

    def note(phase: str) -> None:
        times = sorted(probe.slowest_ms)
        found[phase] = {
            "seconds": round(time.monotonic() - began, 1),
            "peak_rss_mb": round(_peak_mb(operator)),
            "rss_mb": round(operator.rss_mb()),
            "longest_steps": probe.longest_steps(),
            "slowest_answer_ms": round(times[-1]),
            "p99_answer_ms": round(times[len(times) * 99 // 100]),
        }
        probe.slowest_ms = []

    async def until(claim: Any, what: str) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not await asyncio.to_thread(claim):
            if time.monotonic() > deadline:
                raise SystemExit(f"did not come true: {what}\n{operator.log[-2000:]}")
            await asyncio.sleep(0.5)

    await until(lambda: operator.ready and operator.epoch > 0, "ready")
    note("start")

    def endpoints() -> int:
        listed = server.get("fcp", "--all-namespaces")["items"]
        counts = [p.get("status", {}).get("pools", [{}]) for p in listed]
        return sum(pool[0].get("endpoints", 0) for pool in counts if pool)

    await until(lambda: endpoints() == pods, "every pod is an endpoint")
    note("statuses")
    await asyncio.sleep(2.5 * SWEEP_SECONDS)
    note("two sweeps")
    for number in range(POOLS):
        path = f"/api/v1/namespaces/scale-{number % POOLS % namespaces}/pods/server-{number}"
        await api.request(
            "PATCH",
            f"{path}/status",
            {"status": {"conditions": [{"type": "Ready", "status": "False"}]}},
            content_type="application/merge-patch+json",
        )
    await asyncio.sleep(5)
    note("a server of each pool has gone")
    found["log"] = [line for line in operator.log.splitlines() if '"WARNING"' in line][:5]
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="hack/bench scale")
    parser.add_argument("--pods", type=int, default=PODS)
    parser.add_argument("--namespaces", type=int, default=NAMESPACES)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="forebay-") as name:
        folder = Path(name)
        cluster = folder / "cluster"
        cluster.mkdir()
        (folder / "ca").mkdir()
        with api_server.running(cluster, "--controller-manager") as server:
            server.apply_crds()
            os.environ["KUBECONFIG"] = str(server.kubeconfig)
            found = asyncio.run(_measure(server, folder, given.pods, given.namespaces))
    text = json.dumps(found, indent=2)
    print(text)
    if given.json:
        given.json.write_text(text)


if __name__ == "__main__":
    main()
