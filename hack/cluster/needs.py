"""What the user can fix, and the programs that must be installed."""

from __future__ import annotations

import shutil
import sys

DEBIAN = "on Debian, apt-get install "
SOURCES = {
    "buildah": DEBIAN + "buildah",
    "conntrack": DEBIAN + "conntrack",
    "containerd": DEBIAN + "containerd",
    "ctr": DEBIAN + "containerd",
    "etcd": DEBIAN + "etcd-server",
    "etcdctl": DEBIAN + "etcd-client",
    "go": "install Go 1.24 or newer, https://go.dev/doc/install",
    "ip": DEBIAN + "iproute2",
    "iptables": DEBIAN + "iptables",
    "mmdebstrap": DEBIAN + "mmdebstrap",
    "mount": DEBIAN + "mount",
    "nft": DEBIAN + "nftables",
    "nsenter": DEBIAN + "util-linux",
    "openssl": DEBIAN + "openssl",
    "runc": DEBIAN + "runc",
    "unshare": DEBIAN + "util-linux",
}


class UserError(Exception):
    """Something that the user can fix; the message says what."""


def say(text: str) -> None:
    """Inform the user on stderr; stdout is for the shell that evaluates it."""
    print(text, file=sys.stderr, flush=True)


def require(program: str) -> str:
    """Return the program's path.

    Raises:
        UserError: it is not installed; names what to install.
    """
    path = shutil.which(program)
    if path is None:
        raise UserError(f"{program} is missing: {SOURCES[program]}")
    return path
