"""A Kubernetes API server for tests: hack/local-cluster in a folder of its own, or another's."""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import urlencode, urlsplit

import pytest
from ext_proc_peer import until

from forebay_operator.resources import BY_NAME

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAM = Path(__file__).parents[2] / "hack" / "local-cluster"
CRDS = PROGRAM.parents[1] / "crds"
OTHER_CLUSTER = "FOREBAY_KUBECONFIG"
# The first start on a machine builds Kubernetes.
BUILD_SECONDS = 1800
COMMAND_SECONDS = 120
STRICT = "fieldValidation=Strict"  # as kubectl asks
APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
# Kinds that tests look at over and over again: kubectl takes 0.07 s of CPU time for each look.
PATHS = {
    "fcp": ("apis/forebay.dev/v1alpha1", "flowcontrolpolicies"),
    "inferencemodel": ("apis/inference.networking.x-k8s.io/v1alpha2", "inferencemodels"),
    "pod": ("api/v1", "pods"),
    "pods": ("api/v1", "pods"),
    "secret": ("api/v1", "secrets"),
    "configmap": ("api/v1", "configmaps"),
    "events": ("api/v1", "events"),
    "deployment": ("apis/apps/v1", "deployments"),
    "lease": ("apis/coordination.k8s.io/v1", "leases"),
    "service": ("api/v1", "services"),
}
PROVIDERS = {
    "kubectl": "kubernetes-client",
    "etcd": "etcd-server",
    "etcdctl": "etcd-client",
    "go": "golang 1.24 or newer",
    "faketime": "faketime",
}
NODE_PROVIDERS = {
    "containerd": "containerd",
    "runc": "runc",
    "nft": "nftables",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "ip": "iproute2",
    "openssl": "openssl",
    "buildah": "buildah",
    "mmdebstrap": "mmdebstrap",
}


_GET = argparse.ArgumentParser(exit_on_error=False)
_GET.add_argument("kind")
_GET.add_argument("name", nargs="*")
_GET.add_argument("-n", "--namespace", required=True)
_GET.add_argument("-l", dest="labels", default="")
_GET.add_argument("--field-selector", dest="fields", default="")


def need(*programs: str) -> None:
    """Skip the test when a program is missing; fail it where CI is to have everything."""
    providers = PROVIDERS | NODE_PROVIDERS
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        names = ", ".join(f"{name} ({providers[name]})" for name in missing)
        end_for_lack_of(names)


def need_node() -> None:
    """Skip the test where no node can run; fail it where CI is to have everything."""
    if sys.platform != "linux" or os.geteuid():
        end_for_lack_of("Linux and root, for a node")
    need(*NODE_PROVIDERS)


def end_for_lack_of(what: str) -> NoReturn:
    """Skip the test, or fail it in CI."""
    end = pytest.fail if "CI" in os.environ else pytest.skip
    end(f"missing on this machine: {what}")


def local_cluster(
    command: str, folder: Path, *arguments: str, check=True, timeout_seconds=COMMAND_SECONDS
) -> subprocess.CompletedProcess:
    """Run hack/local-cluster on the cluster in the folder."""
    return run(
        [str(PROGRAM), command, "--dir", str(folder), *arguments], None, check, timeout_seconds
    )


def run(command, text, check, timeout_seconds) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, check=False, timeout=timeout_seconds
    )
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done


class ApiServer:
    """Access to a cluster as its administrator."""

    def __init__(self, kubeconfig: Path, caches: Path, folder: Path | None = None) -> None:
        """Use the kubeconfig; the folder is that of hack/local-cluster, None for another's."""
        self.kubeconfig = kubeconfig
        self._caches = caches
        self._dir = folder
        self._idle: dict[ssl.SSLContext, list[http.client.HTTPSConnection]] = {}

    def close(self) -> None:
        """End the connections that are kept for the next request."""
        for connections in self._idle.values():
            for connection in connections:
                connection.close()

    @property
    def owned(self) -> bool:
        """Whether the cluster is one of hack/local-cluster."""
        return self._dir is not None

    @property
    def dir(self) -> Path:
        """The cluster's folder; skips the test when the cluster is another's."""
        if self._dir is None:
            pytest.skip(f"the cluster of {OTHER_CLUSTER} is not ours to restart or look into")
        return self._dir

    # As a client

    def kubectl(self, *args: str, input: str | None = None, check=True):  # noqa: A002  # as in subprocess
        """Run kubectl; with check, an exit status other than 0 fails the test with its stderr."""
        options = (f"--kubeconfig={self.kubeconfig}", f"--cache-dir={self._caches}")
        return run(["kubectl", *options, *args], input, check, COMMAND_SECONDS)

    def get(self, *args: str) -> dict:
        """Return what `kubectl get` of these arguments finds; a kind of PATHS without kubectl."""
        if args[0] not in PATHS:
            return json.loads(self.kubectl("get", "-o", "json", *args).stdout)
        asked = _GET.parse_args(args)
        group, plural = PATHS[asked.kind]
        path = "/".join((f"/{group}/namespaces/{asked.namespace}", plural, *asked.name))
        selectors = {"labelSelector": asked.labels, "fieldSelector": asked.fields}
        status, answer = self.ask("GET", f"{path}?{urlencode(selectors)}")
        assert status == 200, answer
        return answer

    def apply(self, manifest: Path | str, *options: str) -> None:
        """Apply a file, a folder or YAML text on the server's side."""
        path, text = (str(manifest), None) if isinstance(manifest, Path) else ("-", manifest)
        self.kubectl("apply", "--server-side", *options, "-f", path, input=text)

    def make_namespace(self, name: str) -> str:
        """Make a namespace in which pods can be created; return its name."""
        status, answer = self.ask("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
        assert status == 201, answer
        # Pods are refused until the controllers have made the namespace's account.
        account = f"/api/v1/namespaces/{name}/serviceaccounts/default"
        until(lambda: self.ask("GET", account)[0] == 200, 90)
        return name

    def leave_namespace(self, name: str) -> None:
        """Begin to delete a namespace."""
        status, answer = self.ask("DELETE", f"/api/v1/namespaces/{name}")
        assert status == 200, answer

    def apply_crds(self) -> None:
        """Install the project's CRDs."""
        self.apply(CRDS)
        for file in CRDS.glob("*.yaml"):
            group, _, plural = file.stem.rpartition("_")
            self.wait_established(f"{plural}.{group}")

    def wait_established(self, crd: str) -> None:
        """Wait until the API serves a custom resource, named as plural.group."""
        # kubectl wait would fail on a CRD that has no conditions yet.
        until(lambda: self._established(crd), 60)
        spec = self._crd(crd)["spec"]
        for version in spec["versions"]:
            if version["served"]:
                # Discovery, from which clients learn the paths, follows the condition.
                path = f"/apis/{spec['group']}/{version['name']}"
                until(lambda path=path: self._serves(path, spec["names"]["plural"]), 60)

    def _established(self, crd: str) -> bool:
        conditions = self._crd(crd).get("status", {}).get("conditions") or ()
        return any(
            each["type"] == "Established" and each["status"] == "True" for each in conditions
        )

    def _crd(self, name: str) -> dict:
        path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}"
        status, answer = self.ask("GET", path)
        assert status == 200, answer
        return answer

    def _serves(self, path: str, plural: str) -> bool:
        status, found = self.ask("GET", path)
        return status == 200 and any(each["name"] == plural for each in found["resources"])

    @cached_property
    def _config(self) -> dict:
        view = self.kubectl("config", "view", "--raw", "--minify", "--flatten", "-o", "json")
        return json.loads(view.stdout)

    @property
    def url(self) -> str:
        return self._config["clusters"][0]["cluster"]["server"]

    @property
    def token(self) -> str:
        """The administrator's bearer token; skips the test when the kubeconfig has none."""
        token = self._config["users"][0]["user"].get("token")
        if token is None:
            pytest.skip(f"the kubeconfig of {OTHER_CLUSTER} has no token")
        return token

    @property
    def _authority(self) -> str:
        data = self._config["clusters"][0]["cluster"]["certificate-authority-data"]
        return base64.b64decode(data).decode()

    @cached_property
    def _trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cadata=self._authority)

    @cached_property
    def _administrator(self) -> tuple[ssl.SSLContext, str]:
        """TLS and the token of the kubeconfig's user; kind's has a certificate and no token."""
        user = self._config["users"][0]["user"]
        if "client-certificate-data" not in user:
            return self._trust, self.token
        context = ssl.create_default_context(cadata=self._authority)
        with tempfile.NamedTemporaryFile() as pair:
            for part in ("client-certificate-data", "client-key-data"):
                pair.write(base64.b64decode(user[part]))
            pair.flush()
            context.load_cert_chain(pair.name)
        return context, ""

    def ask(
        self,
        method: str,
        path: str,
        body: dict | None = None,
        content: str = "application/json",
        token: str = "",
    ) -> tuple[int, dict]:
        """Make one request without kubectl, which is slow; return HTTP status and answer.

        Connections are kept: a handshake takes four times the CPU time of a request.
        """
        where = urlsplit(self.url)
        context, token = (self._trust, token) if token else self._administrator
        headers = {"Content-Type": content}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        idle = self._idle.setdefault(context, [])
        request = (method, path, json.dumps(body), headers)
        while idle:
            # The server may have ended it meanwhile, or have been restarted.
            with contextlib.suppress(OSError, http.client.HTTPException):
                return self._exchange(idle, idle.pop(), request)
        connection = http.client.HTTPSConnection(
            where.hostname, where.port, context=context, timeout=60
        )
        return self._exchange(idle, connection, request)

    @staticmethod
    def _exchange(idle, connection, request) -> tuple[int, dict]:
        """Make a request on a connection, which is idle afterwards."""
        try:
            connection.request(*request)
            response = connection.getresponse()
            text = response.read()
        except BaseException:
            connection.close()
            raise
        idle.append(connection)
        is_json = response.headers.get_content_type() == "application/json"
        # A path of no API group is answered in plain text.
        return response.status, json.loads(text) if is_json else {"message": text.decode()}

    # As its owner

    def restart_apiserver(self, *, kill: bool = False) -> None:
        """Stop the API server and start it again, on its port, with its data."""
        local_cluster("restart-apiserver", self.dir, *["--kill"][: int(kill)])

    def stop_apiserver(self, *, kill: bool = False) -> None:
        local_cluster("stop-apiserver", self.dir, *["--kill"][: int(kill)])

    def start_apiserver(self) -> None:
        local_cluster("start-apiserver", self.dir)

    def snapshot(self, file: Path) -> None:
        """Save the cluster's data."""
        need("etcdctl")
        local_cluster("etcd-snapshot", self.dir, str(file))

    def restore(self, file: Path) -> None:
        """Go back to saved data, as an administrator would restore a backup."""
        need("etcdctl")
        local_cluster("etcd-restore", self.dir, str(file))


class Namespace:
    """A namespace that is asked directly."""

    def __init__(self, cluster: ApiServer, name: str) -> None:
        self.cluster, self.name = cluster, name

    def path(self, manifest: dict) -> str:
        """Where objects of the manifest's kind are."""
        kind = BY_NAME[manifest["apiVersion"], manifest["kind"]]
        root = "apis" if kind.group else "api"
        return f"/{root}/{kind.api_version}/namespaces/{self.name}/{kind.plural}"

    def judge(self, manifest: dict) -> tuple[int, dict]:
        """Return the HTTP status and answer to a manifest, which changes nothing."""
        return self.cluster.ask("POST", f"{self.path(manifest)}?dryRun=All&{STRICT}", manifest)

    def create(self, manifest: dict) -> dict:
        status, answer = self.cluster.ask("POST", self.path(manifest), manifest)
        assert status == 201, answer
        return answer

    def apply(self, manifest: dict, part: str = "", manager: str = "test&force=true") -> dict:
        """Apply an object, or its status, on the server's side."""
        path = f"{self.path(manifest)}/{manifest['metadata']['name']}{part}"
        query = f"fieldManager={manager}&{STRICT}"
        status, answer = self.cluster.ask("PATCH", f"{path}?{query}", manifest, APPLY)
        assert status in (200, 201), answer
        return answer


def error_fields(answer: dict) -> set[str]:
    """The fields that an error of the API server names."""
    causes = answer.get("details", {}).get("causes", [])
    # "<nil>": rules that could not be looked at because of the other errors.
    named = {cause["field"] for cause in causes if cause.get("field", "<nil>") != "<nil>"}
    return named | set(re.findall('unknown field "(.*?)"', answer["message"]))


@contextlib.contextmanager
def running(folder: Path, *options: str, node: bool = False) -> Iterator[ApiServer]:
    """Run a cluster in the folder, which must be empty, or use the one of FOREBAY_KUBECONFIG.

    Options are those of `hack/local-cluster up`. Pods run with a node only.
    """
    caches = folder.with_name(f"{folder.name}-kubectl")
    other = os.environ.get(OTHER_CLUSTER)
    if other:
        need("kubectl")
        with contextlib.closing(ApiServer(Path(other), caches)) as server:
            yield server
        return
    need("kubectl", "etcd", "go")
    if node:
        need_node()
    else:
        options = ("--control-plane-only", *options)
    try:
        local_cluster("up", folder, *options, timeout_seconds=BUILD_SECONDS)
        with contextlib.closing(ApiServer(folder / "kubeconfig", caches, folder)) as server:
            yield server
    finally:
        local_cluster("down", folder)


def load_images(cluster: ApiServer) -> None:
    """Build the project's images and give them to a cluster with a node; another's has them."""
    if cluster.owned:
        command = [str(PROGRAM.with_name("images")), "--load-into", str(cluster.dir)]
        run(command, None, check=True, timeout_seconds=BUILD_SECONDS)
