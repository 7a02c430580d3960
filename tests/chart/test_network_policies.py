"""Who may talk to whom by the chart's NetworkPolicies; see support/network_policies.py."""

from __future__ import annotations

from pathlib import Path

import chart
import pytest
from network_policies import Pod, allowed, pod_of

FOLDER = Path(__file__).parent / "values"
SERVER = Pod(chart.NAMESPACE, {"app": "vllm"})
STRANGER = Pod(chart.NAMESPACE, {"app": "curious"})
GATEWAY = Pod("gateway", {"app": "gateway"})
SECOND_POOL = (
    "--set=pools[1].name=talk",
    "--set=pools[1].modelServers.matchLabels.app=talkers",
)


def standalone(*options: str) -> list[dict]:
    """Two pools, each with an Envoy."""
    return chart.objects(f"--values={FOLDER / 'standalone.yaml'}", *SECOND_POOL, *options)


def behind_a_gateway(*options: str) -> list[dict]:
    """One pool whose model servers the chart does not know."""
    return chart.objects(f"--values={FOLDER / 'pool.yaml'}", *options)


def test_an_endpoint_picker_answers_the_envoy_of_its_pool_only():
    """By default, and no other pod of the namespace."""
    found = standalone()
    epp = pod_of(found, "chat-epp")

    assert allowed(found, pod_of(found, "chat-envoy"), epp, "ext-proc")
    for other in (
        STRANGER,
        SERVER,
        GATEWAY,
        *(pod_of(found, n) for n in ("talk-envoy", "chat-epp")),
    ):
        assert not allowed(found, other, epp, "ext-proc")


def test_an_endpoint_picker_behind_a_gateway_answers_named_clients_only():
    """Those of networkPolicy.clients."""
    found = behind_a_gateway()
    epp = pod_of(found, "chat-epp")

    assert allowed(found, GATEWAY, epp, "ext-proc")
    assert not allowed(found, STRANGER, epp, "ext-proc")


def test_only_endpoint_pickers_reach_the_control_port():
    """Of each pool, also in other namespaces."""
    found = standalone("--set=pools[1].namespace=research")
    operator = pod_of(found, "forebay-operator")

    for name in ("chat-epp", "talk-epp"):
        assert allowed(found, pod_of(found, name), operator, "control")
    elsewhere = Pod("default", pod_of(found, "talk-epp").labels)
    for other in (STRANGER, SERVER, elsewhere, pod_of(found, "chat-envoy")):
        assert not allowed(found, other, operator, "control")


def test_envoy_takes_requests_of_anyone_and_sends_them_to_model_servers_only():
    """It is the front door; whatever a header says, it does not lead elsewhere."""
    found = standalone()
    envoy = pod_of(found, "chat-envoy")

    assert allowed(found, STRANGER, envoy, "http")
    assert allowed(found, envoy, SERVER, 8000)
    for target, port in (
        (SERVER, 22),
        (STRANGER, 8000),
        (Pod(chart.NAMESPACE, {"app": "talkers"}), 8000),
    ):
        assert not allowed(found, envoy, target, port)


def test_clients_of_envoy_may_be_named():
    """Then it takes requests of no other."""
    found = standalone("--set=networkPolicy.clients[0].podSelector.matchLabels.app=curious")

    assert allowed(found, STRANGER, pod_of(found, "chat-envoy"), "http")
    assert not allowed(found, GATEWAY, pod_of(found, "chat-envoy"), "http")
    assert not allowed(found, STRANGER, pod_of(found, "chat-epp"), "ext-proc")


@pytest.mark.parametrize("name", ["chat-epp", "forebay-operator"])
def test_metrics_are_for_those_who_are_named(name):
    """And for every pod where none is named."""
    port = {"chat-epp": "metrics", "forebay-operator": "http"}[name]
    selector = (
        "networkPolicy.monitoring[0].namespaceSelector.matchLabels.kubernetes\\.io/metadata\\.name"
    )
    named = standalone(f"--set={selector}=gateway")
    open_ = standalone()

    assert allowed(open_, STRANGER, pod_of(open_, name), port)
    assert allowed(named, GATEWAY, pod_of(named, name), port)
    assert not allowed(named, STRANGER, pod_of(named, name), port)


@pytest.mark.parametrize(
    "found",
    [
        pytest.param(behind_a_gateway, id="unknown labels"),
        pytest.param(lambda: standalone("--set=operator.endpointSlices=true"), id="any address"),
        pytest.param(lambda: standalone("--set=networkPolicy.egress=false"), id="switched off"),
    ],
)
def test_egress_is_free_where_it_is_not_known(found):
    """A server that cannot be reached would be worse. Who may come in is restricted as ever."""
    found = found()
    epp = pod_of(found, "chat-epp")

    assert allowed(found, epp, Pod("elsewhere", {}), 9999)
    assert not allowed(found, STRANGER, epp, "ext-proc")


def test_without_policies_everything_is_allowed():
    """The evaluator finds a difference."""
    found = standalone("--set=networkPolicy.enabled=false")

    assert allowed(found, STRANGER, pod_of(found, "chat-epp"), "ext-proc")
