"""Operators and EPPs as processes around a real API server.

Without a kubelet no pod runs: pods are objects here whose status the test writes, and the
process that stands for one runs beside it with a token that the API server has bound to that pod.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import yaml
from api_server import MERGE, Namespace
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from ext_proc_peer import until
from manifest_reading import pool_ref
from ports import free_port
from prometheus_client.parser import text_string_to_metric_families

from forebay_cli.child import dying_with_us
from forebay_operator.resources import BY_NAME, CONTROLLER_LABEL, POOL_LABEL

if TYPE_CHECKING:
    from api_server import ApiServer
    from prometheus_client.samples import Sample

QUICKSTART = Path(__file__).parents[2] / "crds" / "examples" / "quickstart"
NAME = "forebay-operator"
AUDIENCE = "forebay-control"
LOOPBACK = "127.0.0.1"
START_SECONDS = 120

_VERSION = re.compile(r"^forebay_program_(epoch|revision) (\S+)$", re.MULTILINE)


class Authority:
    """A certificate authority in a folder: `ca.crt`, and leaves in folders below."""

    def __init__(self, folder: Path, name: str = "test") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} CA")])
        certificate = self._builder(self._name, self._key.public_key(), 1).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        self.path = folder / "ca.crt"
        self.path.write_bytes(_pem(certificate.sign(self._key, hashes.SHA256())))

    def _builder(self, subject, key, days) -> x509.CertificateBuilder:
        now = dt.datetime.now(dt.UTC)
        begin, end = sorted((now - dt.timedelta(minutes=5), now + dt.timedelta(days=days)))
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin - dt.timedelta(minutes=5))
            .not_valid_after(end)
        )

    def leaf(self, name: str, *, dns: str = NAME, uri: str | None = None, days: float = 1) -> Path:
        """Write tls.crt, tls.key and ca.crt into a folder; negative days: expired."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        names = [x509.UniformResourceIdentifier(uri)] if uri else [x509.DNSName(dns)]
        names.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
        certificate = self._builder(subject, key.public_key(), days).add_extension(
            x509.SubjectAlternativeName(names), critical=False
        )
        files = {
            "tls.key": key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
            "tls.crt": _pem(certificate.sign(self._key, hashes.SHA256())),
            "ca.crt": self.path.read_bytes(),
        }
        for file, data in files.items():
            new = folder / f"{file}.new"
            new.write_bytes(data)
            new.replace(folder / file)
        return folder


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


class Process:
    """A process with an HTTP port and a log; it ends with the tests, by kill -9 of them too."""

    def __init__(self, command: list[str], log: Path, http: int, env=None) -> None:
        self.log_path = log
        self.http = http
        self._command = dying_with_us(*command)
        self._env = {**os.environ, **(env or {})}
        self.restart()

    def restart(self) -> None:
        """Start it, again if it has ended, with the same ports."""
        with self.log_path.open("ab") as stream:
            self.process = subprocess.Popen(
                self._command, stderr=stream, stdout=stream, env=self._env
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def page(self, path: str) -> str | None:
        """The page, or None while there is no answer."""
        try:
            with urlopen(f"http://127.0.0.1:{self.http}{path}", timeout=5) as page:
                return page.read().decode()
        except (URLError, OSError):
            return None

    def probe(self, path: str) -> str:
        """What a probe says, good or bad; nothing while there is no answer."""
        try:
            with urlopen(f"http://127.0.0.1:{self.http}{path}", timeout=5) as page:
                return page.read().decode()
        except HTTPError as error:
            with error:
                return error.read().decode()
        except OSError:
            return ""

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples that have these labels; 0 where there are none."""
        return sum(
            sample.value for sample in self.samples(name) if labels.items() <= sample.labels.items()
        )

    def samples(self, name: str) -> list[Sample]:
        """The samples of this name; no other is parsed, because tests poll this."""
        page = self.page("/metrics") or ""
        lines = "".join(line for line in page.splitlines(keepends=True) if line.startswith(name))
        return [
            sample
            for family in text_string_to_metric_families(lines)
            for sample in family.samples
            if sample.name == name
        ]

    def rss_mb(self) -> float:
        return self.metric("process_resident_memory_bytes") / 1e6

    def kill(self) -> None:
        """As the kernel does when memory is short."""
        self.process.kill()
        self.process.wait(10)

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def stop(self, seconds: float = 20) -> int:
        """End it as Kubernetes does; return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
            raise

    def end(self) -> None:
        """Make sure that it is gone."""
        if self.running:
            self.thaw()
            self.process.kill()
            self.process.wait(10)


class Operator(Process):
    """`python -m forebay_operator` on a cluster; several share a Lease by namespace."""

    def __init__(
        self,
        cluster: ApiServer,
        folder: Path,
        tls: Path | None,
        *flags: str,
        name: str = "operator-0",
        lease_namespace: str = "default",
        namespaces: tuple[str, ...] = (),
        control_port: int | None = None,
        kubeconfig: Path | None = None,
        env: dict[str, str] | None = None,
        prefix: tuple[str, ...] = (),
    ) -> None:
        self.control_port = control_port or free_port()
        http = free_port()
        command = [
            *(*prefix, sys.executable, "-P", "-m", "forebay_operator"),
            *("--control-bind-address=127.0.0.1", f"--control-port={self.control_port}"),
            *("--http-bind-address=127.0.0.1", f"--http-port={http}"),
            *([] if tls is None else [f"--control-tls-path={tls}"]),
            *(f"--lease-namespace={lease_namespace}", f"--identity={name}", f"--lease-name={NAME}"),
            *(f"--namespace={namespace}" for namespace in namespaces),
            *flags,
        ]
        super().__init__(
            command,
            folder / f"{name}.log",
            http,
            {"KUBECONFIG": str(kubeconfig or cluster.kubeconfig), **(env or {})},
        )

    @property
    def ready(self) -> bool:
        assert self.running, self.log[-3000:]
        return (self.page("/readyz") or "").startswith("ok\n")

    @property
    def epoch(self) -> float:
        return self.metric("forebay_leader_epoch")


class FolderOperator(Process):
    """`python -m forebay_operator` on a folder: by default the quickstart's, to be edited."""

    def __init__(
        self,
        folder: Path,
        control_port: int | None = None,
        *,
        manifests: Path | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        self.manifests = manifests or folder / "manifests"
        if not self.manifests.exists():
            shutil.copytree(QUICKSTART, self.manifests)
        self.control_port, http = control_port or free_port(), free_port()
        command = [
            *(sys.executable, "-P", "-m", "forebay_operator", f"--manifests={self.manifests}"),
            *("--control-client-auth=none", "--control-bind-address=127.0.0.1"),
            *("--http-bind-address=127.0.0.1", f"--control-port={self.control_port}"),
            f"--http-port={http}",
        ]
        super().__init__(command, folder / "operator.log", http, env)
        until(lambda: self.page("/readyz") == "ok\n", START_SECONDS)

    def edit(self, ttl: str) -> None:
        """Change the policy, as a user with an editor does."""
        file = self.manifests / "policy.yaml"
        policy = yaml.safe_load(file.read_text())
        policy["spec"]["noEndpoints"] = {"ttl": ttl}
        new = file.with_suffix(".new")
        new.write_text(yaml.safe_dump(policy))
        new.replace(file)

    def peak_rss_mb(self) -> float:
        """The most memory it ever had."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6


class EPPPod:
    """A pod object that stands for an EPP, and its token."""

    account = "default"

    def __init__(
        self, cluster: ApiServer, namespace: str, name: str, app: str, ip: str = LOOPBACK
    ) -> None:
        self.cluster, self.namespace, self.name = cluster, namespace, name
        self.path = f"/api/v1/namespaces/{namespace}/pods/{name}"
        self._create(app)
        self.uid = cluster.get("pod", name, "-n", namespace)["metadata"]["uid"]
        self.run(ip)

    def _create(self, app: str) -> None:
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": self.name,
                "namespace": self.namespace,
                "labels": {"app": app},
            },
            # No scheduler takes it; on a node that does not exist it would be garbage in a minute.
            "spec": {"containers": [{"name": "epp", "image": "epp"}], "schedulerName": "none"},
        }
        Namespace(self.cluster, self.namespace).create(pod)

    def run(self, ip: str = LOOPBACK, *, ready: bool = True) -> None:
        """Write the status a kubelet would; by default with the address processes here have."""
        status = {
            "phase": "Running",
            "podIP": ip,
            "podIPs": [{"ip": ip}],
            "conditions": [{"type": "Ready", "status": str(ready)}],
        }
        code, answer = self.cluster.ask("PATCH", f"{self.path}/status", {"status": status}, MERGE)
        assert code == 200, answer

    def token(self, audience: str = AUDIENCE) -> str:
        """A token bound to the pod, as a projected volume holds it."""
        pod = {"apiVersion": "v1", "kind": "Pod", "name": self.name, "uid": self.uid}
        status, answer = self.cluster.ask(
            "POST",
            f"/api/v1/namespaces/{self.namespace}/serviceaccounts/{self.account}/token",
            {"spec": {"audiences": [audience], "boundObjectRef": pod}},
        )
        assert status == 201, answer
        return answer["status"]["token"]

    def delete(self) -> None:
        status, answer = self.cluster.ask("DELETE", self.path, {"gracePeriodSeconds": 0})
        assert status == 200, answer


class EPPProcess(Process):
    """`python -m forebay_epp` that is told what to do by an operator.

    With a pod it shows the pod's token to an operator whose certificate `ca` has signed, else it
    is called `pod` and talks in plaintext.
    """

    def __init__(
        self,
        folder: Path,
        pod: EPPPod | str,
        pool: str,
        control_port: int,
        ca: Path | None = None,
        *flags: str,
        env: dict[str, str] | None = None,
        prefix: tuple[str, ...] = (),
    ) -> None:
        self.name = pod if isinstance(pod, str) else pod.name
        self.folder = folder / self.name
        self.folder.mkdir(exist_ok=True)
        self.state = self.folder / "state"
        self.state.mkdir(exist_ok=True)
        self.grpc, self.health, http = free_port(), free_port(), free_port()
        command = [
            *(*prefix, sys.executable, "-P", "-m", "forebay_epp", f"--pool-name={pool}"),
            *(f"--control-address=127.0.0.1:{control_port}", f"--pod-name={self.name}"),
            *(self._plaintext() if isinstance(pod, str) else self._trusted(pod, ca)),
            *(f"--state-path={self.state}", "--stats-interval=1s"),
            *("--bind-address=127.0.0.1", "--secure-serving=false"),
            *(f"--grpc-port={self.grpc}", f"--grpc-health-port={self.health}"),
            *(f"--metrics-port={http}", "--drain-timeout=2s", *flags),
        ]
        super().__init__(command, folder / f"{self.name}.log", http, env)

    def _plaintext(self) -> list[str]:
        return ["--control-insecure", "--pool-namespace=default", f"--pod-uid={self.name}"]

    def _trusted(self, pod: EPPPod, ca: Path | None) -> list[str]:
        self.token_path = self.folder / "token"
        if not self.token_path.exists():
            self.token_path.write_text(pod.token())
        return [
            *(f"--control-ca-path={ca}", f"--control-server-name={NAME}"),
            *(f"--control-token-path={self.token_path}", f"--pool-namespace={pod.namespace}"),
            *(f"--pod-namespace={pod.namespace}", f"--pod-uid={pod.uid}"),
        ]

    @property
    def version(self) -> tuple[int, int] | None:
        """(epoch, revision) of the program in force; None while there is no answer."""
        page = self.page("/metrics")
        found = dict(_VERSION.findall(page or ""))
        return (int(float(found["epoch"])), int(float(found["revision"]))) if found else None

    @property
    def serving(self) -> bool:
        """Whether its health check says so; it is then programmed."""
        assert self.running, self.log[-3000:]
        return '"msg": "serving"' in self.log

    def idle(self) -> bool:
        """Whether nothing waits, is in flight or open."""
        queues = self.queues()
        streams = self.metric("forebay_streams_open")
        return (queues["requests"], queues["size_bytes"], queues["in_flight"], streams) == (0,) * 4

    def outcomes(self) -> Counter[str]:
        """How many requests have left flow control, by outcome."""
        found: Counter[str] = Counter()
        for sample in self.samples("forebay_requests_total"):
            found[sample.labels["outcome"]] += int(sample.value)
        return found

    @property
    def connected(self) -> bool:
        return self.metric("forebay_control_connected") == 1

    def program(self) -> tuple[str, str]:
        """(source, sha256) of the program in force."""
        for sample in self.samples("forebay_program_info"):
            return sample.labels["source"], sample.labels["sha256"]
        return "", ""

    def in_force(self) -> tuple[str, ...]:
        """The lines of the metrics page about the program in force: version and content."""
        page = self.page("/metrics") or ""
        return tuple(line for line in page.splitlines() if line.startswith("forebay_program_"))

    def queues(self) -> dict:
        return json.loads(self.page("/debug/queues") or "{}")


def check_versions(*epps: EPPProcess) -> None:
    """Fail if the version of an EPP's program ever went back, as its log says."""
    for epp in epps:
        lines = [json.loads(line) for line in epp.log.splitlines() if '"program applied"' in line]
        versions = [(line["epoch"], line["revision"]) for line in lines if "epoch" in line]
        assert versions, f"{epp.name} had no program"
        assert versions == sorted(versions), f"{epp.name} went back: {versions}"


class Forwarder:
    """A TCP proxy on loopback that can be cut, and told where to forward to.

    With several targets it is a Service: connections go to each in turn. `source` is the address
    that it connects from.
    """

    def __init__(self, *targets: int, source: str = LOOPBACK) -> None:
        self.targets = list(targets)
        self._source = source
        self._cut = False
        self._pairs: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._cut:
                client.close()
                continue
            try:
                self.targets.append(target := self.targets.pop(0))
                server = socket.create_connection((LOOPBACK, target), 5, (self._source, 0))
                server.settimeout(None)
            except OSError:
                client.close()
                continue
            self._pairs |= {client, server}
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            self._pairs.discard(end)
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def cut(self) -> None:
        """End all connections and refuse new ones."""
        self._cut = True
        for end in list(self._pairs):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def heal(self) -> None:
        self._cut = False

    def close(self) -> None:
        self._listener.close()
        self.cut()


class Stage:
    """A namespace with pool `chat` and its Service, and the processes that serve it.

    Attributes:
        pods: of the EPPs.
    """

    def __init__(self, cluster: ApiServer, namespace: str, folder: Path) -> None:
        self.cluster, self.namespace, self.folder = cluster, namespace, folder
        self.authority = Authority(folder / "ca")
        self.tls = self.authority.leaf("operator", days=30)
        self._processes: list[Process] = []
        apply(cluster, namespace, pool("chat"), service())

    def operator(self, name: str = "operator-0", *flags: str, **options) -> Operator:
        """Start an operator of this namespace alone and wait until it is ready."""
        operator = Operator(
            *(self.cluster, self.folder, self.tls, "--endpoint-slices", *flags),
            name=name,
            lease_namespace=self.namespace,
            namespaces=(self.namespace,),
            **options,
        )
        self._processes.append(operator)
        until(lambda: operator.ready, START_SECONDS)
        return operator

    def epps(self, number: int, *ports: int, **options) -> list[EPPProcess]:
        """Start EPPs, which dial the ports in turn."""
        epps = [
            EPPProcess(
                self.folder,
                EPPPod(self.cluster, self.namespace, f"epp-{index}", "epp"),
                "chat",
                ports[index % len(ports)],
                self.authority.path,
                **options,
            )
            for index in range(number)
        ]
        self._processes += epps
        for epp in epps:
            until(lambda epp=epp: epp.serving, START_SECONDS)
        return epps

    def edit(self, number: int) -> None:
        """Apply policy `chat` with something in it that is different for each number.

        With it requests wait for a server for an hour, and then are served one after the other.
        """
        chat = policy(
            "chat",
            "chat",
            limits={"maxRequests": 1000 + number},
            saturation={"type": "Concurrency", "concurrency": {"maxRequestsPerEndpoint": 1}},
            noEndpoints={"ttl": "1h"},
        )
        apply(self.cluster, self.namespace, chat)

    def serve(self) -> None:
        """Give the pool a server."""
        apply(self.cluster, self.namespace, endpoint_slice("chat", "10.0.0.1"))

    def lease(self) -> dict:
        """The operators' Lease."""
        return self.cluster.get("lease", NAME, "-n", self.namespace)

    def settled(self, epps: list[EPPProcess]) -> bool:
        """Whether the latest policy is in force everywhere, says its status, and so it is."""
        return len({epp.in_force() for epp in epps}) == 1 and programmed(
            self.cluster, self.namespace, "chat"
        )

    def end(self) -> None:
        for process in self._processes:
            process.end()


def check_log(log: str, *allowed: str) -> None:
    """Fail on a traceback or critical line of a process, unless it holds one of these texts."""
    lines = log.splitlines()
    bad = [
        line
        for line in lines
        if ("Traceback" in line or '"critical"' in line.lower())
        and not any(text in line for text in allowed)
    ]
    assert not bad, "\n".join(lines[-60:])


def pool(name: str, *, service: str = "epp", selector: str = "vllm") -> dict:
    return {
        "apiVersion": "inference.networking.k8s.io/v1",
        "kind": "InferencePool",
        "metadata": {"name": name},
        "spec": {
            "selector": {"matchLabels": {"app": selector}},
            "targetPorts": [{"number": 8000}],
            "endpointPickerRef": {"name": service, "port": {"number": 9002}},
        },
    }


def service(name: str = "epp", controller: str = "forebay") -> dict:
    """The Service of EPPs; without a controller no operator claims its pools."""
    labels = {CONTROLLER_LABEL: controller} if controller else {}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": labels},
        "spec": {"selector": {"app": name}, "ports": [{"port": 9002}]},
    }


def endpoint_slice(pool_name: str, *addresses: str) -> dict:
    """Servers of a pool that are no pods."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": pool_name, "labels": {POOL_LABEL: pool_name}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": list(addresses)}],
        "ports": [{"name": "http", "port": 8000}],
    }


def policy(name: str, pool_name: str, **spec) -> dict:
    return {
        "apiVersion": "forebay.dev/v1alpha1",
        "kind": "FlowControlPolicy",
        "metadata": {"name": name},
        "spec": {"targetRefs": [pool_ref(pool_name)], **spec},
    }


def model(name: str, pool_name: str, model_name: str, criticality: str = "Standard") -> dict:
    return {
        "apiVersion": "inference.networking.x-k8s.io/v1alpha2",
        "kind": "InferenceModel",
        "metadata": {"name": name},
        "spec": {
            "modelName": model_name,
            "criticality": criticality,
            "poolRef": {"name": pool_name},
        },
    }


def apply(cluster: ApiServer, namespace: str, *manifests: dict) -> None:
    """Apply as kubectl does, and by it where there is a kind that forebay does not read."""
    if all((each["apiVersion"], each["kind"]) in BY_NAME for each in manifests):
        for manifest in manifests:
            Namespace(cluster, namespace).apply(manifest, manager="kubectl")
        return
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests})
    cluster.kubectl("apply", "--server-side", "-n", namespace, "-f", "-", input=text)


def conditions(cluster: ApiServer, namespace: str, name: str, kind: str = "fcp") -> dict[str, dict]:
    """The conditions of an object by type."""
    found = cluster.get(kind, name, "-n", namespace).get("status", {}).get("conditions", [])
    return {condition["type"]: condition for condition in found}


def programmed(cluster: ApiServer, namespace: str, name: str) -> bool:
    """Whether the latest generation is in force everywhere, as the status says."""
    found = cluster.get("fcp", name, "-n", namespace)
    return any(
        condition["type"] == "Programmed"
        and condition["status"] == "True"
        and condition["observedGeneration"] == found["metadata"]["generation"]
        for condition in found.get("status", {}).get("conditions", [])
    )
