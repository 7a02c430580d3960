"""Policies that are edited, that conflict and that are wrong."""

from __future__ import annotations

import contextlib

import pytest
import yaml
from ext_proc_peer import until
from installation import MODEL_SERVERS, PATIENCE_SECONDS, POLICY, STANDARD

ONE_EACH = {"type": "Concurrency", "concurrency": {"maxRequestsPerEndpoint": 1}}


def _standard(**queue) -> list[dict]:
    return [{"name": "Standard", "queue": queue}]


def test_an_edited_policy_takes_effect_in_the_running_epp(forebay, clients):
    """A new limit and a new time to live are kept at once, by the same pod without a restart."""
    before = [pod["metadata"]["uid"] for pod in forebay.pods("endpoint-picker")]
    forebay.set_policy(saturation=ONE_EACH)
    with clients.holding(STANDARD, MODEL_SERVERS):
        forebay.set_policy(saturation=ONE_EACH, bands=_standard(maxRequests=1))
        (waits,) = clients.send(STANDARD)
        until(lambda: forebay.queued() == 1, PATIENCE_SECONDS)
        (over_the_limit,) = clients.send(STANDARD)
        assert over_the_limit.result().outcome == "RejectedQueueFull"
        assert over_the_limit.result().status == 429
        assert not waits.done()

        forebay.set_policy(saturation=ONE_EACH, bands=_standard(ttl="500ms"))
        (too_late,) = clients.send(STANDARD)
        assert too_late.result().outcome == "EvictedTTL"
        assert too_late.result().status == 429

    (pod,) = forebay.pods("endpoint-picker")
    assert [pod["metadata"]["uid"]] == before
    assert [each["restartCount"] for each in pod["status"]["containerStatuses"]] == [0]


@pytest.fixture
def rival(forebay):
    """Another policy for the same pool, made later."""
    manifest = yaml.safe_load(POLICY.read_text())
    manifest["metadata"]["name"] = "rival"
    forebay.kubectl("apply", "-f", "-", input=yaml.safe_dump(manifest))
    with contextlib.ExitStack() as after:
        after.callback(forebay.kubectl, "delete", "fcp", "rival", "--ignore-not-found")
        yield "rival"


def test_of_two_policies_the_older_counts(forebay, rival):
    """The newer one says which is in its way, and counts as soon as that is gone."""
    until(lambda: forebay.condition("Accepted", rival).get("status") == "False", PATIENCE_SECONDS)
    refused = forebay.condition("Accepted", rival)
    assert refused["reason"] == "Conflicted"
    assert "chat" in refused["message"]
    assert forebay.condition("Accepted")["status"] == "True"

    forebay.kubectl("delete", "fcp", "chat")

    until(lambda: forebay.condition("Accepted", rival).get("status") == "True", PATIENCE_SECONDS)
    forebay.wait_programmed(name=rival)


def test_a_wrong_policy_is_refused_when_applied(forebay):
    """The error of kubectl names the field, and the policy before it stays."""
    before = forebay.policy()["metadata"]["generation"]
    manifest = yaml.safe_load(POLICY.read_text())
    manifest["spec"]["bands"][1]["queue"]["ttl"] = "soon"
    apply = ("-n", "forebay", "apply", "-f", "-")

    refused = forebay.cluster.kubectl(*apply, input=yaml.safe_dump(manifest), check=False)

    assert refused.returncode != 0
    assert "spec.bands[1].queue.ttl" in refused.stderr
    assert forebay.policy()["metadata"]["generation"] == before
