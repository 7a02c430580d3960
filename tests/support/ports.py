"""Ports for the programs of tests."""

from __future__ import annotations

import os
import random
import socket

# Below Linux's range of ephemeral ports: no outgoing connection takes one while its program starts
# or restarts. Each worker of pytest-xdist has its own, and so has hack/cluster (from 20000 on).
FIRST, EACH, WORKERS = 10000, 1000, 10


def free_port() -> int:
    """A port that nothing listens on now and that no other worker chooses."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = FIRST + EACH * (worker % WORKERS)
    while True:
        port = random.randrange(first, first + EACH)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
