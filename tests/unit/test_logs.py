"""adapters/logs.py: one JSON object per line, and no prompts in it."""

from __future__ import annotations

import io
import json
import logging
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_epp.adapters import logs
from forebay_epp.adapters.logs import MAX_EXCEPTION_LENGTH, MAX_VALUE_LENGTH, JsonFormatter
from forebay_epp.core.terms import Outcome


@pytest.fixture
def restored():
    """Take back what `configure` does to the process's loggers."""
    root, own = logging.getLogger(), logging.getLogger("forebay_epp")
    handlers, levels = root.handlers[:], (root.level, own.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    own.setLevel(levels[1])


def line_of(message="hello", *args, exc_info=None, **extra) -> dict:
    """The fields of one record's line."""
    logger = logging.getLogger("forebay_epp.test")
    info = (type(exc_info), exc_info, exc_info.__traceback__) if exc_info else None
    record = logger.makeRecord(
        logger.name, logging.WARNING, "f.py", 1, message, args, info, None, extra
    )
    text = JsonFormatter().format(record)

    assert "\n" not in text
    return json.loads(text)


def nested(depth: int) -> list:
    """A list in a list in a list."""
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def test_a_line_tells_when_how_grave_who_and_what():
    """The time is UTC in RFC 3339; arguments are filled in."""
    line = line_of("took %d ms", 5)

    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("ts"))
    assert line == {"level": "warning", "logger": "forebay_epp.test", "msg": "took 5 ms"}


def test_extra_fields_keep_their_types():
    """They can be searched for."""
    line = line_of(
        endpoint="1.2.3.4:80", count=3, share=0.5, ok=True, none=None, list=[1, {"a": 2}]
    )

    assert line["endpoint"] == "1.2.3.4:80"
    assert (line["count"], line["share"], line["ok"], line["none"]) == (3, 0.5, True, None)
    assert line["list"] == [1, {"a": 2}]


def test_extra_fields_do_not_replace_the_line_s_own():
    """A field called ts does not make the line lie."""
    line = line_of(ts="x", level="x", logger="x")

    assert line["level"] == "warning"
    assert line["logger"] == "forebay_epp.test"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (b"secret prompt", "<13 bytes>"),
        (bytearray(b"secret"), "<6 bytes>"),
        (memoryview(b"secret"), "<memoryview>"),
        ({"body": b"secret"}, {"body": "<6 bytes>"}),
        ({b"secret": 1}, {}),
        ({b"secret"}, "<set>"),
        ([[b"secret"]], [["<6 bytes>"]]),
        (float("nan"), "nan"),
        (10**5000, "<int>"),
        (Path("a/b"), "a/b"),
        (ValueError("no"), "no"),
        (Outcome.DISPATCHED, "Dispatched"),
        (object, "<type>"),
        (["x" * 600, "y" * 600], "<list>"),
        (nested(100_000), "<list>"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_binary_large_and_odd_values_are_only_described(value, shown):
    """A body that is logged by mistake does not show."""
    assert line_of(value=value)["value"] == shown


def test_long_text_is_cut():
    """In fields and in the message; the length is shown."""
    line = line_of("%s", "m" * 5000, value="x" * 5000)

    assert line["value"] == "x" * MAX_VALUE_LENGTH + "... (5000 characters)"
    assert line["msg"] == "m" * MAX_VALUE_LENGTH + "... (5000 characters)"


def test_a_value_that_contains_itself_is_described():
    """The line is written all the same."""
    value: list = []
    value.append(value)

    assert line_of(value=value)["value"] == "<list>"


def test_an_exception_is_one_field():
    """With its traceback, so the line stays one line."""
    with pytest.raises(LookupError) as raised:
        raise LookupError("x" * 20_000 + " lost")
    line = line_of(exc_info=raised.value)

    assert line["exception"].endswith(" lost")
    assert len(line["exception"]) == MAX_EXCEPTION_LENGTH


def test_a_short_exception_shows_its_traceback():
    """File and line are what one looks for."""
    with pytest.raises(LookupError) as raised:
        raise LookupError("lost")
    line = line_of(exc_info=raised.value)

    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("LookupError: lost")


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.binary(), inner),
)


@given(st.text(st.characters()), JSON_VALUES)
def test_every_line_is_valid_json(message, value):
    """Also with lone surrogates, line breaks and binary data; strict JSON knows no NaN."""

    def refuse(constant):
        raise AssertionError(constant)

    record = logging.makeLogRecord({"msg": message, "value": value})
    text = JsonFormatter().format(record)

    assert text.isascii()
    assert "\n" not in text
    json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(
    ("verbosity", "shown"),
    [
        (-1, ["warning"]),
        (0, ["warning"]),
        (1, ["warning", "info"]),
        (2, ["warning", "info", "debug"]),
        (9, ["warning", "info", "debug"]),
    ],
)
@pytest.mark.usefixtures("restored")
def test_verbosity(verbosity, shown):
    """0 shows warnings, 1 what changes, 2 everything."""
    stream = io.StringIO()
    logs.configure(verbosity, stream)
    logger = logging.getLogger("forebay_epp.test")
    logger.warning("a")
    logger.info("b")
    logger.debug("c")

    assert [json.loads(line)["level"] for line in stream.getvalue().splitlines()] == shown


@pytest.mark.usefixtures("restored")
def test_libraries_never_show_debug_lines():
    """Those may hold what clients sent."""
    stream = io.StringIO()
    logs.configure(9, stream)
    logging.getLogger("asyncio").debug("secret")

    assert stream.getvalue() == ""


@pytest.mark.usefixtures("restored")
def test_configuring_again_replaces_the_stream():
    """No line is written twice."""
    first, second = io.StringIO(), io.StringIO()
    logs.configure(1, first)
    logs.configure(1, second)
    logging.getLogger("forebay_epp").info("once")

    assert first.getvalue() == ""
    assert len(second.getvalue().splitlines()) == 1


@pytest.mark.usefixtures("restored")
def test_logs_go_to_standard_error_by_default(capsys):
    """Standard output stays free."""
    logs.configure(1)
    logging.getLogger("forebay_epp").info("here")
    captured = capsys.readouterr()

    assert captured.out == ""
    assert json.loads(captured.err)["msg"] == "here"
