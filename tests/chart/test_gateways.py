"""What the chart offers gateways: a Service without a cluster IP, and a Gateway's manifests.

No gateway runs here. That its own definitions accept the manifests was tried by hand, with those of
Envoy Gateway 1.9.1 and Gateway API 1.4.0.
"""

from __future__ import annotations

from pathlib import Path

import chart
import pytest
import yaml

from forebay_cli import envoy
from forebay_epp import settings as epp
from forebay_operator.resources.fields import FACTORS, MAX_SECONDS
from forebay_operator.resources.policy import Limits

VALUES = f"--values={Path(__file__).parent / 'values' / 'pool.yaml'}"
FILE = chart.CHART / "examples" / "envoy-ai-gateway.yaml"
POOL, NAMESPACE = "chat", "serving"


def test_a_headless_service_names_every_endpoint_picker():
    """Without an Envoy of ours, too; by the ports and pods of the other Service."""
    found = chart.objects(VALUES)
    headless = chart.one(found, "Service", "chat-epp-headless")["spec"]
    other = chart.one(found, "Service", "chat-epp")["spec"]
    (port,) = headless["ports"]

    assert headless["clusterIP"] == "None"
    assert headless["selector"] == other["selector"]
    assert port.items() <= other["ports"][0].items()
    # DNS tells addresses and not ports: the one that is named is the one on which pods listen.
    pod = chart.container(chart.one(found, "Deployment", "chat-epp"))
    assert {"name": port["targetPort"], "containerPort": port["port"]} in pod["ports"]


@pytest.mark.parametrize(
    ("headless", "name"), [("true", "chat-epp-headless"), ("false", "chat-epp")]
)
def test_a_pool_may_name_the_headless_service(headless, name):
    """The one that the chart makes."""
    options = ("create=true", "modelServers.matchLabels.app=a", f"headless={headless}")
    found = chart.objects(VALUES, *(f"--set=pools[0].{option}" for option in options))

    reference = chart.one(found, "InferencePool", "chat")["spec"]["endpointPickerRef"]
    assert reference["name"] == name
    assert reference["port"]["number"] == 9002


@pytest.fixture(scope="module")
def gateway() -> dict[str, dict]:
    """The example's objects by kind; there is one of each."""
    objects = list(yaml.safe_load_all(FILE.read_text()))
    found = {each["kind"]: each for each in objects}
    assert len(found) == len(objects)
    return found


def test_the_objects_of_the_example_find_each_other(gateway):
    """The Gateway its EnvoyProxy, policies and route the Gateway, the route the pool."""
    parameters = gateway["Gateway"]["spec"]["infrastructure"]["parametersRef"]
    assert parameters["name"] == gateway["EnvoyProxy"]["metadata"]["name"]
    name = gateway["Gateway"]["metadata"]["name"]
    for kind in ("ClientTrafficPolicy", "BackendTrafficPolicy"):
        (target,) = gateway[kind]["spec"]["targetRefs"]
        assert (target["kind"], target["name"]) == ("Gateway", name)
    route = gateway["HTTPRoute"]["spec"]
    assert route["parentRefs"] == [{"name": name}]
    assert route["rules"][0]["backendRefs"][0]["name"] == POOL
    assert f"name: {POOL}-epp-headless" in FILE.read_text()


def test_the_numbers_of_the_example_fit_together(gateway):
    """As the README explains them, with the defaults of policies and EPPs."""
    bootstrap = gateway["EnvoyProxy"]["spec"]["bootstrap"]["value"]
    (layer,) = yaml.safe_load(bootstrap)["layered_runtime"]["layers"]
    breakers = layer["static_layer"]
    streams = f"circuit_breakers.envoy.clusters.endpointpicker_{POOL}_{NAMESPACE}_ext_proc.default"
    max_streams = epp.parse(["--plan-file=x"]).max_streams

    assert breakers.keys() >= {f"{streams}.max_requests", f"{streams}.max_pending_requests"}
    assert set(breakers.values()) == {max_streams}
    assert max_streams == envoy.MAX_REQUESTS
    assert set(gateway["BackendTrafficPolicy"]["spec"]["circuitBreaker"].values()) == {max_streams}
    assert max_streams > Limits().max_requests

    client = gateway["ClientTrafficPolicy"]["spec"]
    assert client["timeout"]["http"]["streamIdleTimeout"] == f"{MAX_SECONDS / 3600:g}h"
    buffer = client["connection"]["bufferLimit"]
    assert int(buffer[:-2]) * FACTORS[buffer[-2:]] > Limits().max_body_bytes
    assert client["headers"]["earlyRequestHeaders"]["remove"] == [envoy.DESTINATION]
    assert gateway["HTTPRoute"]["spec"]["rules"][0]["timeouts"] == {"request": "0s"}
