"""forebay in a cluster with a node, as the README installs it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import chart
import yaml
from ext_proc_peer import until
from requests_over_http import Clients

if TYPE_CHECKING:
    from collections.abc import Iterator

    from api_server import ApiServer

README = chart.ROOT / "README.md"
HEADING = "## Use it in a cluster\n"
NAMESPACE, RELEASE, POOL = "forebay", "forebay", "chat"
POLICY = chart.ROOT / "crds/examples/quickstart/policy.yaml"
CRITICAL, STANDARD, SHEDDABLE = "llama-chat", "llama-summary", "llama-batch"
MODEL_SERVERS = 4
ENVOY_PORT = 8081
RESTRICTED = "pod-security.kubernetes.io/enforce=restricted"
PATIENCE_SECONDS = 120.0
# What helm does not bring, and Kubernetes adds to every namespace.
NOT_THE_CHARTS = (
    "event",
    "deployment.apps/vllm",
    "replicaset.apps/vllm-",
    "pod/vllm-",
    "pod.metrics.k8s.io/vllm-",
    "flowcontrolpolicy.forebay.dev/chat",
    "inferencemodel.inference.networking.x-k8s.io/",
    "configmap/kube-root-ca.crt",
    "serviceaccount/default",
)


def readme() -> tuple[str, str, str]:
    """Return the README's commands: for kind, for hack/local-cluster, and what follows either."""
    section = README.read_text().partition(HEADING)[2].partition("\n## ")[0]
    with_kind, without_docker, commands = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    return with_kind, without_docker, commands


class Installation:
    """The release `forebay` with the pool `chat`, its model servers, models and policy."""

    def __init__(self, cluster: ApiServer) -> None:
        self.cluster = cluster

    # Life

    @property
    def values(self) -> str:
        """What the README gives to helm in this kind of cluster."""
        with_kind, without_docker, _ = readme()
        block = without_docker if self.cluster.owned else with_kind
        return re.findall(r"^VALUES=(.*)$", block, re.MULTILINE)[0]

    def prepare(self) -> None:
        """Make the namespace before helm does, so that PodSecurity is enforced from the start."""
        self.cluster.kubectl("create", "namespace", NAMESPACE)
        self.cluster.kubectl("label", "namespace", NAMESPACE, RESTRICTED)

    def follow_readme(self) -> tuple[str, float]:
        """Run the README's commands; return what they print, and how long they took in seconds."""
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "helm").symlink_to(chart.PROGRAM)
            environment = {
                **os.environ,
                "KUBECONFIG": str(self.cluster.kubeconfig),
                "PATH": f"{folder}:{os.environ['PATH']}",
                "VALUES": self.values,
            }
            output = Path(folder, "output")
            began_at = time.monotonic()
            with output.open("w") as file:
                shell = subprocess.Popen(
                    ["bash", "-euo", "pipefail", "-c", readme()[2]],
                    cwd=chart.ROOT,
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                status = shell.wait(timeout=10 * PATIENCE_SECONDS)
            took = time.monotonic() - began_at
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGTERM)  # kubectl port-forward
            text = output.read_text()
        last_words = text.strip().rpartition("\n")[2]
        assert status == 0, f"exit status {status}: {last_words}\n{text}\n{self.describe()}"
        return text, took

    def helm(self, *arguments: str) -> str:
        """Run helm on the release."""
        where = (f"--namespace={NAMESPACE}", f"--kubeconfig={self.cluster.kubeconfig}")
        return chart.helm(*arguments, *where).stdout

    def upgrade(self, *options: str) -> None:
        """Install or upgrade with the README's values and these; wait until all are ready."""
        values = [f"--values={chart.ROOT / each}" for each in self.values.split(",")]
        # Tests have scaled by hand: replicas are kubectl's by now.
        flags = ("--install", "--wait", "--force-conflicts")
        self.helm("upgrade", RELEASE, str(chart.CHART), *flags, *values, *options)

    def describe(self) -> str:
        """Say how the pods are, for an error."""
        pods = ("get", "pods,events", "-n", NAMESPACE, "-o", "wide")
        return self.cluster.kubectl(*pods, check=False).stdout

    def remove(self) -> None:
        """Uninstall the release and delete its namespace."""
        self.helm("uninstall", RELEASE, "--ignore-not-found", "--wait")
        self.cluster.kubectl("delete", "namespace", NAMESPACE)

    def reset(self) -> None:
        """Go back to what the README leaves."""
        self.kubectl("apply", "-f", str(POLICY))
        self.scale("vllm", MODEL_SERVERS)
        self.scale("chat-epp", 1)
        self.wait_programmed()

    # Objects

    def kubectl(self, *arguments: str, **options) -> str:
        """Run kubectl in the namespace."""
        return self.cluster.kubectl("-n", NAMESPACE, *arguments, **options).stdout

    def get(self, *what: str) -> dict:
        """Return objects of the namespace."""
        return self.cluster.get(*what, "-n", NAMESPACE)

    def pods(self, component: str) -> list[dict]:
        """Return the pods of one of the chart's Deployments that are to stay."""
        found = self.get("pods", "-l", f"app.kubernetes.io/component={component}")["items"]
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def scale(self, deployment: str, replicas: int) -> None:
        """Ask for so many pods and wait until there are as many that are ready, and no other."""
        self.kubectl("scale", f"deployment/{deployment}", f"--replicas={replicas}")
        until(lambda: self.has_only(deployment, replicas), PATIENCE_SECONDS)

    def has_only(self, deployment: str, replicas: int) -> bool:
        """Return whether so many pods of a Deployment are ready, and there is no other."""
        selector = self.get("deployment", deployment)["spec"]["selector"]["matchLabels"]
        labels = ",".join(f"{key}={value}" for key, value in selector.items())
        pods = self.get("pods", "-l", labels)["items"]
        ready = [
            pod
            for pod in pods
            for condition in pod["status"].get("conditions", [])
            if condition["type"] == "Ready" and condition["status"] == "True"
        ]
        return len(pods) == len(ready) == replicas

    def policy(self, name: str = POOL) -> dict:
        """Return a policy."""
        return self.get("fcp", name)

    def condition(self, kind: str, name: str = POOL) -> dict:
        """Return a condition of a policy's latest generation; empty while there is none."""
        policy = self.policy(name)
        for found in policy.get("status", {}).get("conditions", []):
            latest = found.get("observedGeneration") == policy["metadata"]["generation"]
            if found["type"] == kind and latest:
                return found
        return {}

    def wait_programmed(self, epps: int = 1, name: str = POOL) -> None:
        """Wait until so many EPPs, and no other, run the policy's latest generation."""

        def done() -> bool:
            status = self.policy(name).get("status", {})
            return (
                self.condition("Programmed", name).get("status") == "True"
                and status["endpointPickers"]["ready"] == f"{epps}/{epps}"
            )

        try:
            until(done, PATIENCE_SECONDS)
        except AssertionError as error:
            raise AssertionError(f"{self.policy(name).get('status')}\n{self.describe()}") from error

    def set_policy(self, **fields) -> None:
        """Apply the README's policy with other fields, and wait until it is in force."""
        manifest = yaml.safe_load(POLICY.read_text())
        manifest["spec"] |= fields
        self.kubectl("apply", "-f", "-", input=json.dumps(manifest))
        self.wait_programmed()

    def of_the_release(self) -> set[str]:
        """Name everything in the cluster that has the release's label."""
        label = ("-l", f"app.kubernetes.io/instance={RELEASE}", "--all-namespaces")
        found = self._listed("true", *label) | self._listed("false", *label)
        return {name for name in found if not name.startswith("event")}

    def of_the_chart(self) -> set[str]:
        """Name everything in the namespace that only the chart can have brought."""
        found = self._listed("true", "-n", NAMESPACE)
        return {name for name in found if not name.startswith(NOT_THE_CHARTS)}

    def _listed(self, namespaced: str, *options: str) -> set[str]:
        kinds = self.cluster.kubectl(
            *("api-resources", "--verbs=list", f"--namespaced={namespaced}", "-o", "name")
        ).stdout.split()
        where = [each for each in options if namespaced == "true" or each != "--all-namespaces"]
        return set(
            self.cluster.kubectl("get", ",".join(kinds), "-o", "name", *where).stdout.split()
        )

    # Numbers

    def metrics(self, pod: str, port: int, namespace: str = NAMESPACE) -> dict[str, float]:
        """Return a pod's metrics by name with labels, as soon as it serves them."""
        path = f"/api/v1/namespaces/{namespace}/pods/{pod}:{port}/proxy/metrics"
        pages = []

        def served() -> bool:
            try:
                status, answer = self.cluster.ask("GET", path)
            except http.client.HTTPException:  # the pod, or the proxy to it, broke the answer off
                return False
            pages.append(answer.get("message", ""))
            return status == 200

        until(served, PATIENCE_SECONDS)
        lines = (line.rpartition(" ") for line in pages[-1].splitlines() if line[:1] != "#")
        return {name: float(value) for name, _, value in lines}

    def queued(self) -> int:
        """Return how many requests wait, over all EPPs."""
        return int(sum(self._of_epps("forebay_queue_requests")))

    def endpoints(self) -> int:
        """Return how many model servers the EPPs know, added up."""
        return len(self._of_epps("forebay_endpoint_limit"))

    def _of_epps(self, metric: str) -> list[float]:
        names = [pod["metadata"]["name"] for pod in self.pods("endpoint-picker")]
        return [
            value
            for name in names
            for key, value in self.metrics(name, 9090).items()
            if key.startswith(f"{metric}{{")
        ]

    def resident_mb(self, component: str) -> float:
        """Return the memory of a component's only process, in megabytes."""
        (pod,) = self.pods(component)
        code = "print(open('/proc/1/status').read().partition('VmRSS:')[2].split()[0])"
        name = pod["metadata"]["name"]
        return int(self.kubectl("exec", name, "--", "python3", "-c", code)) * 1024 / 1e6

    # Traffic

    @contextlib.contextmanager
    def clients(self) -> Iterator[Clients]:
        """Give clients of the Envoy; they wait for all their answers."""
        with self._address() as address:
            clients = Clients(address)
            try:
                yield clients
            finally:
                clients.close()

    @contextlib.contextmanager
    def _address(self) -> Iterator[tuple[str, int]]:
        """Give where the Envoy is reached from this machine."""
        if self.cluster.owned:
            yield self.get("service", "chat-envoy")["spec"]["clusterIP"], ENVOY_PORT
            return
        command = ["kubectl", f"--kubeconfig={self.cluster.kubeconfig}", "-n", NAMESPACE]
        forwarding = subprocess.Popen(
            [*command, "port-forward", "service/chat-envoy", f":{ENVOY_PORT}"],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            first = forwarding.stdout.readline()
            yield "127.0.0.1", int(re.findall(r"127\.0\.0\.1:(\d+) ->", first)[0])
        finally:
            forwarding.terminate()
            forwarding.wait()
            forwarding.stdout.close()
