"""Tokens as the API server issues them to pods, with a signature that is none."""

from __future__ import annotations

import base64
import json
import time

AUDIENCE = "forebay-control"


def encoded(payload: bytes) -> str:
    """A JWT with this payload."""
    return f"e30.{base64.urlsafe_b64encode(payload).decode().rstrip('=')}.c2ln"


def token(life_seconds: float = 3600.0, uid="uid-0", name="epp-0", namespace="serving", **claims):
    """A token of a pod; claims replace what it usually says."""
    pod = {"uid": uid, "name": name}
    usual = {
        "iss": "https://kubernetes.default.svc",
        "aud": [AUDIENCE],
        "nbf": time.time() - 1,
        "exp": time.time() + life_seconds,
        "kubernetes.io": {"namespace": namespace, "pod": pod},
    }
    return encoded(json.dumps(usual | claims).encode())
