"""One cluster with forebay in it, as the README installs it, for all tests of this folder."""

from __future__ import annotations

import time

import api_server
import pytest
from installation import Installation


@pytest.fixture(scope="session")
def node_cluster(tmp_path_factory, figure):
    """A cluster with a node and the images, and without our CRDs, which helm is to bring."""
    began_at = time.monotonic()
    with api_server.running(tmp_path_factory.mktemp("e2e"), node=True) as cluster:
        api_server.load_images(cluster)
        figure(f"cluster with images: {time.monotonic() - began_at:.0f} s")
        yield cluster


@pytest.fixture(scope="session")
def quickstart(node_cluster, figure):
    """The installation, and what the README's commands have printed."""
    forebay = Installation(node_cluster)
    forebay.prepare()
    try:
        text, seconds = forebay.follow_readme()
        figure(f"helm install to the first answer: {seconds:.1f} s")
        yield forebay, text
    finally:
        if not node_cluster.owned:  # ours goes as a whole
            forebay.remove()


@pytest.fixture
def forebay(quickstart):
    """The installation as the README leaves it."""
    installation, _ = quickstart
    installation.reset()
    return installation


@pytest.fixture
def clients(forebay):
    """Clients of the installation's Envoy."""
    with forebay.clients() as clients:
        yield clients
