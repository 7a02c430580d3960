"""hack/kind-up's own steps. Docker and kind are stand-ins that note how they are called."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "hack" / "kind-up"
STAND_IN = """#!/bin/sh
echo "$(basename "$0") $1 $2" >> {calls}
{body}
"""
NAMES = [f"localhost/forebay/{name}:0.1.0" for name in ("operator", "epp", "sim")]


@pytest.fixture
def run(tmp_path):
    """Run hack/kind-up where docker and kind do as told; return its end and the calls."""
    calls = tmp_path / "calls"

    def start(*arguments: str, docker: str = "", kind: str = ""):
        programs = tmp_path / "bin"
        programs.mkdir()
        for name, body in (("docker", docker), ("kind", kind)):
            (programs / name).write_text(STAND_IN.format(calls=calls, body=body))
            (programs / name).chmod(0o755)
        environment = os.environ | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "FOREBAY_CACHE": str(tmp_path / "cache"),
        }
        done = subprocess.run(
            [PROGRAM, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        return done, [line.strip() for line in calls.read_text().splitlines()]

    return start


def test_a_new_cluster_gets_the_images(run, tmp_path):
    """Without a cluster one is made; then the images are built and loaded."""
    done, calls = run(kind='[ "$1" != load ] || echo "$@" >&2')

    assert done.returncode == 0, done.stderr
    assert done.stdout == f"export KUBECONFIG={tmp_path}/cache/kind-forebay.kubeconfig\n"
    assert [call for call in calls if call != "docker info"] == [
        "kind get clusters",
        "kind create cluster",
        *["docker build --file"] * 3,
        "kind load docker-image",
    ]
    assert f"load docker-image --name forebay {' '.join(NAMES)}" in done.stderr


def test_a_running_cluster_is_used_again(run):
    """A cluster of that name is kept, and gets the images as they are now."""
    done, calls = run(kind='[ "$1" != get ] || echo forebay')

    assert done.returncode == 0, done.stderr
    assert "kind export kubeconfig" in calls
    assert "kind create cluster" not in calls
    assert "kind load docker-image" in calls


def test_a_failed_build_loads_nothing(run):
    """When an image is not built, that is the end."""
    done, calls = run(docker='[ "$1" != build ]')

    assert done.returncode == 1
    assert "kind load docker-image" not in calls


def test_without_docker_it_names_the_other_way(run):
    """A docker that reaches no engine is refused before anything is made."""
    done, calls = run(docker="exit 1")

    assert done.returncode == 1
    assert "hack/local-cluster" in done.stderr
    assert calls == ["docker info"]


def test_delete_ends_the_cluster(run):
    """`--delete` deletes, and makes nothing."""
    done, calls = run("--delete")

    assert done.returncode == 0, done.stderr
    assert calls == ["docker info", "kind delete cluster"]
