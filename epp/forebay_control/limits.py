"""How large a Snapshot may be: what the operator keeps to and an endpoint picker checks."""

from __future__ import annotations

MAX_PLAN_BYTES = 1 << 20
MAX_ENDPOINTS = 4096
MAX_SNAPSHOT_BYTES = 3 << 20  # plan and endpoints, below the 4 MiB of a gRPC message
