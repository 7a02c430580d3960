"""Operators that end and start again beside a picker that serves on; both are real processes."""

from __future__ import annotations

import pytest
import yaml
from control_plane import QUICKSTART, FolderOperator, History, PickerProcess, check_log
from ext_proc_peer import until

WAIT_SECONDS = 60


@pytest.fixture
def start(tmp_path):
    """Start the operator, also again on its port; it ends with the test."""
    started: list[FolderOperator] = []

    def begin() -> FolderOperator:
        port = started[0].control_port if started else None
        started.append(FolderOperator(tmp_path, port))
        return started[-1]

    yield begin
    for operator in started:
        operator.end()


@pytest.fixture
def picker(start, tmp_path):
    """A picker that the first operator has programmed."""
    operator = start()
    pool = yaml.safe_load((QUICKSTART / "pool.yaml").read_text())["metadata"]["name"]
    picker = PickerProcess(tmp_path, "epp-0", pool, operator.control_port)
    until(lambda: (picker.version or (0, 0)) > (0, 0), WAIT_SECONDS)
    picker.operator = operator
    yield picker
    picker.end()


def test_a_picker_finds_the_next_operator(start, picker):
    """It is told when to dial again, serves meanwhile, and never goes back to an older version.

    The next one's epoch is often that of the one before, since both start within a second: it is
    programmed all the same.
    """
    operator, history = picker.operator, History([picker])
    try:
        for number in range(4):
            before = picker.version
            assert operator.stop() == 0
            operator.edit(f"{100 + number}s")
            operator = start()
            until(lambda before=before: (picker.version or before) > before, WAIT_SECONDS)
            until(lambda: picker.connected, WAIT_SECONDS)
        history.check()
    finally:
        history.end()
    check_log(picker.log)
    check_log(operator.log)


def test_a_picker_outlives_an_operator_that_is_killed(start, picker):
    """Without a goodbye."""
    sha256 = picker.program()[1]
    picker.operator.kill()
    until(lambda: not picker.connected, WAIT_SECONDS)
    assert picker.program()[1] == sha256

    before = picker.version
    start()
    until(lambda: (picker.version or before) > before, WAIT_SECONDS)


def test_an_operator_forgets_a_picker_that_has_said_goodbye(picker):
    """Nobody waits for it."""
    operator = picker.operator
    until(lambda: operator.metric("forebay_control_streams") == 1, WAIT_SECONDS)
    assert picker.stop(WAIT_SECONDS) == 0

    until(lambda: operator.metric("forebay_control_streams") == 0, WAIT_SECONDS)
    assert "endpoint picker leaves" in operator.log
