"""The API server goes, comes back, lies and refuses: no process ends, no stale program stays.

Faults T6, T7 and T8 of the fault list, with a real API server, operators and EPPs.
Between operator and API server is a proxy that cuts connections or breaks answers.
"""

from __future__ import annotations

import os
import time

import pytest
from api_proxy import (
    Proxy,
    cut_answer,
    error_line,
    is_any_list,
    is_list,
    is_status,
    is_watch,
    late,
    status_answer,
)
from control_plane import Forwarder, apply, check_log, conditions, policy, programmed
from ext_proc_peer import until
from operator_account import kubeconfig

# Before a release: 20.
REPEATS = int(os.environ.get("FOREBAY_API_FAULTS", "2"))
SECONDS = 75.0
POLICIES = 50


@pytest.fixture
def proxy(cluster):
    proxy = Proxy(cluster.url)
    yield proxy
    proxy.close()


@pytest.fixture
def through(cluster, tmp_path):
    """Write a kubeconfig that goes by way of another server."""
    return lambda url: kubeconfig(cluster, tmp_path / "kubeconfig", cluster.token, url)


def delete(stage, name: str) -> None:
    stage.cluster.kubectl("delete", "fcp", name, "-n", stage.namespace)


def rejects(stage, name: str) -> None:
    """A policy that does more than nothing."""
    apply(stage.cluster, stage.namespace, policy(name, "chat", unmatched={"action": "Reject"}))


def settled(stage, epp, before) -> bool:
    """Whether the latest policy is in force in place of what ran before."""
    return epp.program() not in (before, ("", "")) and stage.settled([epp])


def test_what_was_deleted_behind_a_partition_is_gone(stage, through, proxy):  # noqa: ARG001
    """T6: the API server restarts meanwhile, so no watch can tell."""
    forwarder = Forwarder(int(stage.cluster.url.rpartition(":")[2]))
    try:
        operator = stage.operator(kubeconfig=through(f"https://127.0.0.1:{forwarder.port}"))
        (epp,) = stage.epps(1, operator.control_port)
        for number in range(2):
            stage.edit(number)
            until(lambda: stage.settled([epp]), SECONDS)
            # The older of two policies goes, so that the younger one counts.
            rejects(stage, "heir")
            until(lambda: accepted(stage, "heir") == "Conflicted", SECONDS)
            before = epp.program()
            forwarder.cut()
            stage.cluster.restart_apiserver(kill=bool(number))
            delete(stage, "chat")
            forwarder.heal()
            until(lambda before=before: epp.program() not in (before, ("", "")), SECONDS)
            until(lambda: programmed(stage.cluster, stage.namespace, "heir"), SECONDS)
            delete(stage, "heir")
        assert operator.running
        check_log(operator.log)
    finally:
        forwarder.close()


def accepted(stage, name: str) -> str:
    return conditions(stage.cluster, stage.namespace, name).get("Accepted", {}).get("reason", "")


ENDINGS = {
    "410 event": error_line(410, "Expired"),
    "500 event": error_line(500, "etcdserver: leader changed"),
    "half a line": b'{"type": "MODIFIED", "object": {"metadata"',
    "no JSON": b"<html>502 Bad Gateway</html>\n",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_watch_that_breaks_hides_nothing(stage, through, proxy, ending):
    """T7: what was edited and deleted in the gap is found; the process stays the same."""
    operator = stage.operator(kubeconfig=through(proxy.url))
    stage.edit(0)
    (epp,) = stage.epps(1, operator.control_port)
    until(lambda: stage.settled([epp]), SECONDS)
    for number in range(1, REPEATS + 1):
        rejects(stage, "ghost")
        until(lambda: accepted(stage, "ghost") == "Conflicted", SECONDS)
        before = epp.program()
        until(lambda: proxy.watches() > 0, SECONDS)
        proxy.deafen()
        stage.edit(number)
        delete(stage, "ghost")
        proxy.end_watches(ENDINGS[ending])
        until(lambda before=before: settled(stage, epp, before), SECONDS)
        until(lambda: '"name": "ghost"' not in operator.page("/resources"), SECONDS)
        assert operator.running
    check_log(operator.log)


@pytest.mark.parametrize("code", [500, 503])
def test_a_server_that_answers_errors_is_asked_again(stage, through, proxy, code):
    """T7: watches and LISTs get errors for a while, and one LIST half an answer."""
    operator = stage.operator("operator-0", "--sweep-interval=2s", kubeconfig=through(proxy.url))
    stage.edit(0)
    (epp,) = stage.epps(1, operator.control_port)
    until(lambda: stage.settled([epp]), SECONDS)
    for number in range(1, REPEATS + 1):
        before = epp.program()
        endings = [
            proxy.break_(is_any_list, cut_answer(b'{"kind": "PodList", "items": [{"met'), 1),
            proxy.break_(is_any_list, status_answer(code, "InternalError")),
            proxy.break_(is_watch, status_answer(code, "InternalError")),
        ]
        proxy.end_watches()
        broken = len(proxy.seen)
        until(lambda broken=broken: len(proxy.seen) >= broken + 6, SECONDS)
        stage.edit(number)
        for end in endings:
            end()
        until(lambda before=before: settled(stage, epp, before), SECONDS)
        assert operator.page("/livez")
        assert operator.ready
    check_log(operator.log)


def test_a_slow_list_delays_nothing(stage, through, proxy):
    """T7: while LISTs take 20 s, an edit that a watch delivers is in force at once."""
    operator = stage.operator("operator-0", "--sweep-interval=2s", kubeconfig=through(proxy.url))
    stage.edit(0)
    (epp,) = stage.epps(1, operator.control_port)
    until(lambda: stage.settled([epp]), SECONDS)
    end = proxy.break_(is_list("flowcontrolpolicies"), late(20))
    until(lambda: len(proxy.seen) >= 1, SECONDS)
    before = epp.program()
    stage.edit(1)
    until(lambda: settled(stage, epp, before), 15)
    end()
    sweeps = operator.metric("forebay_sweeps_total")
    until(lambda: operator.metric("forebay_sweeps_total") > sweeps, SECONDS)
    assert stage.settled([epp])
    check_log(operator.log)


def test_one_empty_list_wipes_nothing_out(stage, through, proxy):
    """It has to come a second time, ten seconds later, and does not."""
    operator = stage.operator("operator-0", "--sweep-interval=2s", kubeconfig=through(proxy.url))
    rejects(stage, "chat")
    (epp,) = stage.epps(1, operator.control_port)
    until(lambda: stage.settled([epp]), SECONDS)
    before = epp.version
    empty = b'{"kind": "FlowControlPolicyList", "metadata": {}, "items": []}'
    proxy.break_(is_list("flowcontrolpolicies"), cut_answer(empty), 1)
    until(lambda: operator.metric("forebay_sweeps_total", result="held") == 1, SECONDS)
    clean = operator.metric("forebay_sweeps_total", result="clean")
    until(lambda: operator.metric("forebay_sweeps_total", result="clean") > clean, SECONDS)
    assert epp.version == before
    assert stage.settled([epp])
    assert "waiting for a second one" in operator.log


def test_an_operator_that_hears_nothing_ends_itself(stage, through, proxy):
    """Its sweeps keep programs true until then; only new connections help."""
    operator = stage.operator("operator-0", "--sweep-interval=2s", kubeconfig=through(proxy.url))
    stage.edit(0)
    (epp,) = stage.epps(1, operator.control_port)
    until(lambda: stage.settled([epp]), SECONDS)
    before = epp.program()
    proxy.deafen()
    edits = iter(range(1, 1000))

    def edited_to_death() -> bool:
        stage.edit(next(edits))
        return not operator.running

    until(edited_to_death, SECONDS)
    assert operator.process.wait() == 1
    assert "no watch delivered" in operator.log
    assert epp.program() != before
    check_log(operator.log, "no watch delivered")


def test_statuses_are_exact_after_refusals(stage, through, proxy):
    """T8: 429 with Retry-After, then storms of 409 and 422, over 50 policies."""
    operator = stage.operator(kubeconfig=through(proxy.url))
    (epp,) = stage.epps(1, operator.control_port)
    end = proxy.break_(is_status, status_answer(429, "TooManyRequests", retry_after="3"))
    names = [f"p-{number:02}" for number in range(POLICIES)]
    apply(stage.cluster, stage.namespace, *(policy(name, "chat") for name in names))
    began = time.monotonic()
    until(lambda: time.monotonic() - began > 10, SECONDS)
    end()
    refused = [at for at, _, _ in proxy.seen]
    # At most 16 are asked at once, and then none for three seconds.
    waves = [at for before, at in zip([0.0, *refused], refused, strict=False) if at - before > 2.5]
    assert 2 <= len(waves) <= 5
    assert len(refused) <= 16 * len(waves)
    for code, reason in ((409, "Conflict"), (422, "Invalid")):
        proxy.break_(is_status, status_answer(code, reason), 2 * POLICIES)
    until(lambda: all(final(stage, name) for name in names), SECONDS)
    assert epp.connected
    check_log(operator.log)


def final(stage, name: str) -> bool:
    """Whether a status is what it should be: the first policy counts, the others name it."""
    found = conditions(stage.cluster, stage.namespace, name)
    if name == "p-00":
        return found.get("Programmed", {}).get("status") == "True"
    told = found.get("Accepted", {})
    return told.get("reason") == "Conflicted" and "FlowControlPolicy p-00 " in told["message"]
