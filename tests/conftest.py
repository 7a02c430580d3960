"""Settings of all tests."""

from __future__ import annotations

import os
import signal

from cluster_fixtures import cluster, crds, namespace, node_cluster
from hypothesis import settings
from worker_groups import pytest_collection_modifyitems, pytest_xdist_make_scheduler

__all__ = [
    "cluster",
    "crds",
    "namespace",
    "node_cluster",
    "pytest_collection_modifyitems",
    "pytest_xdist_make_scheduler",
]

# A job in a shell's background ignores Ctrl-C, and so would the programs that tests send it to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No test measures time, so no example has a deadline. The gate must not depend on luck: there every
# run tries the same examples; elsewhere each run tries new ones.
settings.register_profile("forebay", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("forebay")
