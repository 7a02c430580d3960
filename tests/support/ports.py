"""Ports for the programs of tests."""

from __future__ import annotations

import itertools
import os
import random
import socket

# Below Linux's range of ephemeral ports: no outgoing connection takes one while its program starts
# or restarts. Each worker of pytest-xdist has its own, and so has hack/cluster (from 20000 on).
FIRST, EACH, WORKERS = 10000, 1000, 10
NO_WORKER = "gw9"  # a soak or a single test beside a gate

_offsets = itertools.count(random.randrange(EACH))


def free_port() -> int:
    """A port that nothing listens on now and that no other worker chooses.

    None is returned twice before all others have been: what is to use one may not run yet, or may
    be about to restart.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", NO_WORKER).removeprefix("gw"))
    first = FIRST + EACH * (worker % WORKERS)
    while True:
        port = first + next(_offsets) % EACH
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
