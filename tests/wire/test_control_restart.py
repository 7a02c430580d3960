"""Operators that end and start again beside an EPP that serves on; both are real processes."""

from __future__ import annotations

import pytest
import yaml
from control_plane import QUICKSTART, EPPProcess, FolderOperator, check_log, check_versions
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
def epp(start, tmp_path):
    """An EPP that the first operator has programmed."""
    operator = start()
    pool = yaml.safe_load((QUICKSTART / "pool.yaml").read_text())["metadata"]["name"]
    epp = EPPProcess(tmp_path, "epp-0", pool, operator.control_port)
    until(lambda: (epp.version or (0, 0)) > (0, 0), WAIT_SECONDS)
    epp.operator = operator
    yield epp
    epp.end()


def test_an_epp_finds_the_next_operator(start, epp):
    """It is told when to dial again, serves meanwhile, and never goes back to an older version.

    The next one's epoch is often that of the one before, since both start within a second: it is
    programmed all the same.
    """
    operator = epp.operator
    for number in range(4):
        before = epp.version
        assert operator.stop() == 0
        operator.edit(f"{100 + number}s")
        operator = start()
        until(lambda before=before: (epp.version or before) > before, WAIT_SECONDS)
        until(lambda: epp.connected, WAIT_SECONDS)
    check_versions(epp)
    check_log(epp.log)
    check_log(operator.log)


def test_an_epp_outlives_an_operator_that_is_killed(start, epp):
    """Without a goodbye."""
    sha256 = epp.program()[1]
    epp.operator.kill()
    until(lambda: not epp.connected, WAIT_SECONDS)
    assert epp.program()[1] == sha256

    before = epp.version
    start()
    until(lambda: (epp.version or before) > before, WAIT_SECONDS)


def test_an_operator_forgets_an_epp_that_has_said_goodbye(epp):
    """It is not awaited."""
    operator = epp.operator
    until(lambda: operator.metric("forebay_control_streams") == 1, WAIT_SECONDS)
    assert epp.stop(WAIT_SECONDS) == 0

    until(lambda: operator.metric("forebay_control_streams") == 0, WAIT_SECONDS)
    assert "EPP leaves" in operator.log
