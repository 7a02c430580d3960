"""Model servers and EPPs come and go."""

from __future__ import annotations

from ext_proc_peer import until
from installation import CRITICAL, MODEL_SERVERS, PATIENCE_SECONDS

AROUND = 20


def test_queued_requests_outlive_the_last_model_server(forebay, clients):
    """With no server left requests wait, visible in the status; two new ones answer them all."""
    forebay.set_policy(noEndpoints={"ttl": "10m"})
    assert [a.result().status for a in clients.send(CRITICAL, MODEL_SERVERS)] == [200] * 4
    assert forebay.endpoints() == MODEL_SERVERS
    forebay.scale("vllm", 0)
    until(lambda: forebay.endpoints() == 0, PATIENCE_SECONDS)

    waiting = clients.send(CRITICAL, 12)
    until(lambda: forebay.queued() == len(waiting), PATIENCE_SECONDS)
    until(lambda: forebay.policy()["status"]["queued"] == len(waiting), PATIENCE_SECONDS)
    (pool,) = forebay.policy()["status"]["pools"]
    assert pool["endpoints"] == 0
    assert {q["band"]: q["requests"] for q in pool["queues"]}["Critical"] == len(waiting)

    forebay.scale("vllm", 2)
    assert [str(answer.result().status) for answer in waiting] == ["200"] * len(waiting)


def test_endpoint_pickers_come_and_go_under_traffic(forebay, clients, figure):
    """From one to three and back: the status counts them, and no request fails."""
    with clients.trickle(CRITICAL) as trickle:
        trickle.wait_for(AROUND)
        for replicas in (3, 1):
            forebay.scale("chat-epp", replicas)
            forebay.wait_programmed(replicas)
            trickle.wait_for(AROUND)
    counts = forebay.policy()["status"]["endpointPickers"]

    figure(f"EPPs 1 -> 3 -> 1: {len(trickle.answers)} requests, {trickle.failed.total()} failed")
    assert trickle.failed == {}
    assert counts["desired"] == counts["connected"] == counts["programmed"] == 1
