"""etcd, the API server, the controllers and the scheduler: commands and readiness."""

from __future__ import annotations

import contextlib
import http.client
from typing import TYPE_CHECKING

from cluster.needs import require
from cluster.processes import LOOPBACK, Process

if TYPE_CHECKING:
    from cluster.state import Cluster

ISSUER = "https://kubernetes.default.svc"
SERVICE_RANGE = "10.96.0.0/16"  # without a node no pod has an address from it
# Everything at Metadata level: who asked for what, without bodies.
AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata"}],
}


def etcd_url(cluster: Cluster, which: str = "etcd") -> str:
    """Return the address of etcd for clients, or with etcd_peer for its peers."""
    return f"http://{LOOPBACK}:{cluster.ports[which]}"


def start_etcd(cluster: Cluster) -> Process:
    """Start etcd."""
    client, peer = etcd_url(cluster), etcd_url(cluster, "etcd_peer")
    command = [
        require("etcd"),
        f"--data-dir={cluster.folder}/etcd",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
        "--logger=zap",
        "--log-level=warn",
        # The data need not survive the machine's crash, only a process's.
        "--unsafe-no-fsync",
    ]
    # etcd 3.4 refuses arm64 without this flag, because it is not tested there.
    return Process.start(command, cluster.log("etcd"), ETCD_UNSUPPORTED_ARCH="arm64")


def etcd_is_ready(cluster: Cluster) -> bool:
    """Return whether etcd is healthy."""
    connection = http.client.HTTPConnection(LOOPBACK, cluster.ports["etcd"], timeout=5)
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False


def start_api_server(cluster: Cluster) -> Process:
    """Start the API server."""
    key = cluster.folder / "service-accounts.key"
    network = cluster.network
    command = [
        cluster.binary("kube-apiserver"),
        f"--etcd-servers={etcd_url(cluster)}",
        f"--bind-address={cluster.api_host}",
        f"--advertise-address={cluster.api_host}",
        f"--secure-port={cluster.ports['api']}",
        f"--cert-dir={cluster.folder}/certificates",
        f"--token-auth-file={cluster.folder}/tokens.csv",
        "--authorization-mode=Node,RBAC",
        f"--service-account-issuer={ISSUER}",
        f"--service-account-key-file={key}",
        f"--service-account-signing-key-file={key}",
        f"--service-cluster-ip-range={network.services if network else SERVICE_RANGE}",
        "--allow-privileged",
        # Without it SIGTERM waits a minute for clients to end their watches.
        "--shutdown-watch-termination-grace-period=1s",
    ]
    if network:
        command += [
            "--enable-admission-plugins=NodeRestriction",
            f"--kubelet-client-certificate={cluster.folder}/kubelet-client.crt",
            f"--kubelet-client-key={cluster.folder}/kubelet-client.key",
            "--kubelet-preferred-address-types=InternalIP",  # the node's name does not resolve
        ]
    else:
        # It would write the advertised address into Endpoints, where loopback is refused.
        command.append("--endpoint-reconciler-type=none")
    if not cluster.options["controller_manager"]:
        # It refuses pods until the account `default` exists, which nothing here creates.
        command.append("--disable-admission-plugins=ServiceAccount")
    if cluster.options["audit"]:
        command += [
            f"--audit-policy-file={cluster.folder}/audit-policy.json",
            f"--audit-log-path={cluster.folder}/audit.log",
        ]
    return Process.start(command, cluster.log("kube-apiserver"))


def api_is_ready(cluster: Cluster) -> bool:
    """Return whether the API server can be used; if so, write the administrator's kubeconfig."""
    # The namespace comes a moment after readiness, and kubectl's first command needs it.
    ready = all(
        cluster.ask("GET", path)[0] == http.HTTPStatus.OK
        for path in ("/readyz", "/api/v1/namespaces/default")
    )
    if ready:
        cluster.write_kubeconfig(cluster.kubeconfig, "admin")
    return ready


def start_controller_manager(cluster: Cluster) -> Process:
    """Start the controllers."""
    kubeconfig = cluster.folder / "controller-manager.kubeconfig"
    cluster.write_kubeconfig(kubeconfig, "controller_manager")
    command = [
        cluster.binary("kube-controller-manager"),
        f"--kubeconfig={kubeconfig}",
        f"--service-account-private-key-file={cluster.folder}/service-accounts.key",
        f"--root-ca-file={cluster.certificate}",
        # One account per controller: the audit log says which of them asked.
        "--use-service-account-credentials",
        # With the default of 20 requests a second the start takes five seconds.
        "--kube-api-qps=500",
        "--kube-api-burst=500",
        "--leader-elect=false",
        "--secure-port=0",
    ]
    return Process.start(command, cluster.log("kube-controller-manager"))


def controllers_are_ready(cluster: Cluster) -> bool:
    """Return whether the controllers have made the first account."""
    path = "/api/v1/namespaces/default/serviceaccounts/default"
    return cluster.ask("GET", path)[0] == http.HTTPStatus.OK


def start_scheduler(cluster: Cluster) -> Process:
    """Start the scheduler."""
    kubeconfig = cluster.folder / "scheduler.kubeconfig"
    cluster.write_kubeconfig(kubeconfig, "scheduler")
    command = [
        cluster.binary("kube-scheduler"),
        f"--kubeconfig={kubeconfig}",
        "--leader-elect=false",
        "--secure-port=0",
    ]
    return Process.start(command, cluster.log("kube-scheduler"))


def scheduler_is_ready(cluster: Cluster) -> bool:
    """Return whether the scheduler runs: it serves no page, and a pod waits for it."""
    return cluster.runs("kube-scheduler")
