"""Two operators on a real API server: each acts on the pools that it claims."""

from __future__ import annotations

import secrets

import pytest
from control_plane import Authority, Operator, model, policy, pool, service
from ext_proc_peer import until
from manifest_reading import pool_ref
from operator_site import SECONDS, Site, install

POOL_NAMES = {"ours": "one", "theirs": "two", "nobodys": ""}
STILL_SECONDS = 8.0


@pytest.fixture
def operators(cluster, tmp_path):
    """Two releases for the whole cluster, named `one` and `two`."""
    install(cluster)
    authority = Authority(tmp_path)
    started, homes = [], []
    try:
        for name in ("one", "two"):
            home = cluster.make_namespace(f"{name}-{secrets.token_hex(4)}")
            homes.append(home)
            started.append(
                Operator(
                    *(cluster, tmp_path, authority.leaf(name)),
                    f"--controller-name={name}",
                    name=name,
                    lease_namespace=home,
                )
            )
        for operator in started:
            until(lambda operator=operator: operator.ready and operator.epoch > 0, SECONDS)
        yield authority, *started
    finally:
        for operator in started:
            operator.end()
        for home in homes:
            cluster.leave_namespace(home)


def test_two_operators_share_a_namespace_without_a_fight(cluster, namespace, operators, tmp_path):
    """Every status says what its operator does, and settles; none writes about other pools."""
    authority, one, two = operators
    site = Site(cluster, namespace, one.control_port, authority.path, tmp_path)
    for name, controller in POOL_NAMES.items():
        site.apply(service(f"{name}-epp", controller), pool(name, service=f"{name}-epp"))
        site.apply(policy(name, name))

    def knowing() -> set[str]:
        found = site.object("nobodys").get("status", {}).get("ancestors", [])
        return {ancestor["controllerName"] for ancestor in found}

    # A model that is known before its pool is told that there is none.
    until(lambda: knowing() == {"forebay.dev/one", "forebay.dev/two"}, SECONDS)
    site.apply(*[model(name, name, name) for name in POOL_NAMES])
    references = [pool_ref("theirs"), pool_ref("ours")]
    site.delete("fcp", "ours", "theirs")
    site.apply(policy("both", "", targetRefs=references))

    def controllers() -> set[str]:
        found = site.object("both").get("status", {}).get("ancestors", [])
        return {f"{a['controllerName']}:{a['ancestorRef']['name']}" for a in found}

    wanted = {"forebay.dev/one:ours", "forebay.dev/two:theirs"}
    until(lambda: controllers() == wanted, SECONDS)
    site.until("both", "Programmed", "False", "NoEndpointPickers")
    site.until("nobodys", "Accepted", "False", "PoolNotClaimed")
    for name in ("ours", "theirs"):
        site.until(name, "Programmed", "False", "NoEndpointPickers", "inferencemodel")

    def versions() -> list[str]:
        listed = cluster.get("fcp,inferencemodel", "-n", namespace)["items"]
        return [item["metadata"]["resourceVersion"] for item in listed]

    before, writes = versions(), _writes(one) + _writes(two)
    with pytest.raises(AssertionError):
        until(lambda: versions() != before, STILL_SECONDS)
    assert _writes(one) + _writes(two) == writes
    assert "status" not in site.object("nobodys", "inferencemodel")


def _writes(operator: Operator) -> float:
    return operator.metric("forebay_status_writes_total")
