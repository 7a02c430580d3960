"""The maximum size of a Snapshot, which the operator keeps to and an EPP checks."""

from __future__ import annotations

MAX_PLAN_BYTES = 1 << 20
MAX_ENDPOINTS = 4096
MAX_SNAPSHOT_BYTES = 3 << 20  # plan and endpoints, below the 4 MiB of a gRPC message
