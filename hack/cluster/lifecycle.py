"""Makes, starts, stops, saves and restores a cluster.

Every function expects the cluster's folder to be locked.
"""

from __future__ import annotations

import json
import secrets
import shutil
import signal
import subprocess
import time
from typing import TYPE_CHECKING

from cluster import builds, control_plane, keys, node
from cluster.files import write_private
from cluster.needs import UserError, require, say
from cluster.network import Network
from cluster.processes import free_port

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cluster.processes import Process
    from cluster.state import Cluster

START_SECONDS = 180.0  # five seconds on an idle machine; several may start side by side
POLL_SECONDS = 0.05
# Who may ask the API server, by the key of the token in state.json: user and groups.
USERS = {
    "admin": ("admin", "system:masters"),
    "controller_manager": ("system:kube-controller-manager", ""),
    "scheduler": ("system:kube-scheduler", ""),
    "kubelet": (f"system:node:{node.NAME}", "system:nodes"),
    "kube_proxy": ("system:kube-proxy", ""),
    "dns": (node.DNS_USER, ""),
}

# In the order of their start: the command of a process, and the check that it works.
COMPONENTS: dict[str, tuple[Callable[[Cluster], Process], Callable[[Cluster], bool]]] = {
    "etcd": (control_plane.start_etcd, control_plane.etcd_is_ready),
    "kube-apiserver": (control_plane.start_api_server, control_plane.api_is_ready),
    "kube-controller-manager": (
        control_plane.start_controller_manager,
        control_plane.controllers_are_ready,
    ),
    "kube-scheduler": (control_plane.start_scheduler, control_plane.scheduler_is_ready),
    "node": (node.start, node.is_ready),
}


def create(cluster: Cluster, port: int, options: dict[str, bool]) -> None:
    """Write what a new cluster needs before its first start.

    Raises:
        UserError: the folder holds something else, which `down` would remove.
    """
    folder = cluster.folder
    if any(folder.iterdir()):
        raise UserError(f"{folder} is neither empty nor a cluster: choose another one")
    binaries = builds.kubernetes()
    tokens = {name: secrets.token_urlsafe(32) for name in USERS}
    lines = (f'{tokens[key]},{user},{user},"{groups}"\n' for key, (user, groups) in USERS.items())
    write_private(folder / "tokens.csv", "".join(lines))
    write_private(folder / "service-accounts.key", keys.signing_key())
    write_private(folder / "audit-policy.json", json.dumps(control_plane.AUDIT_POLICY))
    state = {
        "options": options,
        "ports": {"api": port or free_port(), "etcd": free_port(), "etcd_peer": free_port()},
        "tokens": tokens,
        "binaries": str(binaries),
        "processes": {},
    }
    if options["node"]:
        keys.write_kubelet_client(folder)
        state["network"] = Network.take(folder).number
    cluster.begin(state)


def expect(cluster: Cluster, port: int, options: dict[str, bool]) -> None:
    """Check that the present cluster is as asked for.

    Raises:
        UserError: it lacks an option or has another port.
    """
    folder = cluster.folder
    lacking = [name for name, on in options.items() if on and not cluster.options[name]]
    if port and port != cluster.ports["api"]:
        lacking.append("port")
    if "node" in lacking:
        raise UserError(f"the cluster in {folder} has no node: take it down first")
    if lacking:
        flags = ", ".join("--" + name.replace("_", "-") for name in lacking)
        raise UserError(
            f"the cluster in {folder} was made without this {flags}: take it down first"
        )


def start(cluster: Cluster) -> None:
    """Start what does not run; return when the API answers."""
    if cluster.network:
        cluster.network.up(cluster.folder)
    for name in COMPONENTS:
        if _is_wanted(cluster, name):
            start_component(cluster, name)


def stop(cluster: Cluster) -> None:
    """End every process, the last started first, and what they made outside the folder."""
    for name in reversed(COMPONENTS):
        stop_component(cluster, name)
    if cluster.network:
        node.clear(cluster)
        cluster.network.down(cluster.folder)


def remove(cluster: Cluster) -> None:
    """End every process and remove the folder."""
    stop(cluster)
    shutil.rmtree(cluster.folder)


def stop_component(
    cluster: Cluster, name: str, first_signal: signal.Signals = signal.SIGTERM
) -> None:
    """End one process and return when it has ended."""
    process = cluster.process(name)
    if process is not None:
        process.end(first_signal)
        cluster.record(name, None)


def start_component(cluster: Cluster, name: str) -> None:
    """Start one process unless it runs; return when it does its work.

    Raises:
        UserError: it ends, or is not ready in time; quotes its log.
    """
    if cluster.runs(name):
        return
    start_process, is_ready = COMPONENTS[name]
    began_at = time.monotonic()
    process = start_process(cluster)
    cluster.record(name, process)
    while not is_ready(cluster):
        ended = not process.runs()
        if ended or time.monotonic() > began_at + START_SECONDS:
            log = cluster.log(name)
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            why = "has ended" if ended else f"is not ready after {START_SECONDS:.0f} s"
            raise UserError(f"{name} {why}; {log} ends with\n{tail}")
        time.sleep(POLL_SECONDS)
    say(f"{name} is ready after {time.monotonic() - began_at:.1f} s")


def _is_wanted(cluster: Cluster, name: str) -> bool:
    match name:
        case "kube-controller-manager":
            return cluster.options["controller_manager"]
        case "kube-scheduler" | "node":
            return cluster.options["node"]
    return True


def snapshot(cluster: Cluster, file: Path) -> None:
    """Save all of etcd's data to the file."""
    _etcdctl(f"--endpoints={control_plane.etcd_url(cluster)}", "snapshot", "save", str(file))


def restore(cluster: Cluster, file: Path) -> None:
    """Go back to the data in the file.

    Everything restarts: a watch knows revisions that the restored data never had.
    """
    restored = cluster.folder / "etcd.restored"
    shutil.rmtree(restored, ignore_errors=True)
    _etcdctl("snapshot", "restore", str(file), f"--data-dir={restored}")
    stop(cluster)
    shutil.rmtree(cluster.folder / "etcd")
    restored.rename(cluster.folder / "etcd")
    start(cluster)


def _etcdctl(*arguments: str) -> None:
    done = subprocess.run(
        ["env", "ETCDCTL_API=3", require("etcdctl"), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        why = done.stderr.strip().rpartition("\n")[2]
        raise UserError(f"etcdctl {' '.join(arguments)}: {why}")
