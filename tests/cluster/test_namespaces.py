"""An operator of two namespaces on a real API server, one of which takes its rights away."""

from __future__ import annotations

import secrets
import time

import operator_account
import pytest
from control_plane import Authority, policy
from ext_proc_peer import until
from operator_site import (
    SECONDS,
    RestartableOperator,
    Site,
    answer,
    endpoints,
    install,
)

REJECTS = {"unmatched": {"action": "Reject"}}
SWEEP_SECONDS = 5


class World:
    """An operator that watches `tenant` and `other`, and what people do to `tenant`."""

    def __init__(self, cluster, folder):
        install(cluster)
        self.cluster, self.folder = cluster, folder
        suffix = secrets.token_hex(4)
        self.home, self.tenant, self.other = (
            cluster.make_namespace(f"{name}-{suffix}") for name in ("home", "tenant", "other")
        )
        self.kubeconfig = operator_account.namespaced(
            cluster, self.home, folder, self.home, self.tenant, self.other
        )
        self.authority = Authority(folder)
        self.binding = f"{operator_account.ACCOUNT}-{self.home}"
        self.sites: list[Site] = []

    def start(self, sweep_seconds: int = SWEEP_SECONDS) -> RestartableOperator:
        self.operator = RestartableOperator(
            *(self.cluster, self.folder, self.authority.leaf("op")),
            f"--sweep-interval={sweep_seconds}s",
            lease_namespace=self.home,
            kubeconfig=self.kubeconfig,
            namespaces=(self.tenant, self.other),
        )
        self.operator.until_leading()
        return self.operator

    def site(self, namespace: str) -> Site:
        folder = self.folder / namespace
        folder.mkdir()
        port = self.operator.control_port
        self.sites.append(Site(self.cluster, namespace, port, self.authority.path, folder))
        return self.sites[-1]

    def take_rights_away(self) -> None:
        self.cluster.kubectl("delete", "rolebinding", self.binding, "-n", self.tenant)

    def give_rights_back(self) -> None:
        operator_account._bind(
            *(self.cluster, "rolebinding", operator_account.ACCOUNT, self.home),
            *(f"--role={operator_account.ACCOUNT}", "-n", self.tenant),
        )

    def readyz(self) -> str:
        return self.operator.process.probe("/readyz")

    def end(self) -> None:
        for site in self.sites:
            site.end()
        self.operator.process.end()
        assert "Traceback" not in self.operator.process.log
        for namespace in (self.home, self.tenant, self.other):
            self.cluster.leave_namespace(namespace)


@pytest.fixture
def world(cluster, tmp_path):
    found = World(cluster, tmp_path)
    yield found
    found.end()


def test_a_namespace_that_forbids_everything_costs_itself_only(world):
    """At the start: the other one is served, /readyz names it, and a right that comes heals it."""
    world.take_rights_away()
    world.start()
    assert f"denied: pods in namespace {world.tenant}" not in world.readyz()
    assert f"flowcontrolpolicies.forebay.dev in namespace {world.tenant}: 403" in world.readyz()
    assert world.operator.process.metric("forebay_denied_namespaces", resource="services") == 1
    other, tenant = world.site(world.other), world.site(world.tenant)
    for site in (other, tenant):
        site.pool()
        site.apply(policy("p", "chat", **REJECTS))
    epp = other.epp()
    other.until_programmed("p")
    assert answer(epp) == 404
    assert tenant.status("p") == {}

    world.give_rights_back()

    tenant.epp()
    tenant.until_programmed("p")
    until(lambda: world.readyz() == "ok\n", SECONDS)


def test_a_namespace_that_takes_its_rights_away_keeps_what_it_had(world):
    """While running: the other one's edits arrive, and what was known of the tenant stays."""
    world.start()
    other, tenant = world.site(world.other), world.site(world.tenant)
    epps = []
    for site in (other, tenant):
        site.pool()
        epps.append(site.epp())
        site.server("vllm-0", "192.0.2.1")
        site.apply(policy("p", "chat", **REJECTS))
        site.until_programmed("p")
    pid = world.operator.process.pid
    process = world.operator.process

    world.take_rights_away()

    until(lambda: f"in namespace {world.tenant}: 403" in world.readyz(), SECONDS)
    other.apply(policy("p", "chat"))
    other.until_programmed("p")
    other.server("vllm-1", "192.0.2.2")
    until(lambda: len(endpoints(epps[0])) == 2, SECONDS)
    time.sleep(2 * SWEEP_SECONDS)  # sweeps go on
    assert endpoints(epps[1]) == ["192.0.2.1:8000"]
    assert answer(epps[1]) == 404
    assert process.running

    world.give_rights_back()

    tenant.apply(policy("p", "chat"))
    tenant.server("vllm-1", "192.0.2.2")
    until(lambda: len(endpoints(epps[1])) == 2, SECONDS)
    tenant.until_programmed("p")
    assert process.pid == pid
    assert "watches missed changes" not in process.log


def test_pods_that_were_there_before_the_first_pool_are_found_at_once(world):
    """Pods are read only where a pool is ours; no sweep comes in the time of this test."""
    world.start(sweep_seconds=600)
    site = world.site(world.tenant)
    for number in range(3):
        site.server(f"vllm-{number}", f"192.0.2.{number + 1}")
    epp = site.epp()

    site.pool()

    until(lambda: len(endpoints(epp)) == 3, SECONDS)
    site.server("vllm-3", "192.0.2.4")
    until(lambda: len(endpoints(epp)) == 4, SECONDS)
