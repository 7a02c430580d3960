"""Ports for the programs of tests."""

from __future__ import annotations

import atexit
import functools
import itertools
import random
import socket

# Below Linux's range of ephemeral ports: no outgoing connection takes one while its program starts
# or restarts. hack/cluster has those from 20000 on.
FIRST, EACH, RANGES = 10000, 500, 20

_offsets = itertools.count(random.randrange(EACH))


def free_port() -> int:
    """A port that nothing listens on now and that no other process of tests chooses.

    None is returned twice before all others have been: what is to use one may not run yet, or may
    be about to restart.
    """
    claim = _claim()
    first = claim.getsockname()[1] + 1
    while True:
        port = first + next(_offsets) % (EACH - 1)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


@functools.cache
def _claim() -> socket.socket:
    """Bind the first port of a range, which is this process's own until it ends."""
    for number in range(RANGES):
        claim = socket.socket()
        try:
            claim.bind(("127.0.0.1", FIRST + EACH * number))
        except OSError:
            claim.close()
            continue
        atexit.register(claim.close)
        return claim
    raise AssertionError(f"{RANGES} processes of tests run already")
