"""Every field of FlowControlPolicy takes effect in a running EPP, and no request is lost by it.

An API server, an operator and an EPP, all real; one table of all fields. Each case tells one story
twice: requests run and wait, the policy changes, more requests come, and then what runs is ended
one by one. The first time the policy stays as it was.
"""

from __future__ import annotations

import re
import secrets
import statistics
import time
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import operator_account
import pytest
import yaml
from control_plane import (
    LOOPBACK,
    Authority,
    EPPProcess,
    Operator,
    check_log,
    policy,
    pool,
    service,
)
from ext_proc_peer import channel, until
from held_requests import Held
from loop_thread import LoopThread
from operator_site import CRDS, SECONDS, Site, endpoints, install
from ports import free_port

from forebay_operator.resources import SHADOW_LABEL

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator

Spec = dict[str, Any]
Headers = dict[str, dict[str, str]]

# The only server's page: a KV cache that is 80 % full, and other series that say otherwise.
KV_USAGE = 0.8
PAGE = f"""
vllm:num_requests_running 0
vllm:num_requests_waiting 0
vllm:kv_cache_usage_perc {KV_USAGE}
own_running 0
own_waiting 0
own_kv_full {KV_USAGE}
own_kv_empty 0.1
"""
EMPTY_PORT = free_port()  # where the page says that the cache is nearly empty
EMPTY_PAGE = PAGE.replace(str(KV_USAGE), "0.1")
ONE_SLOT = {"type": "Concurrency", "concurrency": {"maxRequestsPerEndpoint": 1}}
TWO_SLOTS = {"type": "Concurrency", "concurrency": {"maxRequestsPerEndpoint": 2}}
# The server takes one request at a time by the first, and has 4 slots by the second.
STRICT = {"type": "Adaptive", "adaptive": {"maxKVCacheUsagePercent": 70}}
LENIENT = {"type": "Adaptive", "adaptive": {"maxKVCacheUsagePercent": 90}}
TENANT = "x-llm-d-inference-fairness-id"
OBJECTIVE = {
    "apiVersion": "inference.networking.x-k8s.io/v1alpha2",
    "kind": "InferenceObjective",
    "metadata": {"name": "urgent"},
    "spec": {"priority": 100, "poolRef": {"name": "chat"}},
}
RUNNER = "runner"


def models(**more: Spec) -> Spec:
    """Models with these names and settings beside a, b, c and s, named as in all stories."""
    bands = {
        RUNNER: "Critical",
        "a": "Standard",
        "b": "Standard",
        "c": "Critical",
        "s": "Sheddable",
    }
    known = {name: {"band": band} for name, band in bands.items()}
    return {"models": [{"name": n, **s} for n, s in {**known, **more}.items()]}


def band(name: str = "Standard", **more: Any) -> Spec:
    return {"bands": [{"name": name, **more}]}


def queue(**more: Any) -> Spec:
    return band(queue=more)


def level(between: str, policy: str, **more: Any) -> Spec:
    return {"between": between, "policy": policy, **more}


def fairness(policy: str, **more: Any) -> Spec:
    return band(fairness=[level("Models", policy, **more)])


def by_tenant(*levels: Spec) -> Spec:
    return {"trustedHeaders": ["Tenant"], **band(fairness=list(levels))}


def tenants(header: str = TENANT, **names: str) -> Headers:
    """The header that names the tenants of requests."""
    return {request: {header: tenant} for tenant, all_ in names.items() for request in all_.split()}


@dataclass(frozen=True)
class Case:
    """What a change of fields does to requests.

    A request's name begins with its model's. What is seen is a list of requests in the order in
    which they are dispatched, or refused with an outcome; `|` is when the first running one ends.

    Attributes:
        fields: paths of the fields that are shown to act.
        waiting: requests that wait when the policy changes.
        then: requests that come afterwards.
        old: what is seen under the policy that stays.
        new: what is seen if it changes.
        before, after: the specs, beside what is the same in all of them.
        headers: of requests.
        sizes: of requests in bytes, if not 100.
        absent: the pool has no endpoint from when the first request runs until it ends.
        pool: that the policy is for afterwards.
    """

    fields: str
    waiting: str
    then: str
    old: str
    new: str
    before: Spec
    after: Spec
    headers: Headers = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    absent: bool = False
    pool: str = "chat"


LONG = {"a1": 4000, "a2": 4000}
CASES = [
    Case(  # what waits is sent at once, so that the order of several could not be seen
        "mode",
        *("a1", "s1", "| a1 s1", "a1 s1 |"),
        before={"mode": "Enforce"},
        after={"mode": "Observe"},
    ),
    Case(
        "mode",
        *("", "a1", "a1 |", "| a1"),
        before={"mode": "Observe"},
        after={"mode": "Enforce"},
    ),
    Case(
        "bands[].name models[].band",
        *("a1", "b1", "| a1 b1", "| b1 a1"),
        before={},
        after={**band("Urgent", priority=200), **models(b={"band": "Urgent"})},
    ),
    Case(  # a band that is removed drains in its place
        "bands[].name models[].band",
        *("c1 b1", "c2 b2", "| b1 b2 c1 c2", "| b1 c1 c2 b2"),
        before={**band("Urgent", priority=200), **models(b={"band": "Urgent"})},
        after={},
    ),
    Case(
        "bands[].priority",
        *("c1 b1", "", "| c1 b1", "| b1 c1"),
        before={**band("Urgent", priority=50), **models(b={"band": "Urgent"})},
        after={**band("Urgent", priority=200), **models(b={"band": "Urgent"})},
    ),
    Case(
        "bands[].fairness[].policy",
        *("a1 a2 b1", "b2", "| a1 a2 b1 b2", "| a1 b1 a2 b2"),
        before={},
        after=fairness("RoundRobin"),
    ),
    Case(
        "bands[].fairness[].policy",
        *("a1 a2 a3 b1 b2", "b3", "| a1 b1 a2 b2 a3 b3", "| a1 b1 a2 a3 b2 b3"),
        before={**fairness("RoundRobin"), **models(a={"weight": 2})},
        after={**fairness("WeightedFair"), **models(a={"weight": 2})},
    ),
    Case(
        "bands[].fairness[].policy",
        *("a1 a2 b1 b2", "b3", "| a1 b1 a2 b2 b3", "| a1 b1 b2 b3 a2"),
        before=fairness("WeightedFair"),
        after=fairness("TokenFair"),
        sizes=LONG,
    ),
    Case(
        "bands[].fairness[].weightedFair.cost",
        *("a1 a2 b1 b2", "b3", "| a1 b1 a2 b2 b3", "| a1 b1 b2 b3 a2"),
        before=fairness("WeightedFair"),
        after=fairness("WeightedFair", weightedFair={"cost": "Tokens"}),
        sizes=LONG,
    ),
    Case(
        "bands[].fairness[].between",
        *("a1 a2 a3", "b1", "| a1 b1 a2 a3", "| a1 a3 a2 b1"),
        before=by_tenant(level("Models", "RoundRobin")),
        after=by_tenant(level("Tenants", "RoundRobin")),
        headers=tenants(x="a1 a2 b1", y="a3"),
    ),
    Case(  # two levels
        "bands[].fairness[].between",
        *("a1 a2 a3", "b1", "| a1 a3 a2 b1", "| a1 a3 b1 a2"),
        before=by_tenant(level("Tenants", "RoundRobin")),
        after=by_tenant(level("Tenants", "RoundRobin"), level("Models", "RoundRobin")),
        headers=tenants(x="a1 a2 b1", y="a3"),
    ),
    Case(
        "bands[].ordering.policy",
        *("a1 a2", "a3", "| a1 a2 a3", "| a3 a2 a1"),
        before={"trustedHeaders": ["Deadline"]},
        after={"trustedHeaders": ["Deadline"], **band(ordering={"policy": "EarliestDeadline"})},
        headers={"a2": {"x-llm-d-slo-ttft-ms": "50000"}, "a3": {"x-llm-d-slo-ttft-ms": "1000"}},
    ),
    Case(
        "bands[].ordering.policy",
        *("a1", "a2", "| a1 a2", "| a2 a1"),
        before={},
        after=band(ordering={"policy": "ShortestPrompt"}),
        sizes={"a1": 1_000_000},
    ),
    Case(
        "bands[].queue.maxRequests",
        *("a1 a2", "a3 c1", "| c1 a1 a2 a3", "a3:RejectedQueueFull | c1 a1 a2"),
        before=queue(maxRequests=3),
        after=queue(maxRequests=1),
    ),
    Case(
        "bands[].queue.maxBytes",
        *("a1 a2", "a3 c1", "| c1 a1 a2 a3", "a3:RejectedQueueFull | c1 a1 a2"),
        before=queue(maxBytes="1Ki"),
        after=queue(maxBytes=150),
    ),
    Case(
        "bands[].queue.ttl",
        *("a1", "c1", "| c1 a1", "a1:EvictedTTL | c1"),
        before=queue(ttl="1m"),
        after=queue(ttl="1ms"),
    ),
    Case(
        "bands[].queue.whenFull",
        *("s1", "c1", "c1:RejectedQueueFull | s1", "s1:EvictedDisplaced | c1"),
        before={"limits": {"maxRequests": 1}},
        after={
            "limits": {"maxRequests": 1},
            **band("Critical", queue={"whenFull": "DisplaceLower"}),
        },
    ),
    Case(
        "bands[].queue.perFlow.maxRequests",
        *("a1 a2", "a3 b1", "| a1 a2 a3 b1", "a3:RejectedQueueFull | a1 a2 b1"),
        before=queue(perFlow={"maxRequests": 3}),
        after=queue(perFlow={"maxRequests": 1}),
    ),
    Case(
        "bands[].queue.perFlow.maxBytes",
        *("a1 a2", "a3 b1", "| a1 a2 a3 b1", "a3:RejectedQueueFull | a1 a2 b1"),
        before=queue(perFlow={"maxBytes": 1000}),
        after=queue(perFlow={"maxBytes": 150}),
    ),
    Case(
        "bands[].maxSaturationPercent",
        *("a1", "", "| a1", "a1 |"),
        before={"saturation": TWO_SLOTS, **band(maxSaturationPercent=50)},
        after={"saturation": TWO_SLOTS, **band(maxSaturationPercent=100)},
    ),
    Case(
        "bands[].reservedPercent",
        *("c1 c2 s1 s2", "c3", "| c1 c2 c3 s1 s2", "| c1 c2 s1 c3 s2"),
        before={},
        after=band("Sheddable", reservedPercent=50),
    ),
    Case(
        "models[].name",
        *("a1", "x1 y1", "| x1 a1 y1", "| y1 a1 x1"),
        before=models(x={"band": "Critical"}),
        after=models(y={"band": "Critical"}),
    ),
    Case(
        "models[].band",
        *("a1", "b1", "| a1 b1", "| b1 a1"),
        before={},
        after=models(b={"band": "Critical"}),
    ),
    Case(
        "models[].weight",
        *("a1 a2 a3 b1 b2", "b3", "| a1 b1 a2 b2 a3 b3", "| a1 b1 a2 a3 b2 b3"),
        before=fairness("WeightedFair"),
        after={**fairness("WeightedFair"), **models(a={"weight": 2})},
    ),
    Case(
        "models[].timeToFirstToken",
        *("a1", "b1", "| a1 b1", "| b1 a1"),
        before=band(ordering={"policy": "EarliestDeadline"}),
        after={
            **band(ordering={"policy": "EarliestDeadline"}),
            **models(b={"timeToFirstToken": "1s"}),
        },
    ),
    Case(
        "tenants.header",
        *("a1", "a2 a3", "| a1 a2 a3", "| a1 a3 a2"),
        before={"tenants": {"header": "x-team"}, **by_tenant(level("Tenants", "RoundRobin"))},
        after={"tenants": {"header": "x-user"}, **by_tenant(level("Tenants", "RoundRobin"))},
        headers={
            "a1": {"x-team": "x"},
            "a2": {"x-team": "x", "x-user": "x"},
            "a3": {"x-team": "x", "x-user": "y"},
        },
    ),
    Case(
        "tenants.weights[].name tenants.weights[].weight",
        *("a1 a2 a3 a4 a5", "a6", "| a1 a4 a2 a5 a3 a6", "| a1 a4 a2 a3 a5 a6"),
        before=by_tenant(level("Tenants", "WeightedFair")),
        after={
            "tenants": {"weights": [{"name": "x", "weight": 2}]},
            **by_tenant(level("Tenants", "WeightedFair")),
        },
        headers=tenants(x="a1 a2 a3", y="a4 a5 a6"),
    ),
    Case(
        "limits.maxRequests",
        *("a1", "c1", "| c1 a1", "c1:RejectedQueueFull | a1"),
        before={"limits": {"maxRequests": 2}},
        after={"limits": {"maxRequests": 1}},
    ),
    Case(
        "limits.maxBytes",
        *("a1", "c1", "| c1 a1", "c1:RejectedQueueFull | a1"),
        before={"limits": {"maxBytes": 1000}},
        after={"limits": {"maxBytes": 150}},
    ),
    Case(
        "limits.maxBodyBytes",
        *("a1", "c1", "| c1 a1", "c1:RejectedTooLarge | a1"),
        before={"limits": {"maxBodyBytes": "1Ki"}},
        after={"limits": {"maxBodyBytes": 99}},
    ),
    Case(
        "saturation.type",
        *("a1", "c1", "| c1 a1", "a1 c1 |"),
        before={"saturation": ONE_SLOT},
        after={"saturation": LENIENT},
    ),
    Case(
        "saturation.type",
        *("a1", "c1", "| c1 a1", "a1 | c1"),
        before={"saturation": STRICT},
        after={"saturation": TWO_SLOTS},
    ),
    Case(
        "saturation.concurrency.maxRequestsPerEndpoint",
        *("a1 b1", "c1", "| c1 a1 b1", "a1 | c1 b1"),
        before={"saturation": ONE_SLOT},
        after={"saturation": TWO_SLOTS},
    ),
    Case(
        "saturation.adaptive.maxKVCacheUsagePercent",
        *("a1", "c1", "| c1 a1", "a1 c1 |"),
        before={"saturation": STRICT},
        after={"saturation": LENIENT},
    ),
    Case(
        "modelServerMetrics.path",
        *("a1", "", "| a1", "a1 |"),
        before={"saturation": STRICT},
        after={"saturation": STRICT, "modelServerMetrics": {"path": "/empty"}},
    ),
    Case(
        "modelServerMetrics.port",
        *("a1", "", "| a1", "a1 |"),
        before={"saturation": STRICT},
        after={"saturation": STRICT, "modelServerMetrics": {"port": EMPTY_PORT}},
    ),
    Case(
        "modelServerMetrics.running modelServerMetrics.waiting",
        *("a1", "", "| a1", "a1 |"),
        before={"saturation": STRICT},
        after={
            "saturation": STRICT,
            "modelServerMetrics": {"running": "own_running", "waiting": "own_waiting"},
        },
    ),
    Case(
        "modelServerMetrics.kvCacheUsage",
        *("a1", "", "| a1", "a1 |"),
        before={
            "saturation": STRICT,
            "modelServerMetrics": {
                "running": "own_running",
                "waiting": "own_waiting",
                "kvCacheUsage": "own_kv_full",
            },
        },
        after={
            "saturation": STRICT,
            "modelServerMetrics": {
                "running": "own_running",
                "waiting": "own_waiting",
                "kvCacheUsage": "own_kv_empty",
            },
        },
    ),
    Case(
        "unmatched.action",
        *("u1", "u2 a1", "| u1 u2 a1", "u2:RejectedUnknownModel | u1 a1"),
        before={},
        after={"unmatched": {"action": "Reject"}},
    ),
    Case(
        "unmatched.band",
        *("a1", "u1", "| a1 u1", "| u1 a1"),
        before={},
        after={"unmatched": {"band": "Critical"}},
    ),
    Case(
        "noEndpoints.ttl",
        *("a1", "", "| a1", "a1:EvictedNoEndpoints |"),
        before={"noEndpoints": {"ttl": "1m"}},
        after={"noEndpoints": {"ttl": "1ms"}},
        absent=True,
    ),
    Case(
        "trustedHeaders[]",
        *("a1", "a2", "| a1 a2", "| a2 a1"),
        before={},
        after={"trustedHeaders": ["Objective"]},
        headers={"a2": {"x-llm-d-inference-objective": "urgent"}},
    ),
    Case(
        "trustedHeaders[]",
        *("a1", "a2 a3", "| a1 a2 a3", "| a1 a3 a2"),
        before=band(fairness=[level("Tenants", "RoundRobin")]),
        after=by_tenant(level("Tenants", "RoundRobin")),
        headers=tenants(x="a3"),
    ),
    Case(
        "trustedHeaders[]",
        *("a1", "a2", "| a1 a2", "a2:EvictedTTL | a1"),
        before={},
        after={"trustedHeaders": ["Deadline"]},
        headers={"a2": {"x-forebay-ttl-ms": "1"}},
    ),
    Case(  # what is no longer trusted
        "trustedHeaders[]",
        *("a1", "a2", "| a2 a1", "| a1 a2"),
        before={"trustedHeaders": ["Objective"]},
        after={},
        headers={"a2": {"x-llm-d-inference-objective": "urgent"}},
    ),
    Case(  # the pool gets the defaults: unmatched requests wait, and there are more slots
        "targetRefs[].name",
        *("a1", "u1", "u1:RejectedUnknownModel | a1", "a1 u1 |"),
        before={"unmatched": {"action": "Reject"}},
        after={"unmatched": {"action": "Reject"}},
        pool="other",
    ),
]
WITHOUT_EFFECT = {
    "targetRefs[].group": "a reference means the pool by its name alone",
    "saturation.adaptive.timeToFirstToken": "acts once a speed is known: see test_core_prefill",
    "targetRefs[].kind": "has one value",
    "selection.scorers[].type": "takes several servers: see test_core_selection",
    "selection.scorers[].weight": "takes several servers: see test_core_selection",
    "selection.picker": "takes several servers: see test_core_selection",
}


class Stage:
    """An operator's site with one EPP and one server, and the proxy in front of them.

    Attributes:
        seconds: from the end of each `kubectl apply` to the first sign of it.
    """

    def __init__(self, site: Site, thread: LoopThread) -> None:
        address = thread.listen(showing({"/metrics": PAGE, "/empty": EMPTY_PAGE}))
        thread.listen(showing({"/metrics": EMPTY_PAGE}), EMPTY_PORT)
        chat = pool("chat")
        chat["spec"]["targetPorts"] = [{"number": int(address.partition(":")[2])}]
        site.apply(chat, service(), OBJECTIVE)
        self.seconds: list[float] = []
        self._site = site
        self._server = site.server("server", LOOPBACK)
        self._epp = site.epp()
        self._story = 0
        self._told: Counter[str] = Counter()
        until(lambda: endpoints(self._epp) == [address] and self._epp.version != (0, 0), SECONDS)

    def begin(self, case: Case) -> None:
        """Put the policy of before in force."""
        self._story += 1
        self._told = self._epp.outcomes()
        self.put(case.before)

    def put(self, spec: Spec, pool: str = "chat") -> float:
        """Apply a policy; return when kubectl was done, once the policy is in force.

        Each story has a model of its own, of which no requests come: its plan is never the last's.
        """
        known = {"saturation": ONE_SLOT, **models(), **spec}
        known["models"] = [*known["models"], {"name": f"story-{self._story}"}]
        return self._programmed(lambda: self._site.apply(policy("chat", pool, **known)))

    def _programmed(self, act: Callable[[], None]) -> float:
        """Do what brings another program; return when it was done, once the EPP runs that."""
        before = self._epp.version
        assert before is not None
        act()
        done_at = time.monotonic()
        until(lambda: self._epp.version not in (None, before), SECONDS)
        return done_at

    @contextmanager
    def beside(self, spec: Spec) -> Iterator[tuple[Site, EPPProcess]]:
        """Have a policy `next` computed beside the one in force."""
        shadow = policy("next", "chat", **models(), **spec)
        shadow["metadata"]["labels"] = {SHADOW_LABEL: "chat"}
        self._programmed(lambda: self._site.apply(shadow))
        try:
            yield self._site, self._epp
        finally:
            self._programmed(lambda: self._site.delete("fcp", "next"))

    @contextmanager
    def without_endpoint(self) -> Iterator[None]:
        """Have the pool's endpoint leave, and come back afterwards."""
        self._programmed(lambda: self._server.run(ready=False))
        try:
            yield
        finally:
            self._programmed(self._server.run)

    def play(self, case: Case, *, changes: bool) -> str:
        """Tell the story of a case; return what is seen."""
        expected = (case.new if changes else case.old).split()
        done_at = 0.0
        with (
            channel(f"127.0.0.1:{self._epp.grpc}") as open_channel,
            Held(self._epp, open_channel) as held,
        ):
            self._send(held, case, RUNNER)
            assert [request.name for request in held.running] == [RUNNER]
            held.log.clear()
            if case.before.get("saturation") == STRICT:  # by the page, which has to be read first
                until(lambda: self._epp.queues()["endpoints"][0]["free"] == 0, SECONDS)
            with self.without_endpoint() if case.absent else nullcontext():
                self._send(held, case, *case.waiting.split())
                assert held.waiting == case.waiting.split()
                if changes:
                    done_at = self.put(case.after, case.pool)
                    held.until_known()
                self._send(held, case, *case.then.split())
                with suppress(AssertionError):  # what came instead says more
                    # Well before the requests give up themselves.
                    until(lambda: held.events == expected[: expected.index("|")], SECONDS / 2)
                held.mark("|")
            held.end_all()
            self._told += held.outcomes()
        pairs = zip_longest(held.log, case.old.split(), fillvalue=("", 0.0))
        sign_at = next((at for (event, at), old in pairs if event != old), None)
        if changes and sign_at is not None:
            self.seconds.append(sign_at - done_at)
        return " ".join(held.events)

    def check(self) -> None:
        """Nothing is left of the requests, and the EPP counts what they were told."""
        until(self._epp.idle, SECONDS)
        assert self._epp.outcomes() == self._told

    def _send(self, held: Held, case: Case, *names: str) -> None:
        for name in names:
            model = name.rstrip("0123456789")
            held.send(name, model, case.sizes.get(name, 100), case.headers.get(name, {}))


def showing(pages: dict[str, str]):
    """A server of pages, as a coroutine for `LoopThread`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            page = pages.get(head.split()[1].decode(), "")
            writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {len(page)}\r\n\r\n{page}".encode())

    return serve


@pytest.fixture(scope="module")
def stage(cluster, tmp_path_factory, figure):
    """All that the cases share."""
    install(cluster)
    folder = tmp_path_factory.mktemp("live")
    namespace = cluster.make_namespace(f"live-{secrets.token_hex(4)}")
    authority = Authority(folder / "ca")
    kubeconfig = operator_account.cluster_wide(cluster, namespace, folder)
    operator = Operator(
        *(cluster, folder, authority.leaf("op")), lease_namespace=namespace, kubeconfig=kubeconfig
    )
    site = Site(cluster, namespace, operator.control_port, authority.path, folder)
    thread = LoopThread()
    try:
        until(lambda: operator.ready and operator.epoch > 0, SECONDS)
        stage = Stage(site, thread)
        yield stage
        for process in (operator, *site.processes):
            check_log(process.log)
        if stage.seconds:
            figure(
                f"kubectl apply to changed behaviour, of {len(stage.seconds)} changes: "
                f"median {statistics.median(stage.seconds):.2f} s, most {max(stage.seconds):.2f} s"
            )
    finally:
        thread.stop()
        site.end()
        operator.end()
        cluster.kubectl("delete", "clusterrolebinding", f"forebay-operator-{namespace}")
        cluster.leave_namespace(namespace)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.fields)
def test_a_change_takes_effect_and_loses_nothing(stage, case):
    """What is seen differs as the case says, and every request has one outcome."""
    stage.begin(case)

    assert stage.play(case, changes=False) == case.old
    assert stage.play(case, changes=True) == case.new
    stage.check()


def test_a_shadow_is_computed_beside_the_policy_in_force(stage):
    """It has one slot for two requests, and holds none; its own status says what it is."""
    case = Case("", "", "a1", "a1 |", "", before={"saturation": TWO_SLOTS}, after={})
    stage.begin(case)
    with stage.beside({"saturation": ONE_SLOT}) as (site, epp):
        site.until("next", "Programmed", "False", "Shadow")
        site.until("next", "Accepted", "True", "Accepted")
        site.until_programmed("chat")

        assert stage.play(case, changes=False) == case.old

        until(lambda: _waited(epp) > 0, SECONDS)
        assert epp.queues()["shadow"]["requests"] == 0
    stage.check()
    until(lambda: epp.queues()["shadow"] is None, SECONDS)


def _waited(epp: EPPProcess) -> float:
    """Seconds that requests of model a would have waited."""
    waited = r'^forebay_shadow_waited_seconds_total\{band="Standard",model="a"\} (\S+)$'
    found = re.search(waited, epp.page("/metrics") or "", re.MULTILINE)
    return float(found[1]) if found else 0.0


def leaves(schema: Spec, path: str = "") -> Iterator[str]:
    """The paths of all fields without fields of their own; [] is an entry of a list."""
    if schema.get("type") == "array":
        yield from leaves(schema["items"], f"{path}[]")
    elif "properties" in schema:
        for name, part in schema["properties"].items():
            yield from leaves(part, f"{path}.{name}" if path else name)
    else:
        yield path


def test_every_field_has_a_case():
    """Or a reason why it cannot have one: a new field is not forgotten."""
    crd = yaml.safe_load((CRDS / "forebay.dev_flowcontrolpolicies.yaml").read_text())
    spec = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    shown = {path for case in CASES for path in case.fields.split()}

    assert shown.isdisjoint(WITHOUT_EFFECT)
    assert shown | WITHOUT_EFFECT.keys() == set(leaves(spec))
