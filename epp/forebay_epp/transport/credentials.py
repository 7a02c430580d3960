"""TLS of the ext_proc port.

Without a certificate one is generated at start: proxies do not verify an EPP's certificate, they
only encrypt. With certificate files every handshake uses the newest ones.
"""

from __future__ import annotations

import datetime as dt
import logging
from typing import TYPE_CHECKING, Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

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

    They are read again when they have changed; a pair that cannot be read leaves the last good one
    in use.

    Raises:
        OSError: a file cannot be read now.
        ValueError: the files are not a PEM key and certificate.
    """
    newest = _Pair(folder)

    def fetch() -> Any:  # None means unchanged, which the stubs do not know
        try:
            changed = newest.read()
        except (OSError, ValueError) as error:
            _log.warning("certificate not reloaded: %s", error)
            return None
        return newest.configuration() if changed else None

    newest.read()
    return grpc.dynamic_ssl_server_credentials(newest.configuration(), fetch)


class _Pair:
    """A key and its certificate, and when their files were last written."""

    def __init__(self, folder: Path) -> None:
        self._key = folder / "tls.key"
        self._certificate = folder / "tls.crt"
        self._written: tuple[int, int] | None = None
        self._pem = (b"", b"")

    def read(self) -> bool:
        """Read the files if they have changed; return whether they have."""
        written = (self._key.stat().st_mtime_ns, self._certificate.stat().st_mtime_ns)
        if written == self._written:
            return False
        key = self._key.read_bytes()
        certificate = self._certificate.read_bytes()
        serialization.load_pem_private_key(key, password=None)
        x509.load_pem_x509_certificate(certificate)
        self._pem = (key, certificate)
        self._written = written
        return True

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        """Return the pair in grpc's form."""
        return grpc.ssl_server_certificate_configuration([self._pem])
