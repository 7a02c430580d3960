"""A pool that is deleted and created again, and a plan too large to send, on a real API server."""

from __future__ import annotations

import json

from control_plane import apply, check_log, conditions, model, pool
from ext_proc_peer import until
from operator_site import answer, endpoints
from ports import free_port

WAIT_SECONDS = 90
SERVER = "10.0.0.1:8000"


def drains(epp) -> bool:
    """Whether an EPP is unready because its pool is deleted, by its own account."""
    return epp.metric("forebay_pool_deleted") == 1


def test_endpoint_pickers_of_a_deleted_pool_drain_and_recover_when_it_is_created_again(stage):
    """One is there when it happens; another is away, as is the operator, and hears it later."""
    port = free_port()
    stage.edit(0)
    stage.serve()
    operator = stage.operator(control_port=port)
    there, away = epps = stage.epps(2, port)
    until(lambda: stage.settled(epps), WAIT_SECONDS)
    before = there.version

    away.freeze()
    stage.cluster.kubectl("delete", "infpool", "chat", "-n", stage.namespace)
    until(lambda: drains(there), WAIT_SECONDS)
    assert answer(there) == 503
    assert there.outcomes()["RejectedPoolDeleted"] == 1
    assert endpoints(there) == [SERVER]  # for what still waits
    assert there.version > before

    operator.kill()
    away.thaw()
    assert not drains(away)
    operator = stage.operator(control_port=port)
    until(lambda: drains(away), WAIT_SECONDS)

    apply(stage.cluster, stage.namespace, pool("chat"))
    until(lambda: not drains(there) and not drains(away), WAIT_SECONDS)
    until(lambda: stage.settled(epps), WAIT_SECONDS)
    for process in (operator, *epps):
        check_log(process.log)


def test_endpoint_pickers_whose_service_went_first_hear_of_the_deletion(stage):
    """As with `helm uninstall` or `kubectl delete -f`: no one claims the pool by then."""
    port = free_port()
    stage.edit(0)
    operator = stage.operator(control_port=port)
    (epp,) = stage.epps(1, port)
    until(lambda: stage.settled([epp]), WAIT_SECONDS)

    stage.cluster.kubectl("delete", "service", "epp", "-n", stage.namespace)
    stage.cluster.kubectl("delete", "infpool", "chat", "-n", stage.namespace)

    until(lambda: drains(epp), WAIT_SECONDS)
    for process in (operator, epp):
        check_log(process.log)


def test_an_operator_that_starts_anew_deletes_no_pool(stage):
    """It has read all of them before it says anything; EPPs never hear of a deletion."""
    port = free_port()
    stage.edit(0)
    operator = stage.operator(control_port=port)
    (epp,) = stage.epps(1, port)
    until(lambda: stage.settled([epp]), WAIT_SECONDS)
    for number in (1, 2):
        operator.kill()
        stage.edit(number)
        operator = stage.operator(control_port=port)
        until(lambda: stage.settled([epp]), WAIT_SECONDS)

    assert '"deleted": true' not in epp.log
    assert "pool is gone" not in operator.log


def test_a_plan_that_is_too_large_is_told_of_everywhere_and_endpoints_go_on(stage):
    """Without a policy: by the models, an Event on the pool, log and metric."""
    port = free_port()
    operator = stage.operator(control_port=port)
    (epp,) = stage.epps(1, port)
    small = model("small", "chat", "small")
    apply(stage.cluster, stage.namespace, small)
    until(lambda: told(stage, "small") == ("True", "Programmed"), WAIT_SECONDS)

    targets = [{"name": f"{'x' * 240}-{number}"} for number in range(10)]
    many = [model(f"m{number}", "chat", f"m{number}") for number in range(450)]
    for made in many:
        made["spec"]["targetModels"] = targets
    apply(stage.cluster, stage.namespace, *many)
    until(lambda: told(stage, "m449") == ("False", "TooLarge"), WAIT_SECONDS)
    assert told(stage, "small") == ("True", "Programmed")  # by the plan before, which has it
    assert metric(operator, "TooLarge") == 1
    assert '"reason": "TooLarge"' in operator.log
    until(lambda: "TooLarge" in pool_events(stage), WAIT_SECONDS)

    stage.serve()
    until(lambda: endpoints(epp) == [SERVER], WAIT_SECONDS)

    stage.cluster.kubectl(
        *("delete", "inferencemodels", "-n", stage.namespace, "--wait=false"),
        *(made["metadata"]["name"] for made in many[:200]),
    )
    until(lambda: told(stage, "m449") == ("True", "Programmed"), WAIT_SECONDS)
    assert metric(operator, "TooLarge") == 0


def told(stage, name: str) -> tuple[str, str]:
    """(status, reason) of a model's Programmed."""
    found = conditions(stage.cluster, stage.namespace, name, "inferencemodel")
    condition = found.get("Programmed", {})
    return condition.get("status", ""), condition.get("reason", "")


def metric(operator, reason: str) -> float:
    return operator.metric("forebay_pool_problems", reason=reason)


def pool_events(stage) -> set[str]:
    """The reasons of the Events on the pool."""
    found = stage.cluster.kubectl("get", "events", "-n", stage.namespace, "-o", "json").stdout
    return {
        event["reason"]
        for event in json.loads(found)["items"]
        if event["involvedObject"]["kind"] == "InferencePool"
    }
