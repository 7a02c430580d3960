"""What is read of which namespace when some of it is forbidden.

The API server is a small fake of the test's, which denies and loses what the test says.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import kopf
import pytest
from aiohttp import web
from manifest_reading import pool_ref

from forebay_operator.cluster.api import Cluster
from forebay_operator.cluster.denials import Denials
from forebay_operator.cluster.store import Store
from forebay_operator.cluster.watching import Watching
from forebay_operator.resources import BY_NAME, KINDS, POLICY

POD = BY_NAME["v1", "Pod"]
POLICIES = "flowcontrolpolicies"


def policy(namespace, name):
    metadata = {"name": name, "namespace": namespace, "uid": f"{namespace}/{name}"}
    return {"metadata": metadata, "spec": {"targetRefs": [pool_ref("chat")]}}


@pytest.fixture
async def api():
    """Objects by (namespace, plural), and (namespace, plural) that are denied; "" for all."""
    api = SimpleNamespace(objects={}, denied=set(), asked=[], watchings=[])

    async def answer(request):
        parts = request.path.split("/")
        namespace = parts[parts.index("namespaces") + 1] if "namespaces" in parts else ""
        plural = parts[-1]
        api.asked.append((namespace, plural))
        if (namespace, plural) in api.denied:
            return web.json_response({"message": f"cannot list {plural}"}, status=403)
        items = api.objects.get((namespace, plural), [])
        metadata = {"resourceVersion": "7"}
        return web.json_response({"kind": "SomeList", "metadata": metadata, "items": items})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    api.cluster = Cluster(
        lambda: kopf.ConnectionInfo(server=f"http://127.0.0.1:{runner.addresses[0][1]}")
    )
    yield api
    for found in api.watchings:
        await found.stop()
    await api.cluster.close()
    await runner.cleanup()


def watching(api, *namespaces, acts_on=lambda _: False):
    store, denials = Store(), Denials()
    found = Watching(api.cluster, store, lambda _: None, acts_on, denials, namespaces)
    api.watchings.append(found)
    return SimpleNamespace(it=found, store=store, denials=denials)


async def test_a_forbidden_namespace_does_not_keep_the_operator_from_being_ready(api):
    """The other is read; a denial has its namespace and kind, and is not taken for emptiness."""
    api.objects["good", POLICIES] = [policy("good", "p")]
    api.denied = {("bad", kind.plural) for kind in KINDS}
    world = watching(api, "bad", "good")

    await asyncio.wait_for(world.it.fill(), 5)

    assert world.it.waits_for == ""
    assert world.store.namespaces() == ["good"]
    assert "flowcontrolpolicies.forebay.dev in namespace bad: 403" in str(world.denials)
    assert world.it.unread("good") == set()
    assert world.it.unread("bad") == set(KINDS) - {POD}


async def test_ghosts_of_other_namespaces_are_swept(api):
    """Also while a namespace is forbidden; what was known of that one stays."""
    for namespace in ("bad", "good"):
        api.objects[namespace, POLICIES] = [policy(namespace, "a"), policy(namespace, "b")]
    world = watching(api, "bad", "good")
    await world.it.fill()

    api.denied = {("bad", POLICIES)}
    for namespace in ("bad", "good"):
        api.objects[namespace, POLICIES].pop()
    assert await world.it._list_all() == []

    known = {uid for uid, _ in world.store.of(POLICY, "")}
    assert known == {"bad/a", "bad/b", "good/a"}

    api.denied = set()
    await world.it._list_all()
    assert {uid for uid, _ in world.store.of(POLICY, "")} == {"bad/a", "good/a"}
    assert str(world.denials) == ""


async def test_one_empty_namespace_does_not_hold_up_the_others(api):
    """A LIST without any is confirmed for its own namespace only."""
    for namespace in ("a", "b"):
        api.objects[namespace, POLICIES] = [policy(namespace, "p"), policy(namespace, "q")]
    world = watching(api, "a", "b")
    await world.it.fill()

    api.objects["a", POLICIES] = []
    api.objects["b", POLICIES].pop()
    await world.it._list_all()

    assert {uid for uid, _ in world.store.of(POLICY, "")} == {"a/p", "a/q", "b/p"}


async def test_an_operator_that_may_read_no_policies_at_all_is_not_ready(api):
    """It says which right it lacks."""
    api.denied = {("", POLICIES)}
    world = watching(api)

    filling = asyncio.create_task(world.it.fill())
    while "the first LIST" in world.it.waits_for:  # noqa: ASYNC110  # nothing else tells
        await asyncio.sleep(0)
    assert world.it.waits_for == "the right to list flowcontrolpolicies.forebay.dev"
    api.denied = set()
    await asyncio.wait_for(filling, 10)


async def test_pods_are_read_only_where_a_pool_is_ours(api):
    """10,000 pods of other namespaces cost nothing."""
    api.objects["", POLICIES] = [policy("ours", "p"), policy("other", "p")]
    world = watching(api, acts_on=lambda namespace: namespace == "ours")

    await world.it.fill()

    assert [name for name, plural in api.asked if plural == "pods"] == ["ours"]
    assert world.it.unread("ours") == set()


async def test_pods_that_may_not_be_read_are_not_taken_for_absent(api):
    """Nothing is sent to EPPs of that namespace, also at the start."""
    api.objects["", POLICIES] = [policy("ours", "p"), policy("other", "p")]
    api.denied = {("ours", "pods")}
    world = watching(api, acts_on=lambda namespace: namespace == "ours")

    await world.it.fill()

    assert world.it.unread("ours") == {POD}
    assert world.it.unread("other") == set()
    assert str(world.denials).startswith("pods in namespace ours: 403")


async def test_a_change_that_no_watch_was_to_deliver_is_no_sign_of_deafness(api):
    """A namespace whose watch is denied or restarted does not end the process."""
    world = watching(api, "a")
    await world.it.fill()
    api.objects["a", POLICIES] = [policy("a", "p")]
    await world.it._list_all()

    for _ in range(5):
        world.it._listen(world.it._steady(), gap=False)
