"""The bootstrap of the chart's Envoy, beside the one of `forebay up`, and judged by Envoy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import chart
import pytest
import yaml

from forebay_cli import envoy

VALUES = Path(__file__).parent / "values" / "standalone.yaml"


@pytest.fixture(scope="module")
def text() -> str:
    return chart.one(chart.objects(f"--values={VALUES}"), "ConfigMap", "chat-envoy")["data"][
        "envoy.yaml"
    ]


@pytest.fixture
def bootstrap(text) -> dict:
    return yaml.safe_load(text)


@pytest.fixture
def reference() -> dict:
    ports = envoy.Ports(http=8081, grpc=9002, admin=19000, address="0.0.0.0")
    return envoy.bootstrap(ports, secure=True)


def parts(config: dict, kind: str) -> dict[str, dict]:
    return {each["name"]: each for each in config["static_resources"][kind]}


def test_envoy_accepts_it_without_a_warning(text, tmp_path):
    """Nothing in it is deprecated."""
    config = tmp_path / "envoy.yaml"
    config.write_text(text)

    done = subprocess.run(
        [
            *(Path(sys.executable).with_name("envoy"), "--mode", "validate"),
            *("-l", "warning", "-c", config),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert (done.returncode, done.stderr) == (0, "")


def test_requests_are_handled_as_on_one_machine(bootstrap, reference):
    """The listener: filters and their order, timeouts, retries; down to the last field."""
    assert parts(bootstrap, "listeners")["inference"] == parts(reference, "listeners")["inference"]


def test_model_servers_are_reached_as_on_one_machine(bootstrap, reference):
    """Where the endpoint picker says, with room for all that wait."""
    clusters = parts(bootstrap, "clusters")
    assert clusters["model_servers"] == parts(reference, "clusters")["model_servers"]


def test_endpoint_pickers_are_pods_behind_a_name(bootstrap, reference):
    """All else about them is as on one machine."""
    ours, theirs = parts(bootstrap, "clusters")["epp"], parts(reference, "clusters")["epp"]

    address = ours.pop("load_assignment")["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]
    assert address["socket_address"] == {
        "address": "chat-epp-headless.forebay-system.svc.cluster.local",
        "port_value": 9002,
    }
    dns = ours.pop("cluster_type")
    assert dns["name"] == "envoy.clusters.dns"
    assert ours.pop("ignore_health_on_host_removal") is True
    del theirs["load_assignment"], theirs["type"]
    assert ours["health_checks"][0].pop("interval") == "1s"
    del theirs["health_checks"][0]["interval"]
    assert ours == theirs


def test_the_admin_page_is_on_loopback_only(bootstrap):
    """It can end the process; probes have a listener that answers one path."""
    admin = bootstrap["admin"]["address"]["socket_address"]
    assert admin["address"] == "127.0.0.1"
    assert set(parts(bootstrap, "listeners")) == {"inference", "health"}
