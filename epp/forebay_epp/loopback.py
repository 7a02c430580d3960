"""Who gets pages that name models and tenants: peers on this machine, by an address of its own.

What such a page shows does not belong here (adapters/).
"""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address


def refusal(peer: str | None, host: str | None) -> str | None:
    """Return why a request for such a page is refused, or None if it is not.

    A name in Host other than localhost is refused too: a web page of another site could have its
    own name resolve to loopback, and so read the answer (DNS rebinding).

    Args:
        peer: address of the peer.
        host: the Host header.
    """
    if not is_loopback(peer):
        return "this page is served on loopback only"
    name = (host or "").lower()
    if not name.endswith("]"):
        name = name.rsplit(":", 1)[0]
    name = name.removeprefix("[").removesuffix("]")
    if name and name != "localhost" and not is_loopback(name):
        return "this page is served under a loopback address or localhost only"
    return None


def is_loopback(peer: str | None) -> bool:
    """Return whether an IP address is this machine's own, also when IPv4 is written as IPv6."""
    try:
        address = ip_address(peer or "")
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback
