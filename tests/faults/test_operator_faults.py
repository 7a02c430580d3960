"""Operators that are killed, frozen or lose their Lease: what EPPs run converges.

Faults T4, T5, T9 and T10 of the fault list, on real processes and a real API server. A version
never goes back in any of them.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import os
import random
import time
from collections import Counter
from functools import partial
from itertools import pairwise
from threading import Event

import pytest
from control_plane import Forwarder, apply, check_log, check_versions, model
from ext_proc_peer import until
from ext_proc_queue import Waiting
from loop_thread import LoopThread
from ports import free_port

# Enough to see what is not rare; before a release: 50 and 20.
KILLS = int(os.environ.get("FOREBAY_KILLS", "4"))
CRASHES = int(os.environ.get("FOREBAY_CRASHES", "8"))
CRASH_SECONDS = 3
FROZEN_SECONDS = 30
WAITERS = 100
WAIT_SECONDS = 120
UNKNOWN = ("", "")

_log = logging.getLogger(__name__)


def seconds_until(claim) -> float:
    """Wait until a claim becomes true and return how long that took."""
    began = time.monotonic()
    until(claim, WAIT_SECONDS)
    return time.monotonic() - began


@pytest.fixture
def thread():
    """A loop for clients of EPPs."""
    thread = LoopThread()
    yield thread
    thread.stop()


def test_epps_converge_after_the_operator_is_killed_between_their_acknowledgements(stage, thread):
    """T4: two of four have a new program, the operator is killed; all end with that program.

    Requests that wait meanwhile keep their turn.
    """
    lots = random.Random(4)
    port = free_port()
    operator = stage.operator(control_port=port)
    stage.edit(0)
    epps = stage.epps(4, port)
    until(lambda: stage.settled(epps), WAIT_SECONDS)
    first, took = epps[0], []
    with Waiting(thread, first.grpc) as waiting:
        for number in range(WAITERS):
            waiting.enqueue(number)
        for kill in range(1, KILLS + 1):
            lots.shuffle(epps)
            wanted = kill_between(stage, operator, kill, epps[:2], epps[2:])
            operator = stage.operator(control_port=port)
            took.append(seconds_until(partial(all_run, epps, wanted)))
            until(lambda: stage.settled(epps), WAIT_SECONDS)
        stage.serve()
        assert waiting.serve_all() == list(range(WAITERS))
    until(first.idle)
    _log.info("%s kills, converged after %.1f s at most", KILLS, max(took))
    assert first.outcomes() == {"Dispatched": WAITERS}
    check_versions(*epps)
    for process in (operator, *epps):
        check_log(process.log)


def kill_between(stage, operator, edit, fast, slow) -> tuple[str, str]:
    """Kill the operator when only the fast have taken an edit; return what they run then."""
    before = fast[0].program()
    for epp in slow:
        epp.freeze()
    stage.edit(edit)
    until(lambda: all(p.program() not in (before, UNKNOWN) for p in fast), WAIT_SECONDS)
    operator.kill()
    for epp in slow:
        epp.thaw()
    return fast[0].program()


def all_run(epps, wanted) -> bool:
    return {epp.program() for epp in epps} == {wanted}


def test_an_operator_that_crashes_again_and_again_ends_up_right_and_writes_little(stage):
    """T5: a crash every three seconds, each after an edit of the policy."""
    port = free_port()
    stage.edit(0)
    operator = stage.operator(control_port=port)
    (epp,) = stage.epps(1, port)
    until(lambda: stage.settled([epp]), WAIT_SECONDS)
    pause = Event()
    restarts = [dt.datetime.now(dt.UTC)]
    began = time.monotonic()
    for crash in range(1, CRASHES + 1):
        stage.edit(crash)
        pause.wait(began + crash * CRASH_SECONDS - time.monotonic())
        operator.kill()
        restarts.append(dt.datetime.now(dt.UTC))
        operator = stage.operator(control_port=port)
    until(lambda: stage.settled([epp]), WAIT_SECONDS)
    limits = stage.cluster.get("fcp", "chat", "-n", stage.namespace)["spec"]["limits"]
    assert limits["maxRequests"] == 1000 + CRASHES
    writes = status_writes(stage, restarts)
    _log.info("status writes per restart: %s", writes)
    assert max(writes) <= 2
    check_versions(epp)
    check_log(operator.log)
    check_log(epp.log)


def status_writes(stage, restarts: list[dt.datetime]) -> list[int]:
    """How often the policy's status was written after each restart and before the next."""
    times = []
    for line in (stage.cluster.dir / "audit.log").read_text().splitlines():
        if stage.namespace not in line:
            continue
        event = json.loads(line)
        what = event.get("objectRef", {})
        if what.get("subresource") == "status" and what["resource"] == "flowcontrolpolicies":
            times.append(dt.datetime.fromisoformat(event["requestReceivedTimestamp"]))
    assert times
    ends = [*restarts, dt.datetime.max.replace(tzinfo=dt.UTC)]
    found = Counter(
        number for at in times for number, (a, b) in enumerate(pairwise(ends)) if a <= at < b
    )
    return [found[number] for number in range(len(restarts))]


def test_a_leader_that_was_frozen_gives_up_when_it_wakes(stage):
    """T9: frozen for 30 s, a policy is edited meanwhile; the old leader sets nothing back.

    Then the other one is frozen.
    """
    ports = [free_port(), free_port()]
    replicas = [stage.operator("operator-0", control_port=ports[0])]
    stage.edit(0)
    until(lambda: replicas[0].epoch > 0, WAIT_SECONDS)
    replicas.append(stage.operator("operator-1", control_port=ports[1]))
    services = [Forwarder(*ports), Forwarder(*ports)]
    epps = stage.epps(2, *(service.port for service in services))
    try:
        for number, (old, new) in enumerate((replicas, reversed(replicas))):
            until(lambda: stage.settled(epps), WAIT_SECONDS)
            freeze(stage, 10 * number, old, new, epps, services[0])
    finally:
        for service in services:
            service.close()
    check_versions(*epps)
    for process in (*replicas, *epps):
        check_log(process.log)


def freeze(stage, edit, old, new, epps, service) -> None:
    """Freeze the leader for a while; the first EPP goes to the new one, the other stays."""
    assert (old.epoch > 0, new.epoch) == (True, 0)
    frozen = time.monotonic()
    old.freeze()
    targets, service.targets = service.targets, [new.control_port]
    service.cut()
    service.heal()
    stage.edit(edit + 1)
    taken_over = seconds_until(lambda: new.epoch > 0)
    stage.edit(edit + 2)
    until(lambda: epps[0].version[0] == new.epoch, WAIT_SECONDS)
    Event().wait(frozen + FROZEN_SECONDS - time.monotonic())
    old.thaw()
    gave_up = seconds_until(lambda: old.page("/metrics") and old.epoch == 0)
    until(lambda: stage.settled(epps), WAIT_SECONDS)
    for _ in range(10):
        found = stage.cluster.get("fcp", "chat", "-n", stage.namespace)
        assert found["status"]["programmedGeneration"] == found["metadata"]["generation"]
    service.targets = targets
    _log.info("taken over after %.1f s, given up after %.2f s", taken_over, gave_up)
    assert gave_up < 10
    assert {epp.version[0] for epp in epps} == {new.epoch}


def test_a_lease_that_is_deleted_leaves_no_epp_behind(stage):
    """T10: while the operator runs, and while it does not, so that the epoch is forgotten."""
    port = free_port()
    operator = stage.operator(control_port=port)
    stage.edit(0)
    epps = stage.epps(2, port)
    until(lambda: stage.settled(epps), WAIT_SECONDS)
    first = epps[0].version
    delete_lease(stage)
    until(lambda: operator.epoch > first[0], WAIT_SECONDS)
    stage.edit(1)
    until(lambda: stage.settled(epps), WAIT_SECONDS)
    before = epps[0].version
    operator.kill()
    delete_lease(stage)
    operator = stage.operator(control_port=port)
    healed = seconds_until(lambda: all(p.version[0] > before[0] for p in epps))
    stage.edit(2)
    until(lambda: stage.settled(epps), WAIT_SECONDS)
    _log.info("epoch %s -> %s after %.1f s", before[0], epps[0].version[0], healed)
    check_versions(*epps)
    check_log(operator.log)


def delete_lease(stage) -> None:
    stage.cluster.kubectl("delete", "lease", "forebay-operator", "-n", stage.namespace)


def write_much(stage) -> None:
    """Have the API server's versions grow."""
    kind = {"apiVersion": "v1", "kind": "ConfigMap"}
    notes = [{**kind, "metadata": {"name": f"note-{number}"}} for number in range(1000)]
    apply(stage.cluster, stage.namespace, *notes)


def test_a_backup_of_etcd_that_is_restored_is_in_force(stage):
    """T10: Lease, policies and models are set back under a running operator; EPPs follow.

    Their versions go on although the epoch in the restored Lease is an old one, and although the
    versions of the restored objects are far behind what the operator has seen.
    """
    port = free_port()
    operator = stage.operator(control_port=port)
    stage.edit(0)
    apply(stage.cluster, stage.namespace, model("llama", "chat", "llama"))
    epps = stage.epps(2, port)
    until(lambda: stage.settled(epps), WAIT_SECONDS)
    original = epps[0].program()
    stage.cluster.snapshot(stage.folder / "backup")
    for number in range(1, 3):
        operator.kill()
        stage.edit(number)
        operator = stage.operator(control_port=port)
        until(lambda: stage.settled(epps), WAIT_SECONDS)
    stage.cluster.kubectl("delete", "inferencemodel", "llama", "-n", stage.namespace)
    write_much(stage)
    until(lambda: stage.settled(epps), WAIT_SECONDS)
    before = epps[0].version
    stage.cluster.restore(stage.folder / "backup")
    healed = seconds_until(
        lambda: all(p.version[0] > before[0] and p.program() == original for p in epps)
    )
    until(lambda: stage.settled(epps), WAIT_SECONDS)
    _log.info("epoch %s -> %s after %.1f s", before[0], epps[0].version[0], healed)
    check_versions(*epps)
    check_log(operator.log)
