"""What the accounts of the chart may, as the API server itself says."""

from __future__ import annotations

from pathlib import Path

from chart_release import NO_CRDS, WAIT_SECONDS, deployed
from ext_proc_peer import until
from manifest_reading import pool_ref

FOLDER = Path(__file__).parents[1] / "values"


def rights(cluster, account_namespace: str, account: str, namespace: str) -> set[tuple[str, ...]]:
    """What an account may in a namespace, as (verb, group, resource, name)."""
    token = cluster.kubectl("create", "token", account, "-n", account_namespace).stdout.strip()
    status, answer = cluster.ask(
        "POST",
        "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews",
        {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectRulesReview",
            "spec": {"namespace": namespace},
        },
        token=token,
    )
    assert status == 201, answer
    assert not answer["status"]["incomplete"]
    return {
        (verb, group, resource, name)
        for rule in answer["status"]["resourceRules"]
        for verb in rule["verbs"]
        for group in rule.get("apiGroups", [""])
        for resource in rule["resources"]
        for name in rule.get("resourceNames", [""])
    }


def expected(verbs: str, group: str, resources: str, name: str = "") -> set[tuple[str, ...]]:
    return {
        (verb, group, resource, name) for verb in verbs.split() for resource in resources.split()
    }


X_K8S = "inference.networking.x-k8s.io"
WATCHED = (
    expected("list watch", "forebay.dev", "flowcontrolpolicies")
    | expected("list watch", "inference.networking.k8s.io", "inferencepools")
    | expected("list watch", X_K8S, "inferencepools inferencemodels inferenceobjectives")
    | expected("list watch", "llm-d.ai", "inferenceobjectives")
    | expected("list watch", "", "pods services")
    | expected("patch", "forebay.dev", "flowcontrolpolicies/status")
    | expected("patch", X_K8S, "inferencemodels/status inferenceobjectives/status")
    | expected("patch", "llm-d.ai", "inferenceobjectives/status")
    | expected("create", "", "events")
)
REVIEWS = expected("create", "authentication.k8s.io", "tokenreviews")
AT_HOME = (
    expected("create get update", "coordination.k8s.io", "leases", "forebay-operator")
    | expected("get update", "", "secrets", "forebay-control-tls")
    | expected("get update", "", "configmaps", "forebay-control-ca")
)


def test_the_operator_may_what_it_needs_and_nothing_else(release):
    """Everywhere what it watches; in its own namespace also its Lease, its Secret and the CA's."""
    release.install(f"--values={FOLDER / 'pool.yaml'}", NO_CRDS)
    cluster, namespace = release.cluster, release.namespace
    everyone = rights(cluster, namespace, "default", namespace)

    here = rights(cluster, namespace, "forebay-operator", namespace)
    elsewhere = rights(cluster, namespace, "forebay-operator", "kube-system")

    assert here - everyone == WATCHED | REVIEWS | AT_HOME
    assert elsewhere - everyone == WATCHED | REVIEWS


def test_an_operator_of_one_namespace_has_no_rights_in_others(release):
    """But to have tokens reviewed, which belong to no namespace."""
    release.install(
        f"--values={FOLDER / 'namespaced.yaml'}",
        f"--set=operator.watchNamespaces={{{release.namespace}}}",
        NO_CRDS,
    )
    cluster, namespace = release.cluster, release.namespace
    everyone = rights(cluster, namespace, "default", namespace)

    here = rights(cluster, namespace, "forebay-operator", namespace)
    elsewhere = rights(cluster, namespace, "forebay-operator", "kube-system")

    lease = expected("create get update", "coordination.k8s.io", "leases", "forebay-operator")
    assert here - everyone == WATCHED | REVIEWS | lease
    assert elsewhere - everyone == REVIEWS


def test_the_ca_is_published_to_pools_elsewhere(release, kinds):
    """By name there, too."""
    kinds.kubectl("create", "namespace", f"{release.namespace}-pools")
    try:
        release.install(
            *(f"--values={FOLDER / 'pool.yaml'}", NO_CRDS),
            f"--set=pools[0].namespace={release.namespace}-pools",
        )
        everyone = rights(kinds, release.namespace, "default", release.namespace)
        there = rights(kinds, release.namespace, "forebay-operator", f"{release.namespace}-pools")
    finally:
        release.helm("uninstall")
        kinds.kubectl("delete", "namespace", f"{release.namespace}-pools", "--wait=false")

    published = expected("get update", "", "configmaps", "forebay-control-ca")
    assert there - everyone == WATCHED | REVIEWS | published


def test_editors_of_a_namespace_write_its_policies_and_viewers_read_them(release):
    """By the cluster's own roles edit and view; the status is the operator's alone."""
    release.install(f"--values={FOLDER / 'pool.yaml'}", NO_CRDS, "--set=operator.replicas=0")
    tokens = {role: member(release, role) for role in ("edit", "view")}
    path = f"/apis/forebay.dev/v1alpha1/namespaces/{release.namespace}/flowcontrolpolicies"
    made = {"apiVersion": "forebay.dev/v1alpha1", "kind": "FlowControlPolicy"}
    made |= {"metadata": {"name": "chat"}, "spec": {"targetRefs": [pool_ref("chat")]}}

    def ask(role: str, method: str, name: str = "", body: dict | None = None) -> int:
        return release.cluster.ask(method, f"{path}{name}", body, token=tokens[role])[0]

    until(lambda: ask("edit", "GET") == ask("view", "GET") == 200, WAIT_SECONDS)
    assert ask("view", "POST", body=made) == 403
    assert ask("edit", "POST", body=made) == 201
    for role, token in tokens.items():
        status, found = release.cluster.ask("GET", f"{path}/chat", token=token)
        assert status == 200
        assert ask(role, "PUT", "/chat/status", found) == 403
    assert ask("edit", "PUT", "/chat", found) == 200
    assert ask("view", "PUT", "/chat", found) == 403
    assert ask("view", "DELETE", "/chat") == 403
    assert ask("edit", "DELETE", "/chat") == 200


def member(release, role: str) -> str:
    """The token of an account that has one of the cluster's own roles in the namespace."""
    where = ("-n", release.namespace)
    kubectl = release.cluster.kubectl
    kubectl("create", "serviceaccount", role, *where)
    account = f"--serviceaccount={release.namespace}:{role}"
    kubectl("create", "rolebinding", role, f"--clusterrole={role}", account, *where)
    return kubectl("create", "token", role, *where).stdout.strip()


def test_an_endpoint_picker_may_nothing(release):
    """Its account has no more rights than every account, and its token is not for the API."""
    release.install(f"--values={FOLDER / 'pool.yaml'}", NO_CRDS)
    cluster, namespace = release.cluster, release.namespace
    everyone = rights(cluster, namespace, "default", namespace)

    assert rights(cluster, namespace, "chat-epp", namespace) == everyone
    token = deployed(release, "chat").token()
    status, _ = cluster.ask("GET", f"/api/v1/namespaces/{namespace}/pods", token=token)
    assert status == 401
    spec = release.get("deployment", "chat-epp")["spec"]["template"]["spec"]
    assert spec["automountServiceAccountToken"] is False
