"""How fast an edit reaches the EPPs and the status, on a real API server.

Edits: one pool, four real EPPs, one policy that is edited again and again. Cold start:
1,000 policies on 100 pools and 50 EPPs, all there before the operator starts; these EPPs are
simulated (a gRPC client that acknowledges whatever it gets and keeps reporting the same stats).
Then nothing happens for a while, and no status may be written. Needs what tests/cluster needs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import api_server
import control_plane
import grpc
from control_plane import NAME, Authority, EPPPod, EPPProcess, Operator

from forebay_control.v1 import control_pb2 as pb
from forebay_control.v1 import control_pb2_grpc as rpc
from forebay_operator.cluster.api import Cluster
from forebay_operator.resources import POLICY

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from api_server import ApiServer

CRDS = Path(__file__).parents[2] / "crds"
EDITS = 50
EPPS = 4
POLICIES, POOLS, SIMULATED, NAMESPACES = 1000, 100, 50, 5
IDLE_SECONDS = 600
WAIT_SECONDS = 120.0
LOOK_SECONDS = 0.005
STATS = pb.FromPicker(
    stats=pb.Stats(
        saturation=0.52,
        endpoints=4,
        in_flight=37,
        bands=[pb.BandStats(band="Critical", requests=17, bytes=17_000, dispatched=4_000)],
    )
)
_PATH = f"/apis/{POLICY.group}/{POLICY.version}/namespaces"


async def _until(claim: Callable[[], Awaitable[bool]], what: str, pause: float) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not await claim():
        if time.monotonic() > deadline:
            raise SystemExit(f"did not come true within {WAIT_SECONDS:.0f} s: {what}")
        await asyncio.sleep(pause)


def _programmed(policy: dict[str, Any]) -> bool:
    """Return whether the latest generation is in force everywhere."""
    return _condition(policy, "Programmed") == ("True", policy["metadata"]["generation"])


def _condition(policy: dict[str, Any], kind: str) -> tuple[str, int] | None:
    for condition in policy.get("status", {}).get("conditions", []):
        if condition["type"] == kind:
            return condition["status"], condition["observedGeneration"]
    return None


# ------------------------------------------------------------------------------------------- edits


async def _edits(server: ApiServer, folder: Path, edits: int) -> dict[str, float]:
    """Edit one policy; time acknowledgements by the operator's counter, statuses by a watch."""
    authority = Authority(folder / "ca")
    tls = authority.leaf(NAME)
    namespace = "edits"
    server.kubectl("create", "namespace", namespace)
    control_plane.apply(
        server,
        namespace,
        control_plane.service(),
        control_plane.pool("chat"),
        control_plane.model("chat", "chat", "llama-chat", "Critical"),
        control_plane.policy("chat", "chat"),
    )
    processes: list[control_plane.Process] = []
    api = Cluster()
    try:
        operator = Operator(server, folder, tls, lease_namespace=namespace)
        processes.append(operator)
        for number in range(EPPS):
            pod = EPPPod(server, namespace, f"epp-{number}", "epp")
            processes.append(EPPProcess(folder, pod, "chat", operator.control_port, authority.path))
        path = f"{_PATH}/{namespace}/{POLICY.plural}/chat"

        async def settled() -> bool:
            found = await api.request("GET", path)
            counts = found.get("status", {}).get("endpointPickers", {})
            return _programmed(found) and counts.get("programmed") == EPPS

        await _until(settled, "four EPPs programmed", 0.2)
        acks, statuses = [], []
        for number in range(edits):
            before = await _acks(operator)
            watch = asyncio.create_task(_watched(api, await api.request("GET", path)))
            await asyncio.sleep(0.2)  # edits do not come in bursts
            began = time.monotonic()
            spec = {"bands": [{"name": "Critical", "queue": {"ttl": f"{31 + number}s"}}]}
            await api.request(
                "PATCH", path, {"spec": spec}, content_type="application/merge-patch+json"
            )

            async def acked(wanted: float = before + EPPS) -> bool:
                return await _acks(operator) >= wanted

            await _until(acked, "edit acknowledged", LOOK_SECONDS)
            acks.append(time.monotonic() - began)
            statuses.append(await asyncio.wait_for(watch, WAIT_SECONDS) - began)
        return {
            "edits": edits,
            "edit_to_ack_p50_ms": 1000 * statistics.median(acks),
            "edit_to_ack_p95_ms": 1000 * _p95(acks),
            "edit_to_ack_max_ms": 1000 * max(acks),
            "edit_to_status_p50_ms": 1000 * statistics.median(statuses),
            "edit_to_status_p95_ms": 1000 * _p95(statuses),
            "epp_rss_mb": max(p.rss_mb() for p in processes if isinstance(p, EPPProcess)),
        }
    finally:
        await api.close()
        for process in reversed(processes):
            process.end()


async def _acks(operator: Operator) -> float:
    return await asyncio.to_thread(operator.metric, "forebay_control_answers_total", answer="ack")


async def _watched(api: Cluster, policy: dict[str, Any]) -> float:
    """Return when the generation after this one is said to be in force everywhere."""
    metadata = policy["metadata"]
    session, info = await api._connect(fresh=False)  # noqa: SLF001  # the client reads no streams
    url = f"{info.server.rstrip('/')}{_PATH}/{metadata['namespace']}/{POLICY.plural}"
    query = {
        "watch": "true",
        "fieldSelector": f"metadata.name={metadata['name']}",
        "resourceVersion": metadata["resourceVersion"],
    }
    async with session.get(url, params=query, headers=info.as_http_headers()) as answer:
        async for line in answer.content:
            found = json.loads(line)["object"]
            if found["metadata"]["generation"] > metadata["generation"] and _programmed(found):
                return time.monotonic()
    raise SystemExit("the watch has ended")


def _p95(values: list[float]) -> float:
    return sorted(values)[max(0, round(0.95 * len(values)) - 1)]


# -------------------------------------------------------------------------------------- cold start


class SimulatedEPP:
    """An EPP of one pool that takes everything: it stands in for a process of 60 MB."""

    def __init__(self, port: int, ca: bytes, token: str, pool: str, pod: dict[str, Any]) -> None:
        """Send the Hello."""
        self._credentials = grpc.ssl_channel_credentials(ca)
        self._address = f"127.0.0.1:{port}"
        self._token = token
        metadata = pod["metadata"]
        self._hello = pb.Hello(
            protocol=1,
            pool=pool,
            pod_namespace=metadata["namespace"],
            pod_name=metadata["name"],
            pod_uid=metadata["uid"],
            boot_id=metadata["uid"],
        )
        self.acked = 0

    async def run(self) -> None:
        """Dial until it works, then answer until cancelled."""
        options = [("grpc.ssl_target_name_override", NAME), ("grpc.use_local_subchannel_pool", 1)]
        while True:
            async with grpc.aio.secure_channel(
                self._address, self._credentials, options=options
            ) as channel:
                with suppress(grpc.RpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
                    await self._serve(channel)
            await asyncio.sleep(0.2)

    async def _serve(self, channel: grpc.aio.Channel) -> None:
        call = rpc.ControlStub(channel).Connect(
            metadata=(("authorization", f"Bearer {self._token}"),)
        )
        await call.write(pb.FromPicker(hello=self._hello))
        reporting = asyncio.create_task(self._report(call))
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                program = message.program
                if message.WhichOneof("message") != "program":
                    continue
                self._hello.applied.CopyFrom(
                    pb.Applied(version=program.version, sha256=program.sha256, source="Live")
                )
                ack = pb.Ack(nonce=program.nonce, version=program.version, sha256=program.sha256)
                await call.write(pb.FromPicker(ack=ack))
                self.acked += 1
        finally:
            reporting.cancel()
            call.cancel()

    @staticmethod
    async def _report(call: Any) -> None:
        with suppress(grpc.RpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
            while True:
                await asyncio.sleep(5)
                await call.write(STATS)


async def _create(api: Cluster, path: str, manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    gate = asyncio.Semaphore(16)

    async def one(manifest: dict[str, Any]) -> dict[str, Any]:
        async with gate:
            return await api.request("POST", path, manifest)

    return await asyncio.gather(*(one(manifest) for manifest in manifests))


async def _fill(api: Cluster, namespace: str, pools: range) -> list[tuple[str, dict[str, Any]]]:
    """Create a namespace's part of the objects; return (pool, pod) of its EPPs."""
    await api.request("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
    core = f"/api/v1/namespaces/{namespace}"
    inference = "/apis/inference.networking.k8s.io/v1/namespaces"
    names = [f"pool-{number}" for number in pools]
    await _create(api, f"{core}/services", [control_plane.service(f"epp-{n}") for n in names])
    await _create(
        api,
        f"{inference}/{namespace}/inferencepools",
        [control_plane.pool(name, service=f"epp-{name}") for name in names],
    )
    await _create(
        api,
        f"{_PATH}/{namespace}/{POLICY.plural}",
        [
            control_plane.policy(f"{name}-{number}", name)
            for number in range(POLICIES // POOLS)
            for name in names
        ],
    )
    account = f"{core}/serviceaccounts"
    await api.request("POST", account, {"metadata": {"name": "epp"}})
    found = []
    for name in names[: SIMULATED // NAMESPACES]:
        pod = await api.request(
            "POST",
            f"{core}/pods",
            {
                "metadata": {"name": f"epp-{name}", "labels": {"app": f"epp-{name}"}},
                "spec": {
                    "containers": [{"name": "epp", "image": "epp"}],
                    "serviceAccountName": "epp",
                },
            },
        )
        await api.request(
            "PATCH",
            f"{core}/pods/epp-{name}/status",
            {"status": {"phase": "Running"}},
            content_type="application/merge-patch+json",
        )
        found.append((f"{namespace}/{name}", pod))
    return found


async def _token(api: Cluster, pod: dict[str, Any]) -> str:
    metadata = pod["metadata"]
    bound = {"apiVersion": "v1", "kind": "Pod", "name": metadata["name"], "uid": metadata["uid"]}
    answer = await api.request(
        "POST",
        f"/api/v1/namespaces/{metadata['namespace']}/serviceaccounts/epp/token",
        {"spec": {"audiences": [control_plane.AUDIENCE], "boundObjectRef": bound}},
    )
    return str(answer["status"]["token"])


async def _cold_start(server: ApiServer, folder: Path, idle_seconds: float) -> dict[str, float]:
    """Start an operator on a full cluster, then leave it alone."""
    api = Cluster()
    authority = Authority(folder / "ca-cold", "cold")
    tls = authority.leaf(NAME)
    share = POOLS // NAMESPACES
    epps = []
    for number in range(NAMESPACES):
        begin = number * share
        epps += await _fill(api, f"cold-{number}", range(begin, begin + share))
    tokens = [await _token(api, pod) for _, pod in epps]
    began_line = _audit_lines(server)
    began = time.monotonic()
    operator = Operator(server, folder, tls, name="cold", lease_namespace="cold-0")
    simulated = [
        SimulatedEPP(operator.control_port, authority.path.read_bytes(), token, pool, pod)
        for (pool, pod), token in zip(epps, tokens, strict=True)
    ]
    tasks = [asyncio.create_task(each.run()) for each in simulated]
    try:

        async def acknowledged() -> bool:
            return all(each.acked for each in simulated)

        async def reported() -> bool:
            return await _all_reported(api)

        await _until(acknowledged, "all simulated EPPs programmed", 0.02)
        acked_seconds = time.monotonic() - began
        await _until(reported, "every policy has its final status", 0.5)
        cold_start_seconds = time.monotonic() - began
        await asyncio.sleep(35)  # the stats that came meanwhile are written, once
        writes = _writes(server, began_line)
        rss_mb = _peak_mb(operator.pid)
        print(f"cold start done; idle for {idle_seconds:.0f} s ...", flush=True)
        idle_line = _audit_lines(server)
        await asyncio.sleep(idle_seconds)
        idle_writes = _writes(server, idle_line)
        return {
            "cold_start_acked_seconds": acked_seconds,
            "cold_start_seconds": cold_start_seconds,
            "operator_rss_mb": rss_mb,
            "operator_rss_mb_after_idle": operator.rss_mb(),
            "status_writes_per_object": max(writes.values(), default=0),
            "status_writes": sum(writes.values()),
            "idle_seconds": idle_seconds,
            "idle_status_writes": sum(idle_writes.values()),
        }
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        operator.end()
        await api.close()


async def _all_reported(api: Cluster) -> bool:
    """Return whether every policy has a status that will last."""
    states: Counter[str] = Counter()
    for number in range(NAMESPACES):
        policies = [
            item async for page in api.pages(POLICY, f"cold-{number}") for item in page.items
        ]
        for policy in policies:
            reasons = {
                c["type"]: c["reason"] for c in policy.get("status", {}).get("conditions", [])
            }
            states[reasons.get("Programmed", "")] += 1
    wanted = {
        "Programmed": SIMULATED,
        "NoEndpointPickers": POOLS - SIMULATED,
        "Conflicted": POLICIES - POOLS,
    }
    return dict(states) == wanted


def _audit_lines(server: ApiServer) -> int:
    with (server.dir / "audit.log").open("rb") as log:
        return sum(1 for _ in log)


def _writes(server: ApiServer, after_line: int) -> Counter[str]:
    """Count the statuses written since a line of the audit log, by object."""
    found: Counter[str] = Counter()
    with (server.dir / "audit.log").open("rb") as log:
        for number, line in enumerate(log):
            if number < after_line:
                continue
            event = json.loads(line)
            reference = event.get("objectRef", {})
            if (
                event["verb"] == "patch"
                and reference.get("subresource") == "status"
                and reference.get("apiGroup") == POLICY.group
            ):
                found[f"{reference['namespace']}/{reference['name']}"] += 1
    return found


def _peak_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("the operator has ended")


# --------------------------------------------------------------------------------------------------


async def _measure(server: ApiServer, folder: Path, arguments: Any) -> dict[str, float]:
    figures = await _edits(server, folder, arguments.edits)
    for name, value in figures.items():
        print(f"{name:32}{value:12.3f}", flush=True)
    return figures | await _cold_start(server, folder, arguments.idle_seconds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--edits", type=int, default=EDITS)
    parser.add_argument("--idle-seconds", type=float, default=IDLE_SECONDS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with api_server.running(folder / "cluster", "--controller-manager", "--audit") as server:
            os.environ["KUBECONFIG"] = str(server.kubeconfig)
            server.apply(CRDS)
            server.wait_established(f"{POLICY.plural}.{POLICY.group}")
            figures = asyncio.run(_measure(server, folder, arguments))
    for figure, value in figures.items():
        print(f"{figure:32}{value:12.3f}")
    if arguments.json:
        rounded = {figure: round(value, 3) for figure, value in figures.items()}
        arguments.json.write_text(json.dumps({"bench": "control", "figures": rounded}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
