"""Constants and addresses of the control channel on which its two ends must agree."""

from __future__ import annotations

PROTOCOL = 1  # of Hello: an operator refuses any other
SILENCE_SECONDS = 30.0  # without a message from the other end, which pings more often: it is gone


def host_port(host: str, port: int) -> str:
    """Write host:port, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
