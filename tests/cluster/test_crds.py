"""The CRDs on a real API server: it keeps what it is given, and adds no defaults of ours."""

from __future__ import annotations

import pytest
from api_server import APPLY, error_fields
from control_plane import model, policy, pool
from manifest_reading import resource_of

from forebay_control.plan import DEFAULT_BANDS
from forebay_control.v1 import control_pb2 as pb
from forebay_operator import planning, resources
from forebay_operator.resources import POLICY
from forebay_operator.status import comparing, conditions
from forebay_operator.status.observed import EPP, Attachment, EPPState, Subject

WHEN = "2026-01-01T00:00:00Z"


def test_every_kind_is_established(crds):
    """With a schema that is structural, and a name that is approved."""
    found = crds.get("crd")["items"]

    states = {
        crd["metadata"]["name"]: {c["type"]: c["status"] for c in crd["status"]["conditions"]}
        for crd in found
        if crd["spec"]["group"] in {kind.group for kind in resources.KINDS}
    }
    assert len(states) >= 6
    assert all(state["Established"] == "True" for state in states.values())
    assert all("NonStructuralSchema" not in state for state in states.values())


def test_what_a_policy_leaves_unset_stays_unset(somewhere):
    """The API server fills in no defaults that would outlive ours; the plan is the same."""
    bands = [{"name": "Critical", "queue": {}}]
    manifest = policy("least", "chat", bands=bands, limits={}, saturation={"type": "Adaptive"})
    chat = {**pool("chat"), "metadata": {"name": "chat", "namespace": somewhere.name}}

    stored = somewhere.create(manifest)

    assert stored["spec"] == manifest["spec"]
    manifest["metadata"]["namespace"] = somewhere.name
    plans = [
        planning.plan(resource_of(chat), [resource_of(each)]).snapshot.plan
        for each in (manifest, stored)
    ]
    assert plans[0] == plans[1]


def test_applying_a_policy_again_changes_nothing(somewhere):
    """Keys of lists that the API server has filled in are found again."""
    bands = [{"name": "Critical", "queue": {"ttl": "5s"}}, {"name": "Standard"}]
    manifest = policy("again", "chat", bands=bands)

    first, second = somewhere.apply(manifest), somewhere.apply(manifest)

    assert first["metadata"]["resourceVersion"] == second["metadata"]["resourceVersion"]


# --- kinds of others


def test_the_name_of_a_model_does_not_change(somewhere):
    """The rule that compares with the object before; the rest may change."""
    manifest = model("fixed", "chat", "llama")
    somewhere.create(manifest)

    manifest["spec"]["criticality"] = "Sheddable"
    somewhere.apply(manifest)
    manifest["spec"]["modelName"] = "mistral"
    path = f"{somewhere.path(manifest)}/fixed?fieldManager=test&force=true"
    status, answer = somewhere.cluster.ask("PATCH", path, manifest, APPLY)

    assert (status, error_fields(answer)) == (422, {"spec.modelName"})
    assert "modelName is immutable" in answer["message"]


@pytest.mark.parametrize(
    "manifest",
    [pool("future"), model("future", "chat", "llama"), policy("future", "chat")],
    ids=lambda manifest: manifest["kind"],
)
def test_unknown_fields_are_dropped(somewhere, manifest):
    """Without strict validation: their author may be ahead of the CRD."""
    stored = somewhere.create({**manifest, "spec": {**manifest["spec"], "future": "new"}})

    assert "future" not in stored["spec"]
    assert resource_of(stored).spec == resource_of(manifest).spec


def test_an_empty_status_of_a_model_says_that_it_waits(somewhere):
    """As the schema of the kind's owners does."""
    manifest = model("waits", "chat", "llama")
    somewhere.create(manifest)
    manifest["status"] = {}

    stored = somewhere.apply(manifest, "/status")

    assert stored["status"]["conditions"] == [
        {
            "type": "Ready",
            "status": "Unknown",
            "reason": "Pending",
            "message": "Waiting for controller",
            "lastTransitionTime": "1970-01-01T00:00:00Z",
        }
    ]


# --- statuses


def accepted() -> dict:
    return {
        "type": "Accepted",
        "status": "True",
        "reason": "Accepted",
        "message": "",
        "observedGeneration": 1,
        "lastTransitionTime": WHEN,
    }


def test_the_status_of_a_policy_is_kept_whole(somewhere):
    """Nothing of what conditions.py makes is unknown to the schema, or out of its bounds."""
    manifest = policy("status", "chat")
    somewhere.create(manifest)
    manifest["status"] = status_of_a_policy(somewhere)
    del manifest["spec"]

    stored = somewhere.apply(manifest, "/status")

    assert stored["status"] == manifest["status"]


def status_of_a_policy(somewhere) -> dict:
    """A status with something in every field."""
    stats = pb.Stats(saturation=0.85)
    for number, name in enumerate(each.name for each in DEFAULT_BANDS):
        band = stats.bands.add(band=name, requests=number + 5, bytes=1 << 50, oldest_seconds=1.5)
        band.dispatched = band.rejected = band.evicted = 1 << 40
    epps = [
        EPP("epp-0", EPPState.PROGRAMMED, True, {"uid": 1}, stats=stats),
        EPP("epp-1", EPPState.REJECTED, True, {}, error="Invalid: no"),
        EPP("epp-2", EPPState.STALE),
    ]
    group = "inference.networking.k8s.io"
    attachments = [
        Attachment("chat", group, epps[:1], service="epp", endpoints=4, notes=("note",)),
        Attachment("other", group, None),
        Attachment("third", group, epps, refused=("Conflicted", "older")),
    ]
    subject = Subject("uid", somewhere.name, 1)
    return comparing.with_times(conditions.policy_status(subject, attachments), {}, WHEN)


def test_the_status_of_a_model_is_kept_whole(somewhere):
    """The same for the status we write into a foreign kind."""
    manifest = model("status", "chat", "llama")
    somewhere.create(manifest)
    subject, group = Subject("uid", somewhere.name, 1), "inference.networking.k8s.io"
    status = conditions.model_status(subject, Attachment("chat", group, []))
    manifest["status"] = comparing.with_times(status, {}, WHEN)
    del manifest["spec"]

    stored = somewhere.apply(manifest, "/status")

    assert stored["status"] == manifest["status"]


def test_what_gateways_write_into_pools_is_kept_whole(somewhere):
    """Both forms of the pool, though it is not read."""
    parent = {
        "parentRef": {
            "group": "gateway.networking.k8s.io",
            "kind": "Gateway",
            "namespace": "gateways",
            "name": "public",
        },
        "controllerName": "example.com/gateway-controller",
        "conditions": [accepted()],
    }
    old = {
        "apiVersion": "inference.networking.x-k8s.io/v1alpha2",
        "kind": "InferencePool",
        "metadata": {"name": "parents"},
        "spec": {
            "selector": {"app": "vllm"},
            "targetPortNumber": 8000,
            "extensionRef": {"name": "epp"},
        },
    }
    for manifest, key in ((pool("parents"), "parents"), (old, "parent")):
        somewhere.create(manifest)
        written = {**manifest, "status": {key: [parent]}}
        del written["spec"]

        stored = somewhere.apply(written, "/status")

        assert stored["status"] == {key: [parent]}


def test_the_table_shows_what_the_status_says(somewhere):
    """`kubectl get fcp`."""
    manifest = policy("table", "chat")
    somewhere.create(manifest)
    manifest["status"] = status_of_a_policy(somewhere)
    del manifest["spec"]
    somewhere.apply(manifest, "/status")

    printed = somewhere.cluster.kubectl("get", "fcp", "table", "-n", somewhere.name).stdout

    header, row = (line.split() for line in printed.splitlines())
    assert (
        dict(zip(header, row, strict=True)).items()
        >= {
            "NAME": "table",
            "POOLS": "chat,other,third",
            "ACCEPTED": "False",
            "PROGRAMMED": "False",
            "REASON": "TargetNotFound",
            "EPPS": "1/1",
            "QUEUED": "18",
            "SATURATION": "0.85",
        }.items()
    )


def test_kubectl_explains_a_field(crds):
    """By its short name, in the words of the models."""
    printed = crds.kubectl("explain", "fcp.spec.bands.queue").stdout

    assert "How many requests may wait in a band, and for how long." in printed
    assert "How long a request may wait" in printed
    assert f"GROUP:      {POLICY.group}" in printed
