"""Pods of a cluster with a node: manifests, and looks into them."""

from __future__ import annotations

import json

import pytest

IMAGES = "localhost/forebay"
VERSION = "0.1.0"
READY_SECONDS = 90
# What a namespace that enforces PodSecurity's restricted level asks of a container.
RESTRICTED = {
    "runAsNonRoot": True,
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


def pod(name: str, image: str, **container) -> dict:
    """Return a pod of one of the project's images; labelled app=NAME."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "containers": [
                {
                    "name": "main",
                    "image": f"{IMAGES}/{image}:{VERSION}",
                    "imagePullPolicy": "Never",
                    "securityContext": RESTRICTED,
                    **container,
                }
            ],
        },
    }


def service(name: str, port: int, target_port: int, *, headless: bool = False) -> dict:
    """Return a Service for the pods labelled app=NAME; headless ones are called NAME-headless."""
    spec = {"selector": {"app": name}, "ports": [{"port": port, "targetPort": target_port}]}
    if headless:
        name, spec["clusterIP"] = f"{name}-headless", "None"
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


def apply(cluster, namespace: str, *manifests: dict) -> None:
    items = {"apiVersion": "v1", "kind": "List", "items": manifests}
    cluster.kubectl("apply", "--namespace", namespace, "-f", "-", input=json.dumps(items))


def wait_ready(cluster, namespace: str, *names: str) -> None:
    """Wait until pods are ready; fail with what they say when they do not become it."""
    for name in names:
        where = (f"pod/{name}", "--namespace", namespace)
        condition = ("--for=condition=Ready", f"--timeout={READY_SECONDS}s")
        if cluster.kubectl("wait", *condition, *where, check=False).returncode:
            told = [cluster.kubectl(*c, *where, check=False) for c in (("describe",), ("logs",))]
            pytest.fail("\n".join(done.stdout + done.stderr for done in told))


def python(cluster, namespace: str, name: str, code: str) -> str:
    """Run Python in a pod of one of the project's images; return what it prints."""
    command = ("exec", "--namespace", namespace, name, "--", "python3", "-c", code)
    return cluster.kubectl(*command).stdout
