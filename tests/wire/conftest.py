"""Fixtures of the wire tests."""

from __future__ import annotations

import pytest
from ext_proc_peer import TRANSPORTS, EPPThread


@pytest.fixture(params=sorted(TRANSPORTS))
def transport(request) -> str:
    """The name of each transport in turn: one suite for both."""
    return request.param


@pytest.fixture
def start(transport):
    """Start EPPs that stop with the test."""
    started: list[EPPThread] = []

    def begin(**arguments) -> EPPThread:
        started.append(EPPThread(transport, **arguments))
        return started[-1]

    yield begin
    for epp in started:
        epp.stop()
