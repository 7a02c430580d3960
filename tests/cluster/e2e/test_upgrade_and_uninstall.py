"""The life of the release."""

from __future__ import annotations

from ext_proc_peer import until
from installation import CRITICAL, PATIENCE_SECONDS, RELEASE

AROUND = 20
CRDS = ("flowcontrolpolicies.forebay.dev", "inferencepools.inference.networking.k8s.io")
TLS = ("secret", "forebay-control-tls")


def test_an_upgrade_fails_no_request_and_keeps_the_certificate(forebay, clients, figure):
    """New values reach operator and EPPs; the control channel's CA stays; status counts on."""
    before = forebay.get(*TLS)["data"]
    with clients.trickle(CRITICAL) as trickle:
        trickle.wait_for(AROUND)
        forebay.upgrade("--set=epp.replicas=2", "--set=operator.flags.sweep-interval=45s")
        forebay.wait_programmed(2)
        trickle.wait_for(AROUND)
        forebay.upgrade()
        forebay.wait_programmed(1)
        trickle.wait_for(AROUND)

    figure(f"helm upgrade, twice: {len(trickle.answers)} requests, {trickle.failed.total()} failed")
    assert trickle.failed == {}
    assert forebay.get(*TLS)["data"] == before


def test_uninstalling_leaves_the_crds_and_what_is_the_users(forebay):
    """Of the release nothing but CRDs is left; installed again, it finds policy and models."""
    try:
        forebay.helm("uninstall", RELEASE, "--wait")

        # helm does not wait for pods, which finish what they have.
        labelled = ("-l", f"app.kubernetes.io/instance={RELEASE}")
        until(lambda: not forebay.get("pods", *labelled)["items"], PATIENCE_SECONDS)
        # What was owned by it goes in the background.
        until(lambda: forebay.of_the_release() | forebay.of_the_chart() == set(), PATIENCE_SECONDS)
        assert len(forebay.cluster.get("crd", *CRDS)["items"]) == len(CRDS)
    finally:
        forebay.upgrade()
    forebay.wait_programmed()
    with forebay.clients() as clients:
        (answer,) = clients.send(CRITICAL)
    assert answer.result().status == 200
