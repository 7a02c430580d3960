"""Logs as one JSON object per line, with the same names as the EPP's logs."""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import TYPE_CHECKING

from pythonjsonlogger.json import JsonFormatter

if TYPE_CHECKING:
    from types import TracebackType

_log = logging.getLogger(__name__)


def configure(verbosity: int) -> None:
    """Write to standard error.

    Args:
        verbosity: 0 shows warnings, 1 also what changes, 2 everything of ours. kopf tells of each
            event; that is shown from 2 on, as information.
    """
    sys.excepthook = _log_uncaught
    sys.unraisablehook = _log_unraisable
    handler = logging.StreamHandler(sys.stderr)
    if verbosity < 2:
        handler.addFilter(_worth_a_line)
    handler.setFormatter(
        JsonFormatter(
            "{asctime}{levelname}{name}{message}",
            style="{",
            rename_fields={
                "asctime": "ts",
                "levelname": "level",
                "name": "logger",
                "message": "msg",
            },
            datefmt="%Y-%m-%dT%H:%M:%S%z",
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    own_level = {0: logging.WARNING, 1: logging.INFO}.get(max(verbosity, 0), logging.DEBUG)
    root.setLevel(logging.INFO if verbosity > 1 else logging.WARNING)
    logging.getLogger("forebay_operator").setLevel(own_level)
    # Each of its tasks that ends with the process is an error in kopf's eyes.
    logging.getLogger("kopf").setLevel(logging.INFO if verbosity > 1 else logging.ERROR)


def _log_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Log an error that nothing has caught as a line, but not the end of a stream with its server.

    grpc prints errors that it can raise nowhere before it tells Python of them.
    """
    if kind is not asyncio.CancelledError:
        _log.critical("nothing has caught an error", exc_info=(kind, error, trace))


def _log_unraisable(what: sys.UnraisableHookArgs) -> None:
    """Log an error that Python can raise nowhere as a line.

    A watch that kopf does not end in time is destroyed with its loop, and awaits even then.
    """
    if what.exc_type is asyncio.CancelledError:
        return
    _log.warning(
        "an error could not be raised",
        extra={"error": str(what.exc_value)[:500], "where": repr(what.object)[:500]},
    )


# What grpc says of streams that are cut when their server ends.
_GRPC_ENDS = ("CancelledError", "ExecuteBatchError")


def _worth_a_line(record: logging.LogRecord) -> bool:
    """Leave out what is no news, and tracebacks of failures that recover by themselves."""
    error = record.exc_info[1] if record.exc_info else None
    if record.name.startswith("grpc"):
        return type(error).__name__ not in _GRPC_ENDS
    if record.name.startswith("kopf"):  # a failed watch is restarted
        record.exc_info = record.exc_text = None
    return True
