"""TLS of a gRPC server: a certificate and its key, reloaded when they change."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Any

import grpc

if TYPE_CHECKING:
    from collections.abc import Callable
    from logging import Logger
    from pathlib import Path

    # Key, certificate and, where clients have to show certificates, the CA of those; PEM.
    Pair = tuple[bytes, bytes, bytes | None]

_PEM = b"-----BEGIN "


def server_credentials(
    read: Callable[[], Pair], log: Logger, *, require_client_certificate: bool = False
) -> grpc.ServerCredentials:
    """Return credentials from what `read` returns.

    Each handshake reads again; open streams keep the certificate that they began with. While `read`
    raises OSError or ValueError, the previous certificate stays in use.

    Raises:
        OSError: it cannot be read now.
        ValueError: it is not what it should be.
    """
    pair = read()
    state: dict[str, Any] = {"pair": pair, "error": ""}

    def fetch() -> Any:  # None means unchanged, which the stubs do not know
        try:
            pair = read()
        except (OSError, ValueError) as error:
            if str(error) != state["error"]:  # once: every handshake comes here
                state["error"] = str(error)
                log.error("the previous certificate stays: %s", error)  # noqa: TRY400  # all is in its text
            return None
        if pair == state["pair"]:
            return None
        state["pair"], state["error"] = pair, ""
        log.info("certificate loaded")
        return _configuration(pair)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(pair), fetch, require_client_certificate
    )


def from_folder(folder: Path, *, with_ca: bool) -> Callable[[], Pair]:
    """Return a reader of `tls.crt`, `tls.key` and, for client certificates, `ca.crt`.

    The folder is one into which Kubernetes mounts a TLS secret. The reader raises OSError when a
    file cannot be read and ValueError when one does not hold what it should; it checks only files
    that have changed.
    """
    accepted: list[Pair] = []

    def read() -> Pair:
        pair = _read(folder, with_ca=with_ca)
        if pair not in accepted:
            _check(folder, with_ca=with_ca)
            accepted[:] = [pair]
        return pair

    return read


def _read(folder: Path, *, with_ca: bool) -> Pair:
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


def _configuration(pair: Pair) -> grpc.ServerCertificateConfiguration:
    key, certificate, ca = pair
    return grpc.ssl_server_certificate_configuration([(key, certificate)], ca)
