"""TLS of the ext_proc port.

Without a certificate one is generated at start: proxies do not verify an EPP's certificate, they
only encrypt. With certificate files every handshake uses the newest ones.
"""

from __future__ import annotations

import datetime as dt
import logging
from typing import TYPE_CHECKING

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from forebay_control import tls

if TYPE_CHECKING:
    from pathlib import Path

VALID_DAYS = 3650

_log = logging.getLogger(__name__)


def self_signed() -> grpc.ServerCredentials:
    """Make a key and a self-signed certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "forebay")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=VALID_DAYS))
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public = certificate.public_bytes(serialization.Encoding.PEM)
    return grpc.ssl_server_credentials([(private, public)])


def from_folder(folder: Path) -> grpc.ServerCredentials:
    """Use `tls.key` and `tls.crt` of a folder, as Kubernetes mounts a TLS secret.

    Raises:
        OSError: a file cannot be read now.
        ValueError: the files are not a PEM key and its certificate.
    """
    return tls.server_credentials(tls.from_folder(folder, with_ca=False), _log)
