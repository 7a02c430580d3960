"""A cluster as a folder: what state.json remembers of it, and its API as the administrator.

Starting and ending it is lifecycle.py's.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import ssl
from pathlib import Path
from typing import Any

from cluster.files import write_private
from cluster.network import Network
from cluster.processes import LOOPBACK, Process


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
        """Return whether the folder holds a cluster, running or not."""
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
        """Return whether the component's process runs."""
        process = self.process(name)
        return process is not None and process.runs()

    def process(self, name: str) -> Process | None:
        """Return the component's process as it was recorded; None when it was ended."""
        recorded = self._state["processes"].get(name)
        return Process(recorded["pid"], recorded["start_ticks"]) if recorded else None

    def record(self, name: str, process: Process | None) -> None:
        """Remember the component's process; None: it was ended."""
        self._state["processes"].pop(name, None)
        if process is not None:
            recorded = {"pid": process.pid, "start_ticks": process.started}
            self._state["processes"][name] = recorded
        self._save()

    def begin(self, state: dict[str, Any]) -> None:
        """Make the folder a cluster with this state."""
        self._state = state
        self._save()

    def _save(self) -> None:
        write_private(self._state_file, json.dumps(self._state, indent=2) + "\n")

    def log(self, name: str) -> Path:
        """Return the component's log file."""
        return self.folder / f"{name}.log"

    # The API, as its administrator

    @property
    def certificate(self) -> Path:
        """The CA by which clients trust the API server."""
        return self.folder / "certificates" / "apiserver.crt"

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """Return HTTP status and answer; status 0 while there is no answer."""
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
