"""The chart's Envoy: its bootstrap beside the one of `forebay up`, judged by Envoy, and running."""

from __future__ import annotations

import http.client
import signal
import subprocess
import threading
from contextlib import closing
from pathlib import Path

import chart
import pytest
import yaml
from control_driver import Driver
from control_peers import POOL, snapshot
from control_plane import EPPProcess
from envoy_process import BINARY, ModelServer
from ext_proc_peer import until
from ports import free_port

from forebay_cli import envoy

VALUES = Path(__file__).parent / "values" / "standalone.yaml"


@pytest.fixture(scope="module", params=["Observe", "Read"])
def responses(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def text(responses) -> str:
    options = (f"--set=standalone.proxy.responses={responses}", "--set=epp.replicas=2")
    objects = chart.objects(f"--values={VALUES}", *options)
    return chart.one(objects, "ConfigMap", "chat-envoy")["data"]["envoy.yaml"]


@pytest.fixture
def bootstrap(text) -> dict:
    return yaml.safe_load(text)


@pytest.fixture
def reference(responses) -> dict:
    ports = envoy.Ports(8081, 9002, 19000, "0.0.0.0", more_grpc=(9003,))
    return envoy.bootstrap(ports, secure=True, responses=responses)


def parts(config: dict, kind: str) -> dict[str, dict]:
    return {each["name"]: each for each in config["static_resources"][kind]}


def test_envoy_accepts_it_without_a_warning(text, tmp_path):
    """Nothing in it is deprecated."""
    config = tmp_path / "envoy.yaml"
    config.write_text(text)

    done = subprocess.run(
        [
            *(BINARY, "--mode", "validate"),
            *("-l", "warning", "-c", config),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert (done.returncode, done.stderr) == (0, "")


def test_it_is_the_bootstrap_of_one_machine_but_for_what_pods_need(bootstrap, reference):
    """Field by field, the whole document: what is listed here is all that may differ."""
    expected = parts(reference, "clusters")["epp"]
    del expected["type"]
    expected["cluster_type"] = {
        "name": "envoy.clusters.dns",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.clusters.dns.v3.DnsCluster",
            "dns_refresh_rate": "2s",
            "dns_lookup_family": "V4_PREFERRED",
        },
    }
    expected["ignore_health_on_host_removal"] = True
    expected["health_checks"][0]["interval"] = "1s"
    endpoints = expected["load_assignment"]["endpoints"][0]["lb_endpoints"]
    del endpoints[1:]  # DNS finds the others
    [endpoint] = endpoints
    endpoint["endpoint"]["address"]["socket_address"] = {
        "address": "chat-epp-headless.forebay-system.svc.cluster.local",
        "port_value": 9002,
    }
    reference["static_resources"]["listeners"].append(parts(bootstrap, "listeners")["health"])

    assert bootstrap == reference


def test_the_admin_page_is_on_loopback_only(bootstrap):
    """It can end the process; probes have a listener that answers one path."""
    admin = bootstrap["admin"]["address"]["socket_address"]
    assert admin["address"] == "127.0.0.1"
    assert set(parts(bootstrap, "listeners")) == {"inference", "health"}


# --- running


class Pods:
    """What the pods of a pool would run, on this machine: `localhost` is the headless Service."""

    def __init__(self, text: str, arguments: list[str], folder: Path) -> None:
        self.server, self.driver = ModelServer(), Driver()
        self.epp = EPPProcess(
            *(folder, "epp-0", "chat", self.driver.port, None),
            *("--secure-serving=true", "--drain-timeout=60s"),
        )
        self.http, self.health = free_port(), free_port()
        for old, new in (
            ("chat-epp-headless.forebay-system.svc.cluster.local", "localhost"),
            ("port_value: 9002", f"port_value: {self.epp.grpc}"),
            ("port_value: 8081", f"port_value: {self.http}"),
            ("port_value: 8082", f"port_value: {self.health}"),
            ("port_value: 19000", f"port_value: {free_port()}"),
            ("0.0.0.0", "127.0.0.1"),
        ):
            assert old in text
            text = text.replace(old, new)
        config = folder / "envoy.yaml"
        config.write_text(text)
        arguments = [str(config) if each.startswith("/etc") else each for each in arguments]
        self.envoy = subprocess.Popen(
            [str(BINARY), *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def program(self) -> None:
        """Give the EPP its first plan: from then on it serves."""
        self.driver.put(POOL, snapshot(30.0, POOL, self.server.address))

    def ask(self, port: int, path: str, body: str | None = None, **headers: str) -> int:
        """Make a request and return the status of the answer; 0 if there is none."""
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
            try:
                connection.request("POST" if body else "GET", path, body, headers)
                return connection.getresponse().status
            except OSError:
                return 0

    def ready(self) -> bool:
        assert self.envoy.poll() is None
        return self.ask(self.health, "/ready") == 200

    def complete(self, **headers: str) -> int:
        return self.ask(self.http, "/v1/completions", '{"model": "m"}', **headers)

    def completions(self) -> int:
        """How many requests have reached the model server; it is also asked for its metrics."""
        return sum(each["path"] == "/v1/completions" for each in self.server.seen)

    def end(self) -> None:
        self.envoy.kill()
        self.envoy.wait(10)
        self.epp.end()
        self.driver.stop()
        self.server.stop()


@pytest.fixture
def starting(text, tmp_path):
    """An Envoy that runs, and an EPP that has no plan yet."""
    deployment = chart.one(chart.objects(f"--values={VALUES}"), "Deployment", "chat-envoy")
    made = Pods(text, chart.container(deployment)["args"], tmp_path)
    try:
        yield made
    finally:
        made.end()


@pytest.fixture
def pods(starting):
    starting.program()
    until(starting.ready, 60)
    return starting


def test_it_is_unready_until_an_endpoint_picker_serves(starting):
    """The Service has no ready Envoy before: no client gets a 500 because all starts at once."""
    until(lambda: starting.ask(starting.health, "/ready") == 503, 60)
    assert not starting.ready()

    starting.program()
    until(starting.ready, 60)

    assert [starting.complete() for _ in range(5)] == [200] * 5


def test_a_request_goes_where_the_endpoint_picker_says(pods):
    """By TLS to an EPP that a name stands for; not where the client says."""
    forged = {"x-gateway-destination-endpoint": "127.0.0.1:1"}

    assert pods.complete() == 200
    assert pods.complete(**forged) == 200
    assert pods.completions() == 2
    assert pods.ask(pods.health, "/quitquitquit", "x") == 404


def test_it_is_unready_while_all_endpoint_pickers_drain(pods):
    """At once, and what was on its way is answered."""
    pods.server.hold.clear()
    answers: list[int] = []
    running = threading.Thread(target=lambda: answers.append(pods.complete()))
    running.start()
    until(lambda: pods.completions() == 1, 60)

    pods.epp.process.send_signal(signal.SIGTERM)
    until(lambda: not pods.ready(), 60)
    assert answers == []
    pods.server.hold.set()
    running.join(60)

    assert answers == [200]
