"""Requests are answered whatever is replaced, and the status catches up."""

from __future__ import annotations

import pytest
from ext_proc_peer import until
from installation import CRITICAL, PATIENCE_SECONDS

BEFORE, DURING, AFTER = 20, 100, 20


def test_traffic_goes_on_without_the_operator(forebay, clients, figure):
    """Requests are answered while it is away; an edited policy is in force when it is back."""
    before = [pod["metadata"]["uid"] for pod in forebay.pods("endpoint-picker")]
    with clients.trickle(CRITICAL) as trickle:
        trickle.wait_for(BEFORE)
        forebay.kubectl("scale", "deployment/forebay-operator", "--replicas=0")
        forebay.kubectl("delete", "pods", "-l", "app.kubernetes.io/component=operator", "--force")
        until(lambda: not forebay.pods("operator"), PATIENCE_SECONDS)
        patch = '{"spec": {"limits": {"maxRequests": 77}}}'
        forebay.kubectl("patch", "fcp", "chat", "--type=merge", "-p", patch)
        trickle.wait_for(DURING)
        assert forebay.condition("Programmed") == {}, "of a generation that no operator has seen"

        forebay.scale("forebay-operator", 1)
        forebay.wait_programmed()
        trickle.wait_for(AFTER)

    figure(f"operator away: {len(trickle.answers)} requests, {trickle.failed.total()} failed")
    assert trickle.failed == {}
    assert [pod["metadata"]["uid"] for pod in forebay.pods("endpoint-picker")] == before


@pytest.mark.parametrize("deployment", ["forebay-operator", "chat-epp"])
def test_a_rolling_restart_fails_no_request(forebay, clients, figure, deployment):
    """The only replica is replaced under traffic, and the new one does its work."""
    with clients.trickle(CRITICAL) as trickle:
        trickle.wait_for(BEFORE)
        forebay.kubectl("rollout", "restart", f"deployment/{deployment}")
        forebay.kubectl("rollout", "status", f"deployment/{deployment}", "--timeout=90s")
        until(lambda: forebay.has_only(deployment, 1), PATIENCE_SECONDS)
        trickle.wait_for(AFTER)

    figure(
        f"rolling restart of {deployment}: {len(trickle.answers)} requests, "
        f"{trickle.failed.total()} failed"
    )
    assert trickle.failed == {}
    forebay.wait_programmed()


def test_a_rolling_restart_of_several_epps_fails_no_request(forebay, clients, figure):
    """Two replicas are replaced one after the other."""
    forebay.scale("chat-epp", 2)
    forebay.wait_programmed(2)
    with clients.trickle(CRITICAL) as trickle:
        trickle.wait_for(BEFORE)
        forebay.kubectl("rollout", "restart", "deployment/chat-epp")
        forebay.kubectl("rollout", "status", "deployment/chat-epp", "--timeout=90s")
        until(lambda: forebay.has_only("chat-epp", 2), PATIENCE_SECONDS)
        trickle.wait_for(AFTER)

    figure(
        f"rolling restart of two chat-epp: {len(trickle.answers)} requests, "
        f"{trickle.failed.total()} failed"
    )
    assert trickle.failed == {}
    forebay.wait_programmed(2)
