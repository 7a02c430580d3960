"""Logs as one JSON object per line.

The code that logs decides what deserves a line, with `logging` and `extra={...}`. Request bodies
are never logged; the bounds here only keep a mistake from showing a whole prompt.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import TextIO

MAX_VALUE_LENGTH = 1_000
MAX_EXCEPTION_LENGTH = 8_000

_OWN_ATTRIBUTES = frozenset(
    (*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"),
)


class JsonFormatter(logging.Formatter):
    """Writes ts (RFC 3339, UTC), level, logger, msg, then the extra fields, then `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of ASCII."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields: dict[str, object] = {
            "ts": at.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": bounded(record.getMessage()),
        }
        for name, value in vars(record).items():
            if name not in _OWN_ATTRIBUTES:
                fields.setdefault(name, bounded(value))
        if record.exc_info and record.exc_info[0] is not None:
            # The end names the exception.
            trace = self.formatException(record.exc_info)
            fields["exception"] = trace[-MAX_EXCEPTION_LENGTH:]
        return json.dumps(fields)


def configure(verbosity: int, stream: TextIO | None = None) -> None:
    """Write the process's logs to a text stream, in place of where an earlier call sent them.

    Args:
        verbosity: 0 shows warnings, 1 also what changes, 2 everything. Libraries never show more
            than level info, because their debug lines may hold what clients sent.
        stream: standard error when none is given.
    """
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    for other in root.handlers[:]:
        if isinstance(other.formatter, JsonFormatter):
            root.removeHandler(other)
    root.addHandler(handler)
    own_level = {0: logging.WARNING, 1: logging.INFO}.get(max(verbosity, 0), logging.DEBUG)
    root.setLevel(logging.INFO if verbosity > 1 else logging.WARNING)
    logging.getLogger("forebay_epp").setLevel(own_level)


def bounded(value: object) -> object:
    """Return JSON data that shows the value; of what is large or binary, only what it is."""
    if isinstance(value, str):
        if len(value) <= MAX_VALUE_LENGTH:
            return value
        return f"{value[:MAX_VALUE_LENGTH]}... ({len(value)} characters)"
    try:
        text = json.dumps(value, default=_describe, skipkeys=True, allow_nan=False)
    except (ValueError, RecursionError):  # NaN, too many digits, or it contains itself
        return _describe(value)
    if len(text) > MAX_VALUE_LENGTH:
        return _describe(value)
    return json.loads(text)


def _describe(value: object) -> object:
    match value:
        case bytes() | bytearray():
            return f"<{len(value)} bytes>"
        case float() | Path() | BaseException():
            return bounded(str(value))
    return f"<{type(value).__name__}>"
