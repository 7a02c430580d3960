"""Certificates of the control channel on a real API server, with no more rights than they need."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets

import pytest
from control_plane import apply
from cryptography import x509
from operator_account import kubeconfig_of

from forebay_operator.certificates import authority
from forebay_operator.certificates.issuing import Issuer, Places
from forebay_operator.cluster.api import ApiError, Cluster
from forebay_operator.cluster.denials import Denials

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
        self.denials = Denials()

    def issuer(self, *others: str, **options) -> Issuer:
        """One that publishes in this namespace, after the others given."""
        self.connections.append(Cluster())
        maps = tuple((name, CONFIG_MAP) for name in (*others, self.namespace))
        places = Places(self.namespace, SECRET, maps)
        return Issuer(self.connections[-1], places, NAME, self.denials, **options)

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
    await replicas[0].look()

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

    await site.issuer().look()

    assert site.secret()["other"] == b"kept"
    found = site.cluster.get("configmap", CONFIG_MAP, "-n", site.namespace)
    assert found["data"]["other"] == "kept"


async def test_a_ca_that_was_taken_out_of_the_config_map_is_published_again(site):
    """The empty object has been applied over it; the leaf stays."""
    issuer = site.issuer()
    await issuer.look()
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
    await issuer.look()
    old = x509.load_pem_x509_certificates(site.secret()["ca.crt"])

    days = authority.CA_LASTS.days * 2 / 3 + 1
    await issuer.look()

    both = x509.load_pem_x509_certificates(site.published().encode())
    assert both[1:] == old
    leaf = x509.load_pem_x509_certificate(issuer.pair[1])
    leaf.verify_directly_issued_by(old[0])


@pytest.fixture
def other(cluster):
    """A namespace in which the operator has no rights."""
    name = f"other-{secrets.token_hex(4)}"
    cluster.kubectl("create", "namespace", name)
    apply(
        cluster, name, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": CONFIG_MAP}}
    )
    yield name
    cluster.leave_namespace(name)


async def test_a_namespace_that_forbids_reading_costs_itself_only(site, other):
    """The leaf is issued and served, the CA published elsewhere, and the denial names it."""
    issuer = site.issuer(other)

    await issuer.first()
    await issuer.look()

    assert issuer.pair[1] == site.secret()["tls.crt"]
    assert site.published().encode() == site.secret()["ca.crt"]
    assert f"namespace {other}: {CONFIG_MAP} cannot be read: 403" in str(site.denials)


async def test_a_config_map_that_cannot_be_written_costs_itself_only(site, other):
    """Immutable: it is the first to be published, and the second one is all the same."""
    give_rights(site, other)
    patch = json.dumps({"immutable": True})
    site.cluster.kubectl(
        *("patch", "configmap", CONFIG_MAP, "-n", other, "--type=merge", "-p", patch)
    )
    issuer = site.issuer(other)

    await issuer.look()

    assert site.published().encode() == site.secret()["ca.crt"]
    assert f"namespace {other}: {CONFIG_MAP} cannot be written: 422" in str(site.denials)


async def test_a_leaf_is_renewed_while_a_namespace_is_forbidden(site, other):
    """Sixty-one days later, and the CA is published as soon as the right is given back."""
    days = 0
    issuer = site.issuer(other, time_of_day=lambda: days * 86400 + 1.8e9)
    await issuer.look()
    before = issuer.pair

    days = 61
    await issuer.look()
    assert issuer.pair != before

    give_rights(site, other)
    await issuer.look()

    found = site.cluster.get("configmap", CONFIG_MAP, "-n", other)
    assert found["data"]["ca.crt"].encode() == site.secret()["ca.crt"]
    assert str(site.denials) == ""


def give_rights(site, namespace: str) -> None:
    """As the chart does: a Role and its RoleBinding."""
    role, binding = manifests()[-2:]
    subject = {"kind": "ServiceAccount", "name": ACCOUNT, "namespace": site.namespace}
    apply(site.cluster, namespace, role, {**binding, "subjects": [subject]})
