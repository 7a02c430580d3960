"""Keys and certificates that the cluster's parts do not make themselves."""

from __future__ import annotations

import base64
import secrets
import subprocess
from typing import TYPE_CHECKING

from cluster.needs import UserError, require

if TYPE_CHECKING:
    from pathlib import Path

P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


def signing_key() -> str:
    """Return a new private key on P-256 in PEM, for the tokens of service accounts.

    The standard library cannot make keys, but a SEC 1 private key is a random number in a fixed
    frame: version 1, the number, the curve's object identifier. Readers derive the public key.
    """
    number = 1 + secrets.randbelow(P256_ORDER - 1)
    frame = bytes.fromhex(f"30310201010420{number:064x}a00a06082a8648ce3d030107")
    body = base64.encodebytes(frame).decode()
    return f"-----BEGIN EC PRIVATE KEY-----\n{body}-----END EC PRIVATE KEY-----\n"


def write_kubelet_client(folder: Path) -> None:
    """Write kubelet-client.crt and .key, by which the kubelet knows the API server.

    The certificate is its own authority.

    Raises:
        UserError: openssl is missing or refuses.
    """
    done = subprocess.run(
        [
            *(require("openssl"), "req", "-x509", "-newkey", "ec", "-noenc", "-days", "3650"),
            *("-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-subj", "/O=system:masters/CN=kube-apiserver-kubelet-client"),
            *("-addext", "extendedKeyUsage=clientAuth"),
            *("-keyout", folder / "kubelet-client.key", "-out", folder / "kubelet-client.crt"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UserError(f"openssl req has failed:\n{done.stderr}")
