"""More requests than the model servers can take."""

from __future__ import annotations

from ext_proc_peer import until
from installation import CRITICAL, MODEL_SERVERS, PATIENCE_SECONDS, SHEDDABLE, STANDARD

EACH = 20
BANDS = [
    {"name": criticality, "queue": {"ttl": "10m"}}
    for criticality in ("Critical", "Standard", "Sheddable")
]


def test_the_critical_go_first(forebay, clients, figure):
    """Of three models that wait, the status shows the queues and answers come by criticality."""
    forebay.set_policy(
        saturation={"type": "Concurrency", "concurrency": {"maxRequestsPerEndpoint": 1}},
        bands=BANDS,
    )
    with clients.holding(STANDARD, MODEL_SERVERS):
        # The least important come first.
        sent = {
            model: clients.send(model, EACH, max_tokens=10)
            for model in (SHEDDABLE, STANDARD, CRITICAL)
        }
        until(lambda: forebay.queued() == 3 * EACH, PATIENCE_SECONDS)
        until(lambda: forebay.policy()["status"]["queued"] == 3 * EACH, PATIENCE_SECONDS)
        (pool,) = forebay.policy()["status"]["pools"]
    answers = {model: [each.result() for each in futures] for model, futures in sent.items()}

    assert {queue["requests"] for queue in pool["queues"]} == {EACH}
    assert float(pool["saturation"]) >= 1
    assert {each.status for model in answers.values() for each in model} == {200}
    ends = {model: sorted(each.ended_at for each in found) for model, found in answers.items()}
    # The last of a band are answered beside the first of the next.
    assert ends[CRITICAL][-1] < ends[STANDARD][EACH // 2]
    assert ends[STANDARD][-1] < ends[SHEDDABLE][EACH // 2]
    first = ends[CRITICAL][0]
    medians = ", ".join(f"{m} {ends[m][EACH // 2] - first:.1f} s" for m in sent)
    figure(f"overload: median answer after the first: {medians}")
