"""forebay_operator/logs.py: one line for a failure that recovers, none for what is no news."""

from __future__ import annotations

import asyncio
import json
import logging
import sys

import pytest

from forebay_operator import logs


@pytest.fixture
def logged(capsys):
    """Log an error as configured, and return the lines that come of it as objects."""
    root, handlers = logging.getLogger(), logging.getLogger().handlers[:]
    hooks = sys.excepthook, sys.unraisablehook
    levels = {name: logging.getLogger(name).level for name in ("", "kopf", "forebay_operator")}

    def log(name: str, error: BaseException) -> list[dict]:
        logs.configure(1)
        logging.getLogger(name).error("it has ended", exc_info=error)
        return [json.loads(line) for line in capsys.readouterr().err.splitlines()]

    yield log
    root.handlers[:] = handlers
    sys.excepthook, sys.unraisablehook = hooks
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def test_a_failed_watch_is_a_line(logged):
    """The traceback would be kopf's own; the watch restarts."""
    lines = logged("kopf.activities", OSError("gone"))

    assert [set(line) for line in lines] == [{"ts", "level", "logger", "msg"}]


def test_streams_that_end_with_their_server_are_no_news(logged):
    """Their cancellation is logged by grpc as an error."""
    assert logged("grpc._cython.cygrpc", asyncio.CancelledError()) == []


def test_a_servicer_that_fails_is_told_of_whole(logged):
    """A defect of ours comes out of grpc's logger with its traceback."""
    (line,) = logged("grpc._cython.cygrpc", KeyError("pool"))

    assert "KeyError" in line["exc_info"]


def test_a_watch_that_is_destroyed_while_it_ends_is_a_line(logged, capsys):
    """Its coroutine awaits when it is closed, which Python prints as a traceback by itself."""

    async def watch() -> None:
        try:
            await asyncio.sleep(0)
        finally:
            await asyncio.sleep(0)

    logged("kopf", OSError("gone"))
    coroutine = watch()
    coroutine.send(None)
    del coroutine

    (line,) = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert line["error"] == "coroutine ignored GeneratorExit"
    assert "watch" in line["where"]


def test_an_uncaught_error_is_a_line_with_its_traceback(logged, capsys):
    """All of standard error is JSON; a stream's end that grpc prints is no news."""
    logged("kopf", OSError("gone"))

    sys.excepthook(asyncio.CancelledError, asyncio.CancelledError(), None)
    sys.excepthook(KeyError, KeyError("pool"), None)

    (line,) = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert (line["level"], "KeyError" in line["exc_info"]) == ("CRITICAL", True)
