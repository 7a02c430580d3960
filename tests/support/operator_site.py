"""What stories about an operator are made of: CRDs, an operator, and sites with EPPs.

There is no kubelet: pods are objects whose status the test writes, and a process stands for each
EPP's.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from control_plane import (
    EPPPod,
    EPPProcess,
    Operator,
    apply,
    conditions,
    pool,
    programmed,
    service,
)
from ext_proc_peer import Stream, channel, until
from ports import free_port

if TYPE_CHECKING:
    import grpc
    from api_server import ApiServer

CRDS = Path(__file__).parents[2] / "crds"
SECONDS = 60.0  # generous: what is waited for takes a second on an idle machine
BODY = b'{"model": "no-such-model", "prompt": "' + b"x" * 200 + b'"}'


def install(cluster: ApiServer, *names: str) -> None:
    """Install CRDs by their names, plural.group; all without any."""
    files = [
        CRDS / f"{group}_{plural}.yaml" for plural, _, group in (n.partition(".") for n in names)
    ]
    files = files or sorted(CRDS.glob("*.yaml"))
    for file in files:
        cluster.apply(file, "--force-conflicts")
    for file in files:
        group, plural = file.stem.split("_")
        cluster.wait_established(f"{plural}.{group}")


class RestartableOperator:
    """An operator that can be started again on its control port, as its container would be."""

    def __init__(self, *given, **options) -> None:
        self._given, self._options = given, options
        self.control_port = options.setdefault("control_port", free_port())
        self.process = Operator(*given, **options)

    def until_leading(self) -> None:
        until(lambda: self.process.ready and self.process.epoch > 0, SECONDS)

    def restart(self) -> None:
        """Kill it and start it again."""
        self.process.kill()
        self.process = Operator(*self._given, **self._options)
        self.until_leading()


class Site:
    """A namespace with EPPs of the pool `chat`."""

    def __init__(
        self, cluster: ApiServer, namespace: str, control_port: int, ca: Path, folder: Path
    ) -> None:
        self.cluster, self.namespace = cluster, namespace
        self._control_port, self._ca, self._folder = control_port, ca, folder
        self.pods: list[EPPPod] = []
        self.processes: list[EPPProcess] = []

    def end(self) -> None:
        for process in self.processes:
            process.end()

    # What people do

    def apply(self, *manifests: dict) -> None:
        apply(self.cluster, self.namespace, *manifests)

    def pool(self) -> None:
        self.apply(pool("chat"), service())

    def delete(self, kind: str, *names: str) -> None:
        self.cluster.kubectl("delete", kind, "-n", self.namespace, *(names or ("--all",)))

    # What runs

    def epp(self, *flags: str, pool: str = "chat", app: str = "epp") -> EPPProcess:
        """Start one more EPP."""
        pod = EPPPod(self.cluster, self.namespace, f"epp-{len(self.pods)}", app)
        process = EPPProcess(self._folder, pod, pool, self._control_port, self._ca, *flags)
        self.pods.append(pod)
        self.processes.append(process)
        return process

    def epps(self, number: int) -> list[EPPProcess]:
        found = [self.epp() for _ in range(number)]
        until(lambda: all(process.connected for process in found), SECONDS)
        return found

    def server(self, name: str, ip: str) -> EPPPod:
        """Add a model server's pod; no server runs there."""
        return EPPPod(self.cluster, self.namespace, name, "vllm", ip)

    # What is said

    def object(self, name: str, kind: str = "fcp") -> dict:
        return self.cluster.get(kind, name, "-n", self.namespace)

    def status(self, name: str, kind: str = "fcp") -> dict:
        return self.object(name, kind).get("status", {})

    def condition(self, name: str, which: str, kind: str = "fcp") -> tuple[str, str]:
        """(status, reason) of a condition."""
        found = conditions(self.cluster, self.namespace, name, kind).get(which, {})
        return found.get("status", ""), found.get("reason", "")

    def message(self, name: str, which: str, kind: str = "fcp") -> str:
        return conditions(self.cluster, self.namespace, name, kind)[which]["message"]

    def until(self, name: str, which: str, status: str, reason: str, kind: str = "fcp") -> None:
        """Wait for a condition of the latest generation."""

        def so() -> bool:
            found = self.object(name, kind)
            return any(
                (c["type"], c["status"], c["reason"], c.get("observedGeneration"))
                == (which, status, reason, found["metadata"]["generation"])
                for c in found.get("status", {}).get("conditions", [])
            )

        with suppress(AssertionError):
            until(so, SECONDS)
            return
        found = json.dumps(self.object(name, kind), indent=1)
        raise AssertionError(f"{which}={status} {reason} did not come: {found}")

    def until_programmed(self, name: str) -> None:
        with suppress(AssertionError):
            until(lambda: programmed(self.cluster, self.namespace, name), SECONDS)
            return
        raise AssertionError(f"not programmed: {json.dumps(self.object(name), indent=1)}")


def send(channel: grpc.Channel, body: bytes = BODY, **headers: str) -> Stream:
    """Send a request, which counts as long as its stream is kept."""
    stream = Stream(channel)
    stream.send_headers(**headers)
    stream.send_body(body)
    return stream


def answer(process: EPPProcess) -> int:
    """The HTTP status with which an EPP refuses a request for a model that no server has."""
    with channel(f"127.0.0.1:{process.grpc}") as open_channel:
        return send(open_channel).answer().immediate_response.status.code


def waiting(process: EPPProcess) -> dict[str, int]:
    """The requests that wait, by band."""
    return {band["band"]: band["requests"] for band in process.queues().get("bands", ())}


def endpoints(process: EPPProcess) -> list[str]:
    return sorted(endpoint["address"] for endpoint in process.queues().get("endpoints", ()))
