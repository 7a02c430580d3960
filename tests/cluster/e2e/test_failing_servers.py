"""Model servers that run and are ready, and fail."""

from __future__ import annotations

import contextlib
import json

import pytest
from ext_proc_peer import until
from installation import CRITICAL, MODEL_SERVERS, NAMESPACE, PATIENCE_SECONDS

SERVER_PORT = 8000


def _metrics(forebay, pod: str, mode: str) -> None:
    """Have a simulated server serve its metrics as told from now on."""
    path = f"/api/v1/namespaces/{NAMESPACE}/pods/{pod}:{SERVER_PORT}/proxy/admin/config"
    forebay.cluster.kubectl(
        "create", "--raw", path, "-f", "-", input=json.dumps({"metrics": {"mode": mode}})
    )


@pytest.fixture
def three_of_four_fail(forebay):
    """All model servers but one answer scrapes with 503."""
    names = [pod["metadata"]["name"] for pod in forebay.get("pods", "-l", "app=vllm")["items"]]
    assert len(names) == MODEL_SERVERS
    with contextlib.ExitStack() as after:
        for name in names[1:]:
            after.callback(_metrics, forebay, name, "normal")
            _metrics(forebay, name, "unavailable")
        yield


@pytest.mark.usefixtures("three_of_four_fail")
def test_a_pool_whose_servers_mostly_fail_is_degraded_until_they_answer(forebay, clients):
    """The policy says what to look at; requests are answered, and good answers end it."""
    until(
        lambda: forebay.condition("Degraded").get("reason") == "EndpointsFailing", PATIENCE_SECONDS
    )
    degraded = forebay.condition("Degraded")
    assert degraded["status"] == "True"
    assert "look at the model servers" in degraded["message"]

    with clients.trickle(CRITICAL) as trickle:
        until(lambda: forebay.condition("Degraded").get("status") == "False", PATIENCE_SECONDS)

    assert trickle.failed == {}
