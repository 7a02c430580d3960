"""A service account for an operator with the roles of operator/rbac, and a kubeconfig for it."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from api_server import ApiServer

RBAC = Path(__file__).parents[2] / "operator" / "rbac"
ACCOUNT = "forebay-operator"


def _bind(cluster: ApiServer, kind: str, role: str, home: str, *where: str) -> None:
    cluster.kubectl(
        *("create", kind, f"{role}-{home}", *where),
        f"--serviceaccount={home}:{ACCOUNT}",
    )


def cluster_wide(cluster: ApiServer, home: str, folder: Path) -> Path:
    """An account in the namespace `home` that may watch everywhere; return its kubeconfig."""
    _create(cluster, home, "cluster-wide.yaml")
    _bind(cluster, "clusterrolebinding", ACCOUNT, home, f"--clusterrole={ACCOUNT}")
    return kubeconfig_of(cluster, home, ACCOUNT, folder)


def namespaced(
    cluster: ApiServer,
    home: str,
    folder: Path,
    *namespaces: str,
    tokens: bool = True,
    slices: bool = False,
) -> Path:
    """An account in the namespace `home` that may watch some namespaces; return its kubeconfig."""
    _create(cluster, home, "namespaced.yaml")
    for namespace in namespaces:
        if namespace != home:
            cluster.kubectl("apply", "-n", namespace, "-f", str(RBAC / "namespaced.yaml"))
        for role in (ACCOUNT, *([f"{ACCOUNT}-endpoint-slices"] if slices else [])):
            _bind(cluster, "rolebinding", role, home, f"--role={role}", "-n", namespace)
    if tokens:
        role = f"{ACCOUNT}-tokens"
        _bind(cluster, "clusterrolebinding", role, home, f"--clusterrole={role}")
    return kubeconfig_of(cluster, home, ACCOUNT, folder)


def _create(cluster: ApiServer, home: str, file: str) -> None:
    cluster.kubectl("create", "serviceaccount", ACCOUNT, "-n", home)
    cluster.kubectl("apply", "-n", home, "-f", str(RBAC / file))
    lease = f"{ACCOUNT}-lease"
    _bind(cluster, "rolebinding", lease, home, f"--role={lease}", "-n", home)


def kubeconfig_of(cluster: ApiServer, home: str, account: str, folder: Path) -> Path:
    """Write a kubeconfig with which a program is a service account of the namespace `home`."""
    token = cluster.kubectl("create", "token", account, "-n", home, "--duration=2h").stdout.strip()
    return kubeconfig(cluster, folder / f"{home}.kubeconfig", token)


def kubeconfig(
    cluster: ApiServer, file: Path, token: str, server: str | None = None, ca: bytes | None = None
) -> Path:
    """Write a kubeconfig for a token; by way of another server, such as a proxy, if given."""
    view = cluster.kubectl("config", "view", "--raw", "--minify", "--flatten", "-o", "json")
    found = json.loads(view.stdout)["clusters"][0]["cluster"]
    if server is not None:
        found["server"] = server
    if ca is not None:
        found["certificate-authority-data"] = base64.b64encode(ca).decode()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": found}],
        "users": [{"name": "test", "user": {"token": token}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "current-context": "test",
    }
    file.write_text(json.dumps(config))
    return file
