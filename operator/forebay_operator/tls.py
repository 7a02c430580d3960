"""TLS of the control port: certificate and key from a folder, taken anew when they change."""

from __future__ import annotations

import logging
import ssl
from typing import TYPE_CHECKING, Any

import grpc

if TYPE_CHECKING:
    from pathlib import Path

_log = logging.getLogger(__name__)

_PEM = b"-----BEGIN "


def server_credentials(folder: Path, *, require_client_certificate: bool) -> Any:
    """Return credentials from `tls.crt`, `tls.key` and, for client certificates, `ca.crt`.

    Each handshake looks whether the files have changed; streams that are open stay.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file does not hold what it should.
    """
    pair = _read(folder, with_ca=require_client_certificate)
    _check(folder, with_ca=require_client_certificate)
    state: dict[str, Any] = {"pair": pair, "error": ""}

    def fetch() -> Any:  # None means unchanged, which the stubs do not know
        try:
            pair = _read(folder, with_ca=require_client_certificate)
            if pair == state["pair"]:
                return None
            _check(folder, with_ca=require_client_certificate)
        except (OSError, ValueError) as error:
            if str(error) != state["error"]:  # once: every handshake comes here
                state["error"] = str(error)
                _log.error("the certificate before stays: %s", error)
            return None
        state["pair"], state["error"] = pair, ""
        _log.info("certificate taken", extra={"folder": str(folder)})
        return _configuration(pair)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(pair), fetch, require_client_certificate
    )


def _read(folder: Path, *, with_ca: bool) -> tuple[bytes, bytes, bytes | None]:
    names = ["tls.key", "tls.crt", *(["ca.crt"] if with_ca else [])]
    found = [(folder / name).read_bytes() for name in names]
    for name, data in zip(names, found, strict=True):
        if _PEM not in data:
            raise ValueError(f"{folder / name} holds no PEM")
    return found[0], found[1], found[2] if with_ca else None


def _check(folder: Path, *, with_ca: bool) -> None:
    """Refuse files that do not belong together: every handshake would fail until they do."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(folder / "tls.crt", folder / "tls.key", password=_no_password)
        if with_ca:
            context.load_verify_locations(folder / "ca.crt")
    except ssl.SSLError as error:
        files = "tls.crt, tls.key or ca.crt" if with_ca else "tls.crt or tls.key"
        raise ValueError(f"{folder}: {files} cannot be used: {error.reason or error}") from None


def _no_password() -> str:
    raise ValueError("tls.key is encrypted")


def _configuration(pair: tuple[bytes, bytes, bytes | None]) -> grpc.ServerCertificateConfiguration:
    key, certificate, ca = pair
    return grpc.ssl_server_certificate_configuration([(key, certificate)], ca)
