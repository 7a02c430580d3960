"""The cluster's own programs, compiled once and kept outside the tree.

A build is known by the content of its sources, so another version of them is another folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.files import locked
from cluster.needs import UserError, require, say

if TYPE_CHECKING:
    from collections.abc import Callable

PROGRAMS = Path(__file__).with_name("programs")
KUBERNETES = PROGRAMS / "kubernetes"
KUBERNETES_NAMES = (
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kube-proxy",
    "kubelet",
)
NODE = PROGRAMS / "node"
NODE_PROGRAMS = ("coredns", "pause")


def cache() -> Path:
    """Return the folder that keeps what takes long to make."""
    return Path(os.environ.get("FOREBAY_CACHE") or "~/.cache/forebay").expanduser()


def kubernetes() -> Path:
    """Return the folder of the Kubernetes binary's five names; build it unless it exists."""
    return _built(KUBERNETES, ("main.go",), KUBERNETES_NAMES, _compile_kubernetes)


def node_programs() -> Path:
    """Return the folder of CoreDNS and the pause program; build them unless they exist."""
    sources = tuple(f"{name}/main.go" for name in NODE_PROGRAMS)
    return _built(NODE, sources, NODE_PROGRAMS, _compile_node_programs)


def _built(
    module: Path, sources: tuple[str, ...], names: tuple[str, ...], make: Callable[[Path], None]
) -> Path:
    digests = [
        hashlib.sha256((module / name).read_bytes()).digest()
        for name in (*sources, "go.mod", "go.sum")
    ]
    key = hashlib.sha256(b"".join(digests)).hexdigest()[:16]
    folder = cache() / f"{module.name}-{key}"

    def complete() -> bool:
        return all((folder / name).exists() for name in names)

    if not complete():
        with locked(folder):
            if not complete():
                make(folder)
    return folder


def _compile_kubernetes(folder: Path) -> None:
    text = (KUBERNETES / "go.mod").read_text()
    found = re.search(r"k8s\.io/kubernetes (v(\d+)\.(\d+)\S*)", text)
    if found is None:
        raise UserError(f"{KUBERNETES}/go.mod does not require k8s.io/kubernetes")
    # A plain `go build` leaves the version v0.0.0, which clients that compare versions refuse.
    stamps = zip(("gitVersion", "gitMajor", "gitMinor"), found.groups(), strict=True)
    flags = " ".join(f"-X k8s.io/component-base/version.{key}={value}" for key, value in stamps)
    say(f"building Kubernetes {found[1]} (about five minutes on 2 cores) ...")
    _compile(KUBERNETES, ".", folder / "kubernetes", flags)
    for name in KUBERNETES_NAMES:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("kubernetes")


def _compile_node_programs(folder: Path) -> None:
    say("building CoreDNS (about two minutes on 2 cores) ...")
    for name in NODE_PROGRAMS:
        _compile(NODE, f"./{name}", folder / name)


def _compile(module: Path, package: str, binary: Path, flags: str = "") -> None:
    go = require("go")
    began_at = time.monotonic()
    new = binary.with_suffix(".new")
    try:
        subprocess.run(
            [go, "build", "-trimpath", "-ldflags", f"-s -w {flags}", "-o", new, package],
            cwd=module,
            env={**os.environ, "CGO_ENABLED": "0"},
            stdout=sys.stderr,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        raise UserError("go build has failed, see above") from error
    new.replace(binary)
    say(f"built {binary} in {time.monotonic() - began_at:.0f} s")
