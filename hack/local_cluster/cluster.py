"""A cluster as a folder: its processes with their ports, keys, kubeconfigs, data and logs."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import secrets
import shutil
import signal
import ssl
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from local_cluster import builds, control_plane, keys, node
from local_cluster.files import write_private
from local_cluster.needs import UserError, require, say
from local_cluster.network import Network
from local_cluster.processes import LOOPBACK, Process, free_port

if TYPE_CHECKING:
    from collections.abc import Callable

START_SECONDS = 60.0
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

# In the order of their start: what starts a process, and what tells that it does its work.
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


class Cluster:
    """One folder with a cluster. Its methods expect the folder to be locked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._state_file = folder / "state.json"
        self.kubeconfig = folder / "kubeconfig"
        self._state: dict[str, Any] = {}
        if self._state_file.exists():
            self._state = json.loads(self._state_file.read_text())

    # State

    @property
    def exists(self) -> bool:
        """Tell whether the folder holds a cluster, running or not."""
        return bool(self._state)

    @property
    def options(self) -> dict[str, bool]:
        """What the cluster was made with: audit, controller_manager, node."""
        return self._state["options"]

    @property
    def ports(self) -> dict[str, int]:
        """The ports of api, etcd and etcd_peer."""
        return self._state["ports"]

    @property
    def network(self) -> Network | None:
        """The addresses around the node; None without a node."""
        number = self._state.get("network")
        return None if number is None else Network(number)

    @property
    def api_host(self) -> str:
        """The address that the API server listens on."""
        return self.network.host if self.network else LOOPBACK

    def binary(self, name: str) -> str:
        """Return the path of one of Kubernetes' programs."""
        return str(Path(self._state["binaries"]) / name)

    def runs(self, name: str) -> bool:
        """Tell whether the component's process runs."""
        process = self._process(name)
        return process is not None and process.runs()

    def _wants(self, name: str) -> bool:
        match name:
            case "kube-controller-manager":
                return self.options["controller_manager"]
            case "kube-scheduler" | "node":
                return self.options["node"]
        return True

    def _process(self, name: str) -> Process | None:
        recorded = self._state["processes"].get(name)
        return Process(recorded["pid"], recorded["start_ticks"]) if recorded else None

    def _save(self) -> None:
        write_private(self._state_file, json.dumps(self._state, indent=2) + "\n")

    def create(self, port: int, options: dict[str, bool]) -> None:
        """Write what a new cluster needs before its first start.

        Raises:
            UserError: the folder holds something else, which `down` would remove.
        """
        if any(self.folder.iterdir()):
            raise UserError(f"{self.folder} is neither empty nor a cluster: choose another one")
        binaries = builds.kubernetes()
        tokens = {name: secrets.token_urlsafe(32) for name in USERS}
        lines = (
            f'{tokens[key]},{user},{user},"{groups}"\n' for key, (user, groups) in USERS.items()
        )
        write_private(self.folder / "tokens.csv", "".join(lines))
        write_private(self.folder / "service-accounts.key", keys.signing_key())
        policy = json.dumps(control_plane.AUDIT_POLICY)
        write_private(self.folder / "audit-policy.json", policy)
        self._state = {
            "options": options,
            "ports": {"api": port or free_port(), "etcd": free_port(), "etcd_peer": free_port()},
            "tokens": tokens,
            "binaries": str(binaries),
            "processes": {},
        }
        if options["node"]:
            keys.write_kubelet_client(self.folder)
            self._state["network"] = Network.take(self.folder).number
        self._save()

    def expect(self, port: int, options: dict[str, bool]) -> None:
        """Check that the present cluster is as asked for.

        Raises:
            UserError: it lacks an option or has another port.
        """
        lacking = [name for name, on in options.items() if on and not self.options[name]]
        if port and port != self.ports["api"]:
            lacking.append("port")
        if "node" in lacking:
            raise UserError(f"the cluster in {self.folder} has no node: take it down first")
        if lacking:
            flags = ", ".join("--" + name.replace("_", "-") for name in lacking)
            raise UserError(
                f"the cluster in {self.folder} was made without this {flags}: take it down first"
            )

    # Life

    def start(self) -> None:
        """Start what does not run; return when the API answers."""
        if self.network:
            self.network.up(self.folder)
        for name in COMPONENTS:
            if self._wants(name):
                self.start_component(name)

    def stop(self) -> None:
        """End every process, the last started first, and what they made outside the folder."""
        for name in reversed(COMPONENTS):
            self.stop_component(name)
        if self.network:
            node.clear(self)
            self.network.down(self.folder)

    def stop_component(self, name: str, first_signal: signal.Signals = signal.SIGTERM) -> None:
        """End one process and return when it has ended."""
        process = self._process(name)
        if process is not None:
            process.end(first_signal)
            del self._state["processes"][name]
            self._save()

    def start_component(self, name: str) -> None:
        """Start one process unless it runs; return when it does its work.

        Raises:
            UserError: it ends, or is not ready in time; quotes its log.
        """
        if self.runs(name):
            return
        start, ready = COMPONENTS[name]
        began_at = time.monotonic()
        process = start(self)
        self._state["processes"][name] = {"pid": process.pid, "start_ticks": process.started}
        self._save()
        while not ready(self):
            ended = not process.runs()
            if ended or time.monotonic() > began_at + START_SECONDS:
                log = self.log(name)
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                why = "has ended" if ended else f"is not ready after {START_SECONDS:.0f} s"
                raise UserError(f"{name} {why}; {log} ends with\n{tail}")
            time.sleep(POLL_SECONDS)
        say(f"{name} is ready after {time.monotonic() - began_at:.1f} s")

    def remove(self) -> None:
        """End every process and remove the folder."""
        self.stop()
        shutil.rmtree(self.folder)

    def log(self, name: str) -> Path:
        """Return the component's log file."""
        return self.folder / f"{name}.log"

    # etcd's data

    def snapshot(self, file: Path) -> None:
        """Save all data to the file."""
        self._etcdctl(f"--endpoints={control_plane.etcd_url(self)}", "snapshot", "save", str(file))

    def restore(self, file: Path) -> None:
        """Go back to the data in the file.

        Everything restarts: a watch knows revisions that the restored data never had.
        """
        restored = self.folder / "etcd.restored"
        shutil.rmtree(restored, ignore_errors=True)
        self._etcdctl("snapshot", "restore", str(file), f"--data-dir={restored}")
        self.stop()
        shutil.rmtree(self.folder / "etcd")
        restored.rename(self.folder / "etcd")
        self.start()

    def _etcdctl(self, *arguments: str) -> None:
        done = subprocess.run(
            ["env", "ETCDCTL_API=3", require("etcdctl"), *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            why = done.stderr.strip().rpartition("\n")[2]
            raise UserError(f"etcdctl {' '.join(arguments)}: {why}")

    # The API, as its administrator

    @property
    def certificate(self) -> Path:
        """What clients trust the API server by."""
        return self.folder / "certificates" / "apiserver.crt"

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """Return HTTP status and answer; status 0 while nobody answers."""
        try:
            context = ssl.create_default_context(cafile=self.certificate)
        except (FileNotFoundError, ssl.SSLError):
            return 0, None  # not there yet, or half written
        headers = {
            "Authorization": f"Bearer {self._state['tokens']['admin']}",
            "Content-Type": "application/json",
        }
        connection = http.client.HTTPSConnection(
            self.api_host, self.ports["api"], timeout=5, context=context
        )
        with contextlib.closing(connection):
            try:
                connection.request(method, path, body and json.dumps(body), headers)
                answer = connection.getresponse()
                text = answer.read()
            except (OSError, http.client.HTTPException):
                return 0, None
        is_json = answer.headers.get_content_type() == "application/json"
        return answer.status, json.loads(text) if is_json else text

    def write_kubeconfig(self, path: Path, user: str) -> None:
        """Write a kubeconfig of one of USERS; its JSON is YAML as well."""
        authority = base64.b64encode(self.certificate.read_bytes()).decode()
        server = f"https://{self.api_host}:{self.ports['api']}"
        name = "forebay"
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {
                    "name": name,
                    "cluster": {"server": server, "certificate-authority-data": authority},
                }
            ],
            "users": [{"name": name, "user": {"token": self._state["tokens"][user]}}],
            "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
            "current-context": name,
        }
        write_private(path, json.dumps(config, indent=2) + "\n")
