"""The node: containerd, kubelet, kube-proxy and DNS, with everything that pods make.

All of it lives in namespaces of its own (processes, mounts, network), as in a machine, under one
first process (node_init.py). When that ends the kernel ends the rest and undoes mounts, interfaces
and packet filters; only control groups and the folder stay, which clear() and `down` remove.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import archives, builds
from cluster.files import write_private
from cluster.needs import UserError, require
from cluster.processes import Process

if TYPE_CHECKING:
    from cluster.network import Network
    from cluster.state import Cluster

NAME = "forebay-node"
DNS_USER = "forebay-dns"
DOMAIN = "cluster.local"
PAUSE = "localhost/forebay/pause:1"
CNI_PLUGINS = Path("/usr/lib/cni")
CGROUPS = Path("/sys/fs/cgroup")
READY_PORT = 8181
CLEAR_SECONDS = 10.0
MAX_SOCKET_BYTES = 107 - len(".ttrpc")  # containerd makes a second one with that ending
# What DNS reads, and no more.
DNS_RULES = [
    {"apiGroups": [""], "resources": ["namespaces", "services"], "verbs": ["list", "watch"]},
    {
        "apiGroups": ["discovery.k8s.io"],
        "resources": ["endpointslices"],
        "verbs": ["list", "watch"],
    },
]


def check(folder: Path) -> None:
    """Check what a node needs of this machine and of its folder.

    Raises:
        UserError: the user is not root, a program is missing, there are no control groups, or the
            folder's path is too long for a socket in it.
    """
    if sys.platform != "linux" or os.geteuid():
        raise UserError("a node needs Linux and root; --control-plane-only needs neither")
    programs = "containerd ctr runc ip nft iptables conntrack openssl unshare nsenter mount"
    for program in programs.split():
        require(program)
    if not (CNI_PLUGINS / "ptp").exists():
        raise UserError(
            f"{CNI_PLUGINS}/ptp is missing: on Debian, apt-get install containernetworking-plugins"
        )
    if not ((CGROUPS / "memory").exists() or (CGROUPS / "cgroup.controllers").exists()):
        raise UserError(f"no control groups are mounted on {CGROUPS}")
    if len(os.fsencode(socket_path(folder))) > MAX_SOCKET_BYTES:
        raise UserError(f"{folder} is too long for a socket's path: choose another --dir")


def socket_path(folder: Path) -> Path:
    """Return containerd's socket."""
    return folder / "containerd.sock"


def load(folder: Path, paths: list[Path]) -> None:
    """Give the node the images of archives, as `docker save` writes them.

    Raises:
        UserError: one is not such an archive, or the node does not run.
    """
    command = [require("ctr"), f"--address={socket_path(folder)}", "--namespace=k8s.io"]
    importing = subprocess.Popen(
        [*command, "images", "import", "-"], stdin=subprocess.PIPE, stdout=sys.stderr
    )
    # When it ends early its own words say why.
    with importing, contextlib.suppress(BrokenPipeError):
        archives.merge(paths, importing.stdin)
    if importing.returncode:
        raise UserError("the images were not loaded, see above")


# ------------------------------------------------------------------------------------ start and end


def start(cluster: Cluster) -> Process:
    """Start the node."""
    network = cluster.network
    programs = builds.node_programs()
    _allow_dns(cluster)
    for user in ("kubelet", "kube_proxy", "dns"):
        cluster.write_kubeconfig(cluster.folder / f"{user}.kubeconfig", user)
    for name, text in _files(cluster, network).items():
        write_private(cluster.folder / name, text)
    archives.write_program(programs / "pause", PAUSE, cluster.folder / "pause.tar")
    for group in _cgroups(network):
        group.mkdir(exist_ok=True)
        _inherit_cpus(group)
    command = [
        require("unshare"),
        *("--pid", "--fork", "--kill-child", "--mount", "--propagation=private", "--mount-proc"),
        *("--net", "--ipc", "--uts"),
        *(sys.executable, "-I", Path(__file__).with_name("node_init.py"), cluster.folder),
    ]
    outside = Process.start([str(part) for part in command], cluster.log("node"))
    first = outside.only_child()
    network.join(first.pid)
    return first


def _files(cluster: Cluster, network: Network) -> dict[str, str]:
    """Return the node's configuration, by the names of files in the folder."""
    folder = cluster.folder
    (folder / "cni").mkdir(exist_ok=True)
    (folder / "cni" / "forebay.conflist").write_text(json.dumps(_cni(network)))
    programs = builds.node_programs()
    commands = {
        "containerd": [require("containerd"), f"--config={folder}/containerd.toml"],
        "load-pause": [
            *(require("ctr"), f"--address={socket_path(folder)}", "--namespace=k8s.io"),
            *("images", "import", f"{folder}/pause.tar"),
        ],
        "kubelet": [
            cluster.binary("kubelet"),
            f"--config={folder}/kubelet.json",
            f"--kubeconfig={folder}/kubelet.kubeconfig",
            f"--hostname-override={NAME}",
            f"--node-ip={network.node}",
        ],
        "kube-proxy": [cluster.binary("kube-proxy"), f"--config={folder}/kube-proxy.json"],
        "coredns": [str(programs / "coredns"), f"-conf={folder}/Corefile"],
    }
    return {
        "containerd.toml": _containerd(folder),
        "kubelet.json": json.dumps(_kubelet(folder, network), indent=2),
        "kube-proxy.json": json.dumps(_kube_proxy(folder, network), indent=2),
        "Corefile": _corefile(folder, network),
        "node.json": json.dumps({"socket": str(socket_path(folder)), "commands": commands}),
    }


def is_ready(cluster: Cluster) -> bool:
    """Return whether pods can run, Services are reached from here and DNS answers."""
    status, node = cluster.ask("GET", f"/api/v1/nodes/{NAME}")
    if status != http.HTTPStatus.OK:
        return False
    conditions = {c["type"]: c["status"] for c in node["status"].get("conditions", [])}
    network = cluster.network
    return (
        conditions.get("Ready") == "True"
        and not node["spec"].get("taints")
        and _answers(http.client.HTTPConnection(network.node, READY_PORT, timeout=1))
        and _connects(network.api_service, 443)
    )


def _answers(connection: http.client.HTTPConnection) -> bool:
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/ready")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False


def _connects(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False


def clear(cluster: Cluster) -> None:
    """Remove the node's control groups, once it has ended.

    Raises:
        UserError: a process in them does not end.
    """
    deadline_at = time.monotonic() + CLEAR_SECONDS
    for top in _cgroups(cluster.network):
        groups = [top, *(path for path in top.rglob("*") if path.is_dir())] if top.exists() else []
        for group in sorted(groups, key=lambda path: -len(path.parts)):
            while True:
                try:
                    group.rmdir()
                except OSError as error:
                    if time.monotonic() > deadline_at:
                        raise UserError(f"{group} is still used") from error
                    time.sleep(0.05)
                else:
                    break


def _cgroups(network: Network) -> list[Path]:
    """Return the node's control group in every hierarchy."""
    if (CGROUPS / "cgroup.controllers").exists():
        return [CGROUPS / network.link]
    return [
        path / network.link
        for path in sorted(CGROUPS.iterdir())
        if path.is_dir() and not path.is_symlink()
    ]


def _inherit_cpus(group: Path) -> None:
    """Let a new group of cgroup v1's cpuset have CPUs, without which it takes no process."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        file = group / name
        if group.parent.name == "cpuset" and file.exists():
            file.write_text((group.parent / name).read_text())


def _allow_dns(cluster: Cluster) -> None:
    """Let DNS read what it needs."""
    group = "rbac.authorization.k8s.io"
    version = {"apiVersion": f"{group}/v1", "metadata": {"name": DNS_USER}}
    role = {**version, "kind": "ClusterRole", "rules": DNS_RULES}
    binding = {
        **version,
        "kind": "ClusterRoleBinding",
        "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": DNS_USER},
        "subjects": [{"apiGroup": group, "kind": "User", "name": DNS_USER}],
    }
    for plural, manifest in (("clusterroles", role), ("clusterrolebindings", binding)):
        status, answer = cluster.ask("POST", f"/apis/{group}/v1/{plural}", manifest)
        if status not in (http.HTTPStatus.CREATED, http.HTTPStatus.CONFLICT):
            raise UserError(f"the API server refuses {plural}/{DNS_USER}: {answer}")


# ------------------------------------------------------------------------------------ the settings


def _containerd(folder: Path) -> str:
    """Return containerd's settings; its folders are the usual ones, below the node's own /var."""
    cri = 'plugins."io.containerd.grpc.v1.cri"'
    return f"""
version = 2
[grpc]
address = "{socket_path(folder)}"
[{cri}]
sandbox_image = "{PAUSE}"
# Without CAP_SYS_RESOURCE runc dies of a score below its own.
restrict_oom_score_adj = true
[{cri}.containerd]
snapshotter = "overlayfs"
default_runtime_name = "runc"
[{cri}.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[{cri}.containerd.runtimes.runc.options]
SystemdCgroup = false
[{cri}.cni]
bin_dir = "{CNI_PLUGINS}"
conf_dir = "{folder}/cni"
"""


def _cni(network: Network) -> dict[str, Any]:
    """Return the pods' network: a link per pod, so that every packet between pods is routed.

    On a bridge the answer of a pod behind a Service would take the short way and never be
    translated back, unless bridged packets are filtered, which is a setting of the whole machine.
    """
    ipam = {
        "type": "host-local",
        "dataDir": "/run/cni-addresses",
        "ranges": [[{"subnet": network.pods}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    return {
        "cniVersion": "1.0.0",
        "name": "forebay",
        "plugins": [{"type": "ptp", "ipMasq": False, "ipam": ipam}],
    }


def _kubelet(folder: Path, network: Network) -> dict[str, Any]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": network.node,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": f"{folder}/kubelet-client.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "containerRuntimeEndpoint": f"unix://{socket_path(folder)}",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{network.link}",
        "clusterDNS": [network.node],
        "clusterDomain": DOMAIN,
        # Pods resolve the cluster's names only, and no question leaves the machine.
        "resolvConf": "",
        "enforceNodeAllocatable": [],
        "evictionHard": {"memory.available": "50Mi", "nodefs.available": "1%"},
        "imageGCHighThresholdPercent": 100,  # images that cannot be pulled again stay
        "failSwapOn": False,
        "healthzPort": 0,
        "readOnlyPort": 0,
        "serverTLSBootstrap": False,
        "nodeStatusReportFrequency": "10s",
        "syncFrequency": "10s",
        "volumePluginDir": "/var/lib/kubelet/volume-plugins",
    }


def _kube_proxy(folder: Path, network: Network) -> dict[str, Any]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "hostnameOverride": NAME,
        "clientConnection": {"kubeconfig": f"{folder}/kube_proxy.kubeconfig"},
        # Who is not a pod, this machine for example, gets the node's address towards pods.
        "clusterCIDR": network.pods,
        # The table of connections is the whole machine's.
        "conntrack": {
            "maxPerCore": 0,
            "min": 0,
            "tcpEstablishedTimeout": "0s",
            "tcpCloseWaitTimeout": "0s",
        },
        "nftables": {"minSyncPeriod": "0s"},
        "metricsBindAddress": "127.0.0.1:10249",
        "healthzBindAddress": "",
    }


def _corefile(folder: Path, network: Network) -> str:
    return f""".:53 {{
    bind {network.node}
    errors
    ready {network.node}:{READY_PORT}
    kubernetes {DOMAIN} in-addr.arpa {{
        kubeconfig {folder}/dns.kubeconfig
    }}
}}
"""
