"""What is known of the objects."""

from __future__ import annotations

from forebay_operator.resources import POLICY
from forebay_operator.store import Store


def policy(version: int, uid: str = "u", **spec) -> dict:
    return {
        "apiVersion": "forebay.dev/v1alpha1",
        "kind": "FlowControlPolicy",
        "metadata": {
            "name": f"policy-{uid}",
            "namespace": "default",
            "uid": uid,
            "generation": version,
            "resourceVersion": str(version),
        },
        "spec": {"targetRefs": [{"name": "chat"}], **spec},
    }


def test_a_late_event_changes_nothing():
    """An older version, or one of an object that is gone, is not taken."""
    store = Store()
    assert store.put(POLICY, policy(20), 1.0) == {"default"}
    assert store.put(POLICY, policy(10), 2.0) == set()
    assert store.get(POLICY, "u").metadata.generation == 20
    store.remove(POLICY, "u", 3.0)
    assert store.put(POLICY, policy(30), 4.0) == set()
    assert len(store) == 0


def test_a_list_that_began_before_an_event_does_not_set_it_back():
    """Versions decide between a LIST and an event that came while it ran."""
    store = Store()
    store.put(POLICY, policy(20), 2.0)
    store.put(POLICY, policy(10, "gone"), 2.0)
    store.remove(POLICY, "gone", 3.0)
    swept = store.sweep(POLICY, [policy(10), policy(10, "gone")], began_at=1.0, now=4.0)
    assert (swept.changed, swept.missed, len(store)) == (set(), 0, 1)
    assert store.get(POLICY, "u").metadata.generation == 20


def test_a_list_from_a_restored_backup_is_believed():
    """What it holds is so, although the versions are older and the object was once deleted."""
    store = Store()
    store.put(POLICY, policy(20), 1.0)
    store.put(POLICY, policy(10, "back"), 1.0)
    store.remove(POLICY, "back", 2.0)
    swept = store.sweep(POLICY, [policy(10), policy(10, "back")], began_at=3.0, now=4.0)
    assert (swept.changed, swept.missed, len(store)) == ({"default"}, 2, 2)
    assert store.get(POLICY, "u").metadata.generation == 10
    assert store.put(POLICY, policy(11, "back"), 5.0) == {"default"}
