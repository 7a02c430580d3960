"""Certificates of the control channel on a real API server, with no more rights than they need."""

from __future__ import annotations

import asyncio
import base64
import json

import pytest
from control_plane import apply
from cryptography import x509
from operator_account import kubeconfig_of

from forebay_operator import certificates
from forebay_operator.cluster import ApiError, Cluster
from forebay_operator.issuing import Issuer, Places

ACCOUNT = "operator"
SECRET, CONFIG_MAP = "control-tls", "control-ca"
NAME = "forebay-operator.test.svc"


def manifests() -> list[dict]:
    """What the chart makes beforehand: objects without data, and rights to these two alone."""
    rules = [
        {
            "apiGroups": [""],
            "resources": [plural],
            "resourceNames": [name],
            "verbs": ["get", "update"],
        }
        for plural, name in (("secrets", SECRET), ("configmaps", CONFIG_MAP))
    ]
    role = "rbac.authorization.k8s.io"
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": ACCOUNT}},
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": SECRET}, "type": "Opaque"},
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": CONFIG_MAP}},
        {
            "apiVersion": f"{role}/v1",
            "kind": "Role",
            "metadata": {"name": ACCOUNT},
            "rules": rules,
        },
        {
            "apiVersion": f"{role}/v1",
            "kind": "RoleBinding",
            "metadata": {"name": ACCOUNT},
            "roleRef": {"apiGroup": role, "kind": "Role", "name": ACCOUNT},
            "subjects": [{"kind": "ServiceAccount", "name": ACCOUNT}],
        },
    ]


class Site:
    """A namespace in which an operator may keep its certificates."""

    def __init__(self, cluster, namespace: str) -> None:
        self.cluster, self.namespace = cluster, namespace
        self.connections: list[Cluster] = []

    def issuer(self, **options) -> Issuer:
        self.connections.append(Cluster())
        places = Places(self.namespace, SECRET, ((self.namespace, CONFIG_MAP),))
        return Issuer(self.connections[-1], places, NAME, **options)

    def secret(self) -> dict[str, bytes]:
        data = self.cluster.get("secret", SECRET, "-n", self.namespace).get("data", {})
        return {key: base64.b64decode(text) for key, text in data.items()}

    def published(self) -> str:
        found = self.cluster.get("configmap", CONFIG_MAP, "-n", self.namespace)
        return found.get("data", {}).get("ca.crt", "")


@pytest.fixture
async def site(cluster, namespace, tmp_path, monkeypatch):
    apply(cluster, namespace, *manifests())
    kubeconfig = kubeconfig_of(cluster, namespace, ACCOUNT, tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    found = Site(cluster, namespace)
    yield found
    for connection in found.connections:
        await connection.close()


async def test_replicas_that_start_at_once_serve_the_same_leaf(site):
    """One of them issues it, the others take what it has stored; the CA is published."""
    replicas = [site.issuer() for _ in range(4)]

    await asyncio.gather(*(replica.first() for replica in replicas))

    secret = site.secret()
    assert {replica.pair for replica in replicas} == {(secret["tls.key"], secret["tls.crt"])}
    assert site.published().encode() == secret["ca.crt"]


async def test_a_replica_takes_the_leaf_that_another_has_issued(site):
    """At its next look, and without writing anything."""
    days = 0
    one = site.issuer(time_of_day=lambda: days * 86400 + 1.8e9)
    other = site.issuer(time_of_day=lambda: days * 86400 + 1.8e9)
    await one.first()
    await other.first()
    before = other.pair

    days = 61
    await one.look()
    version = site.cluster.get("secret", SECRET, "-n", site.namespace)["metadata"]
    await other.look()

    assert other.pair == one.pair != before
    assert site.cluster.get("secret", SECRET, "-n", site.namespace)["metadata"] == version


async def test_what_somebody_else_keeps_there_stays(site):
    """Only the keys that are the operator's are written."""
    for kind, name in (("secret", SECRET), ("configmap", CONFIG_MAP)):
        field = "stringData" if kind == "secret" else "data"
        patch = json.dumps({field: {"other": "kept"}})
        site.cluster.kubectl(
            *("patch", kind, name, "-n", site.namespace, "--type=merge", "-p", patch)
        )

    await site.issuer().first()

    assert site.secret()["other"] == b"kept"
    found = site.cluster.get("configmap", CONFIG_MAP, "-n", site.namespace)
    assert found["data"]["other"] == "kept"


async def test_a_ca_that_was_taken_out_of_the_config_map_is_published_again(site):
    """Somebody has applied the empty object over it; the leaf stays."""
    issuer = site.issuer()
    await issuer.first()
    before, bundle = issuer.pair, site.published()
    patch = json.dumps({"data": None})
    site.cluster.kubectl(
        *("patch", "configmap", CONFIG_MAP, "-n", site.namespace, "--type=merge", "-p", patch)
    )

    await issuer.look()

    assert (issuer.pair, site.published()) == (before, bundle)


async def test_a_missing_config_map_does_not_keep_the_operator_from_serving(site):
    """The others get the CA; the namespace of that one may be gone."""
    site.cluster.kubectl("delete", "configmap", CONFIG_MAP, "-n", site.namespace)
    role = json.dumps([{"op": "remove", "path": "/rules/1/resourceNames"}])
    site.cluster.kubectl(
        *("patch", "role", ACCOUNT, "-n", site.namespace, "--type=json", "-p", role)
    )
    issuer = site.issuer()

    await issuer.look()

    assert issuer.pair[1] == site.secret()["tls.crt"]


async def test_no_leaf_is_served_that_is_not_stored(site):
    """An operator that may read the Secret and not write it serves what is there, or nothing."""
    role = json.dumps([{"op": "replace", "path": "/rules/0/verbs", "value": ["get"]}])
    site.cluster.kubectl(
        *("patch", "role", ACCOUNT, "-n", site.namespace, "--type=json", "-p", role)
    )
    issuer = site.issuer()

    with pytest.raises(ApiError, match="403"):
        await issuer.look()

    with pytest.raises(ValueError, match="no certificate"):
        _ = issuer.pair
    assert site.secret() == {}


async def test_a_ca_is_replaced_in_secret_and_config_map(site):
    """Both CAs are published while the leaf is still the old one's."""
    days = 0.0
    issuer = site.issuer(time_of_day=lambda: days * 86400 + 1.8e9)
    await issuer.first()
    old = x509.load_pem_x509_certificates(site.secret()["ca.crt"])

    days = certificates.CA_LASTS.days * 2 / 3 + 1
    await issuer.look()

    both = x509.load_pem_x509_certificates(site.published().encode())
    assert both[1:] == old
    leaf = x509.load_pem_x509_certificate(issuer.pair[1])
    leaf.verify_directly_issued_by(old[0])
