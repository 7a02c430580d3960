"""Fixtures of the wire tests."""

from __future__ import annotations

import pytest
from ext_proc_peer import TRANSPORTS, Picker


@pytest.fixture(params=sorted(TRANSPORTS))
def transport(request) -> str:
    """The name of each transport in turn: one suite for both."""
    return request.param


@pytest.fixture
def start(transport):
    """Start pickers that stop with the test."""
    started: list[Picker] = []

    def begin(**arguments) -> Picker:
        started.append(Picker(transport, **arguments))
        return started[-1]

    yield begin
    for picker in started:
        picker.stop()
