"""The first process of a node, in namespaces of its own: `node_init.py FOLDER`.

It furnishes the file system, starts the node's programs in order and waits. When one of them ends
it ends too, and with it everything in the namespaces.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

START_SECONDS = 30.0
# What the kubelet wants of the kernel. It finds it in files laid over the real ones, which are the
# whole machine's.
KERNEL = {
    "vm/overcommit_memory": 1,
    "vm/panic_on_oom": 0,
    "kernel/panic": 10,
    "kernel/panic_on_oops": 1,
    "kernel/keys/root_maxkeys": 1_000_000,
    "kernel/keys/root_maxbytes": 25_000_000,
}


def mount(*arguments: str | Path) -> None:
    """Mount something for the node alone."""
    subprocess.run(["mount", *arguments], check=True)


def furnish(folder: Path) -> None:
    """Give the node /run and /var of its own, and a kernel as the kubelet likes it."""
    # The folder may be below either: it keeps its path.
    mount("--bind", folder, "/mnt")
    own = Path("/mnt/var")
    for name in ("lib", "log", "tmp"):
        (own / name).mkdir(parents=True, exist_ok=True)
    if not (own / "run").is_symlink():
        (own / "run").symlink_to("/run")
    mount("--bind", own, "/var")
    mount("-t", "tmpfs", "-o", "mode=755", "run", "/run")
    folder.mkdir(parents=True, exist_ok=True)
    mount("--move", "/mnt", folder)
    for name, value in KERNEL.items():
        file = Path("/run/kernel") / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{value}\n")
        mount("--bind", file, Path("/proc/sys") / name)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def accepts(path: str) -> bool:
    """Return whether a process listens on the socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
    return True


def main() -> None:
    """Run the node."""
    folder = Path(sys.argv[1])
    os.umask(0o022)  # the roots of containers are for users other than root too
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    settings = json.loads((folder / "node.json").read_text())
    furnish(folder)
    names = {}

    def start(name: str) -> int:
        with (folder / f"{name}.log").open("a") as log:
            # In the folder's own file system, never in the machine's.
            child = subprocess.Popen(
                settings["commands"][name], stdout=log, stderr=log, start_new_session=True
            )
        names[child.pid] = name
        return child.pid

    start("containerd")
    deadline_at = time.monotonic() + START_SECONDS
    while not accepts(settings["socket"]):
        if time.monotonic() > deadline_at:
            sys.exit(f"containerd does not listen, see {folder}/containerd.log")
        time.sleep(0.02)
    subprocess.run(settings["commands"]["load-pause"], check=True)
    for name in ("kubelet", "kube-proxy", "coredns"):
        start(name)
    while True:
        # Also of the orphans that containers leave to the first process.
        pid, status = os.wait()
        if pid in names:
            sys.exit(f"{names[pid]} has ended ({status}), see {folder}/{names[pid]}.log")


if __name__ == "__main__":
    main()
