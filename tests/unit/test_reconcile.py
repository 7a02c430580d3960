"""Between the store and the statuses, without an API server."""

from __future__ import annotations

import asyncio

from forebay_operator.control import ControlServer
from forebay_operator.reconcile import Reconciler
from forebay_operator.resources import BY_NAME
from forebay_operator.store import Store
from forebay_operator.trust import believe

POLICY = BY_NAME["forebay.dev/v1alpha1", "FlowControlPolicy"]


def policy(version: int, status: dict | None = None) -> dict:
    return {
        "apiVersion": "forebay.dev/v1alpha1",
        "kind": "FlowControlPolicy",
        "metadata": {
            "name": "chat",
            "namespace": "default",
            "uid": "u",
            "generation": 1,
            "resourceVersion": str(version),
        },
        "spec": {"targetRefs": [{"name": "chat"}]},
        **({"status": status} if status else {}),
    }


class Restored:
    """Stands for an API server whose etcd is restored: its versions begin again."""

    def __init__(self, known: int) -> None:
        self.version = known
        self.writes = 0
        self.status: dict = {}

    async def write(self, _entry, status):
        self.version += 1
        self.writes += 1
        self.status = status
        return policy(self.version, status)

    async def announce(self, _entry, _changes):
        pass


def test_a_status_is_written_once_after_versions_went_back():
    """The answer to a write is believed although its version is older than what was known."""

    async def story() -> None:
        store, reporter = Store(), Restored(known=10)
        control = ControlServer(believe, lambda _: None, lambda _: None)
        reconciler = Reconciler(store, control, reporter)
        store.put(POLICY, policy(1000), reconciler.alive_at)
        reconciler.reporting = True
        reconciler.pickers_changed("default/chat")
        reporting = asyncio.create_task(reconciler.run_reporting())
        async with asyncio.timeout(30):
            while store.get(POLICY, "u").resource_version != "11":  # noqa: ASYNC110  # tells nobody
                await asyncio.sleep(0.01)
        reporting.cancel()
        assert reporter.writes == 1
        assert store.get(POLICY, "u").status == reporter.status

    asyncio.run(story())
