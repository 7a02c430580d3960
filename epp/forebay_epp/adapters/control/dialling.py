"""Where the operator is reached, and with what this EPP proves its identity."""

from __future__ import annotations

import asyncio
import random
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from forebay_control.channel import host_port

if TYPE_CHECKING:
    from pathlib import Path

CONNECT_MILLISECONDS = 5_000
MAX_MESSAGE_BYTES = 4 << 20


class NotReadyError(Exception):
    """Something that dialling needs is not there yet; the text says what."""


@dataclass(frozen=True, slots=True)
class Dial:
    """Where the operator is, and how both ends prove their identity.

    Attributes:
        host: name or address; a name may have several addresses, one per replica.
        server_name: the DNS name its certificate has to carry.
        ca_path: PEM bundle that has to have signed it; None dials in plaintext.
        token_path: a service account token to show.
        cert_path: folder with tls.crt and tls.key to show.
    """

    host: str
    port: int
    server_name: str
    ca_path: Path | None
    token_path: Path | None
    cert_path: Path | None

    async def addresses(self) -> list[str]:
        """Return every replica's ip:port in random order.

        Raises:
            NotReadyError: the name has no address (yet).
        """
        try:
            found = await asyncio.get_running_loop().getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM
            )
        except OSError as error:
            text = f"--control-address: {self.host}: {error.strerror or error}"
            raise NotReadyError(text) from error
        addresses = list({host_port(*entry[4][:2]) for entry in found})
        random.shuffle(addresses)
        return addresses

    def channel(self, address: str) -> grpc.aio.Channel:
        """Open a channel with what the files hold now.

        Raises:
            NotReadyError: a file is not there (yet).
        """
        options: list[tuple[str, Any]] = [
            ("grpc.enable_http_proxy", 0),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.max_pings_without_data", 0),
            # The first one bounds connecting, which 20 s by default would outlast a short outage.
            ("grpc.min_reconnect_backoff_ms", CONNECT_MILLISECONDS),
            ("grpc.initial_reconnect_backoff_ms", CONNECT_MILLISECONDS),
        ]
        if self.ca_path is None:
            return grpc.aio.insecure_channel(address, options)
        key = certificate = None
        if self.cert_path is not None:
            key = _read("--control-cert-path", self.cert_path / "tls.key")
            certificate = _read("--control-cert-path", self.cert_path / "tls.crt")
        credentials = grpc.ssl_channel_credentials(
            _read("--control-ca-path", self.ca_path), key, certificate
        )
        options.append(("grpc.ssl_target_name_override", self.server_name))
        return grpc.aio.secure_channel(address, credentials, options)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the metadata of a call: the token, if there is one.

        Raises:
            NotReadyError: the token's file is not there (yet).
        """
        path = self.token_path
        if path is None:
            return ()
        token = _read("--control-token-path", path).decode(errors="replace").strip()
        return (("authorization", f"Bearer {token}"),)


def _read(flag: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise NotReadyError(f"{flag}: {path}: {error.strerror}") from error
