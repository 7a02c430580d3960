"""What is known of a cluster's objects: events, ghosts, sweeps; in virtual time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from manifest_reading import pool_ref

from forebay_operator.cluster.store import EMPTY_SECONDS, MAX_REMEMBERED, Store
from forebay_operator.resources import BY_NAME

POLICY = BY_NAME["forebay.dev/v1alpha1", "FlowControlPolicy"]
POD = BY_NAME["v1", "Pod"]


def policy(name="a", uid=None, version=1, generation=1, namespace="default", status=None, **spec):
    metadata = {
        "name": name,
        "namespace": namespace,
        "uid": uid or f"uid-{name}",
        "generation": generation,
        "resourceVersion": str(version),
    }
    return {
        "apiVersion": "forebay.dev/v1alpha1",
        "kind": "FlowControlPolicy",
        "metadata": metadata,
        "spec": {"targetRefs": [pool_ref("chat")], **spec},
        **({"status": status} if status else {}),
    }


def filled(*names: str, now: float = 0.0) -> Store:
    store = Store()
    for name in names:
        store.put(POLICY, policy(name), now)
    return store


def sweep(store: Store, kind, manifests, began_at: float, now: float, namespace: str = ""):
    """Take a LIST."""
    found = store.begin_sweep(kind, namespace, began_at)
    found.take(manifests, now)
    return found.finish(now)


def names(store: Store) -> set[str]:
    return {entry.metadata.name for entry in store.entries("default")}


# --- events


def test_a_new_object_touches_its_namespace():
    """And only that."""
    store = Store()

    assert store.put(POLICY, policy(namespace="serving"), 0.0) == {"serving"}
    assert store.namespaces() == ["serving"]


def test_an_edit_touches():
    """The latest generation counts."""
    store = filled("a")

    assert store.put(POLICY, policy(version=2, generation=2, mode="Enforce"), 1.0) == {"default"}
    assert store.get(POLICY, "uid-a").metadata.generation == 2


def test_a_status_alone_does_not_touch():
    """Or each status we write would lead to the next."""
    store = filled("a")

    assert store.put(POLICY, policy(version=2, status={"queued": 1}), 1.0) == set()
    assert store.get(POLICY, "uid-a").status == {"queued": 1}


def test_a_deletion_that_has_begun_touches():
    """The object's successor may be waiting for its pool."""
    store = filled("a")
    leaving = policy(version=2)
    leaving["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"

    assert store.put(POLICY, leaving, 1.0) == {"default"}


def test_the_status_of_a_pod_touches():
    """Its readiness is there."""
    store = Store()
    pod = {"metadata": {"name": "p", "uid": "u", "resourceVersion": "1"}, "status": {}}
    store.put(POD, pod, 0.0)
    ready = {"phase": "Running", "podIP": "10.0.0.1"}

    assert store.put(POD, {**pod, "status": ready}, 1.0) == {"default"}


def test_an_older_version_is_ignored():
    """Events of different sources overtake each other."""
    store = filled()
    store.put(POLICY, policy(version=10, generation=3), 0.0)

    assert store.put(POLICY, policy(version=9, generation=2), 1.0) == set()
    assert store.get(POLICY, "uid-a").metadata.generation == 3


def test_versions_are_compared_as_numbers():
    """10 is later than 9."""
    store = filled()
    store.put(POLICY, policy(version=9), 0.0)

    assert store.put(POLICY, policy(version=10, generation=2), 1.0) == {"default"}


def test_a_removed_object_stays_away():
    """A late event of it must not make a ghost of it."""
    store = filled("a")

    assert store.remove(POLICY, "uid-a", 1.0) == {"default"}
    assert store.put(POLICY, policy(version=99), 2.0) == set()
    assert (len(store), store.namespaces()) == (0, [])


def test_an_object_that_comes_back_into_a_watch_is_taken():
    """A label takes it out of what is watched and brings it back: a newer version than its end."""
    store = filled("a")
    store.remove(POLICY, "uid-a", 1.0, version="21")

    assert store.put(POLICY, policy(version=20), 2.0) == set()
    assert store.put(POLICY, policy(version=22), 3.0) == {"default"}


def test_a_watch_that_tells_of_the_last_end_is_believed():
    """Only LISTs have to come twice."""
    store = filled("a")

    assert store.remove(POLICY, "uid-a", 1.0, "6") == {"default"}
    assert not sweep(store, POLICY, [], 2.0, 3.0).held


def test_a_name_made_again_replaces_its_predecessor():
    """Although the end of the first one was never reported."""
    store = filled("a")

    assert store.put(POLICY, policy(uid="second", version=5), 1.0) == {"default"}
    assert [entry.metadata.uid for entry in store.entries("default")] == ["second"]
    assert store.named(POLICY, "default", "a").metadata.uid == "second"


def test_the_late_deletion_of_a_predecessor_leaves_the_successor():
    """Everything goes by uid."""
    store = filled("a")
    store.put(POLICY, policy(uid="second"), 1.0)

    assert store.remove(POLICY, "uid-a", 2.0) == set()
    assert store.named(POLICY, "default", "a").metadata.uid == "second"


def test_an_invalid_generation_keeps_the_last_valid_one():
    """And says what is wrong with the latest."""
    store = filled("a")
    wrong = policy(version=2, generation=2, mode="Sometimes")

    assert store.put(POLICY, wrong, 1.0) == {"default"}
    entry = store.get(POLICY, "uid-a")
    assert entry.resource.metadata.generation == 1
    assert entry.metadata.generation == 2
    assert [path for path, _ in entry.problems] == ["spec.mode"]
    assert store.put(POLICY, policy(version=3, generation=3), 2.0) == {"default"}
    assert entry.problems != store.get(POLICY, "uid-a").problems == ()


def test_an_object_that_was_never_valid_has_no_resource():
    """What is wrong is known all the same, and what it says."""
    store = Store()
    store.put(POLICY, policy(mode="Sometimes"), 0.0)
    entry = store.get(POLICY, "uid-a")

    assert entry.resource is None
    assert entry.spec["mode"] == "Sometimes"
    assert store.put(POLICY, policy(version=2, mode="Sometimes"), 1.0) == set()


@pytest.mark.parametrize(
    "manifest",
    [{}, {"metadata": {}}, {"metadata": {"name": "a"}}, {"metadata": {"name": 1, "uid": "u"}}],
)
def test_what_no_api_server_writes_is_ignored(manifest):
    """Nothing can be known by a uid that is not there."""
    assert Store().put(POLICY, manifest, 0.0) == set()


def test_what_is_remembered_of_removed_objects_is_bounded():
    """Uids of pods come and go for months."""
    store = Store()
    for number in range(MAX_REMEMBERED + 10):
        store.remove(POD, f"uid-{number}", 0.0)

    assert len(store._removed) == MAX_REMEMBERED


# --- sweeps


def test_a_sweep_removes_a_ghost():
    """What a broken watch did not say."""
    store = filled("a", "ghost")
    swept = sweep(store, POLICY, [policy("a")], 10.0, 11.0)

    assert (swept.changed, swept.corrected, swept.held) == ({"default"}, {"uid-ghost"}, False)
    assert names(store) == {"a"}


def test_a_sweep_finds_what_watches_missed():
    """New objects and new generations."""
    store = filled("a")
    listed = [policy("a", version=2, generation=2), policy("b", version=3)]

    assert sweep(store, POLICY, listed, 10.0, 11.0).corrected == {"uid-a", "uid-b"}
    assert names(store) == {"a", "b"}


def test_a_clean_sweep_changes_nothing():
    """It is the usual one."""
    store = filled("a", "b")
    swept = sweep(store, POLICY, [policy("a"), policy("b")], 10.0, 11.0)

    assert (swept.changed, swept.corrected) == (set(), set())


def test_an_object_seen_after_the_list_began_is_kept():
    """It was made meanwhile."""
    store = filled("a")
    store.put(POLICY, policy("new"), 10.5)
    sweep(store, POLICY, [policy("a")], 10.0, 11.0)

    assert names(store) == {"a", "new"}


def test_an_object_deleted_while_the_list_ran_stays_away():
    """The LIST still holds it."""
    store = filled("a", "b")
    store.remove(POLICY, "uid-b", 10.5)
    sweep(store, POLICY, [policy("a"), policy("b")], 10.0, 11.0)

    assert names(store) == {"a"}


def test_a_predecessor_in_a_list_does_not_come_back():
    """The LIST began before it was deleted and made again."""
    store = filled("a", "b")
    store.put(POLICY, policy("b", uid="second", version=7), 10.5)
    sweep(store, POLICY, [policy("a"), policy("b")], 10.0, 11.0)

    assert store.named(POLICY, "default", "b").metadata.uid == "second"


def test_the_last_objects_of_a_kind_are_removed_by_a_second_list_only():
    """Ten seconds later: nothing is wiped out because of one empty answer."""
    store = filled("a", "b")

    assert sweep(store, POLICY, [], 10.0, 11.0).held
    assert sweep(store, POLICY, [], 19.0, 11.0 + EMPTY_SECONDS - 0.1).held
    assert names(store) == {"a", "b"}
    swept = sweep(store, POLICY, [], 21.0, 11.0 + EMPTY_SECONDS)
    assert (swept.held, len(swept.corrected), names(store)) == (False, 2, set())


def test_an_empty_list_that_was_a_mistake_is_forgotten():
    """The ten seconds restart with the next empty one."""
    store = filled("a")
    sweep(store, POLICY, [], 10.0, 11.0)
    sweep(store, POLICY, [policy("a")], 20.0, 21.0)

    assert sweep(store, POLICY, [], 30.0, 31.0).held
    assert names(store) == {"a"}


def test_kinds_are_swept_apart():
    """An empty LIST of one says nothing about another."""
    store = filled("a")
    store.put(POD, {"metadata": {"name": "p", "uid": "u"}, "status": {}}, 0.0)
    sweep(store, POD, [], 10.0, 11.0)
    sweep(store, POD, [], 30.0, 31.0)

    assert names(store) == {"a"}


def test_a_list_that_began_before_an_event_does_not_set_it_back():
    """Versions decide between a LIST and an event that came while it ran."""
    store = filled("b")
    store.put(POLICY, policy("a", version=20, generation=2), 10.5)
    sweep(store, POLICY, [policy("b"), policy("a", version=10)], 10.0, 11.0)

    assert store.get(POLICY, "uid-a").metadata.generation == 2


def test_a_restored_backup_is_believed_by_a_sweep():
    """Its versions are lower than those we have seen, and stay so for long."""
    store = filled("b")
    store.put(POLICY, policy("a", version=1000, generation=9), 0.0)
    older = policy("a", version=50, generation=4)

    assert store.put(POLICY, older, 5.0) == set()
    sweep(store, POLICY, [policy("b"), older], 10.0, 11.0)
    assert store.get(POLICY, "uid-a").metadata.generation == 4
    assert store.put(POLICY, policy("a", version=51, generation=5), 12.0) == {"default"}


def test_an_object_that_is_there_again_is_taken_by_a_sweep():
    """A LIST that began after its removal is right: a backup was restored over another."""
    store = filled("a", "b")
    sweep(store, POLICY, [policy("a")], 10.0, 11.0)
    assert names(store) == {"a"}

    sweep(store, POLICY, [policy("a"), policy("b")], 20.0, 21.0)
    assert names(store) == {"a", "b"}


# --- whatever happens


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["create", "edit", "delete", "sweep"]),
        st.sampled_from("abc"),
        st.booleans(),  # whether the watch delivers it
    ),
    max_size=40,
)


@given(steps=STEPS)
def test_sweeps_make_the_store_true(steps):
    """Whatever events were lost, two LISTs later it holds what the API server holds."""
    truth: dict[str, dict] = {}
    store, now = Store(), 0.0
    for version, (step, name, delivered) in enumerate(steps):
        now += 1.0
        match step:
            case "create" if name not in truth:
                truth[name] = policy(name, uid=f"{name}-{version}", version=version)
                if delivered:
                    store.put(POLICY, truth[name], now)
            case "edit" if name in truth:
                old = truth[name]["metadata"]
                truth[name] = policy(
                    name, uid=old["uid"], version=version, generation=old["generation"] + 1
                )
                if delivered:
                    store.put(POLICY, truth[name], now)
            case "delete" if name in truth:
                uid = truth.pop(name)["metadata"]["uid"]
                if delivered:
                    store.remove(POLICY, uid, now)
            case "sweep":
                sweep(store, POLICY, list(truth.values()), now, now + 0.5)
    for _ in range(2):
        now += EMPTY_SECONDS + 1.0
        sweep(store, POLICY, list(truth.values()), now, now + 0.5)

    held = {e.metadata.uid: e.metadata.generation for e in store.entries("default")}
    assert held == {m["metadata"]["uid"]: m["metadata"]["generation"] for m in truth.values()}
