"""What a model server's /metrics page says about its load: a few numbers out of 300 kB of text.

The page is Prometheus text. It is not parsed as a whole: only the lines that matter are looked
for, because an endpoint picker reads such a page several times a second from every server. The
server is not trusted: a number that cannot be true makes its signal unknown, and never 0. Fetching
the page (adapters/scraper.py) and deciding by it (core/saturation.py) do not belong here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# Names of a signal, newest first; the first one that the page has counts, the others are ignored.
SIGNAL_NAMES = {
    "running": (b"vllm:num_requests_running", b"sglang:num_running_reqs"),
    "waiting": (b"vllm:num_requests_waiting", b"sglang:num_queue_reqs"),
    "kv_usage": (
        b"vllm:kv_cache_usage_perc",
        b"vllm:gpu_cache_usage_perc",  # vLLM before the end of 2025
        b"sglang:token_usage",
    ),
}

MAX_REQUESTS = 1_000_000
MAX_SERIES = 1_000
MAX_LINE_BYTES = 16 << 10

# What follows the name: labels in which braces and blanks may be quoted, the value, a timestamp.
# Counts and fractions start with a digit, so this refuses NaN, Inf and what is below zero.
_SAMPLE = re.compile(
    rb"""(?:[ \t]*\{ (?: [^"}] | "(?:[^"\\]|\\.)*+" )*+ \})?
         [ \t]+ ([0-9][0-9.eE+-]*+)
         (?:[ \t]+ -?[0-9]++)?
         [ \t]*\r?""",
    re.VERBOSE,
)


class _UnbelievableError(ValueError):
    """A sample of the signal that has no value which could be true."""


@dataclass(frozen=True, slots=True)
class PageMetrics:
    """The load of one model server; None is "unknown", which never means idle.

    Attributes:
        running: requests in the batch, summed over engines.
        waiting: requests queued inside the server, summed over engines.
        kv_usage: fraction 0-1 of KV cache in use, the fullest engine.
    """

    running: int | None
    waiting: int | None
    kv_usage: float | None


def parse_page(page: bytes) -> PageMetrics:
    """Read the signals from a page; whatever the page holds, this does not raise."""
    return PageMetrics(
        running=_count(page, SIGNAL_NAMES["running"]),
        waiting=_count(page, SIGNAL_NAMES["waiting"]),
        kv_usage=_fullest(page, SIGNAL_NAMES["kv_usage"]),
    )


def _count(page: bytes, names: tuple[bytes, ...]) -> int | None:
    values = _values(page, names)
    if not values or any(value > MAX_REQUESTS or value != int(value) for value in values):
        return None
    return int(sum(values))


def _fullest(page: bytes, names: tuple[bytes, ...]) -> float | None:
    fullest = max(_values(page, names), default=None)
    return None if fullest is None or fullest > 1 else fullest


def _values(page: bytes, names: tuple[bytes, ...]) -> list[float]:
    """Return the values of the first name the page has; none when one of them is unbelievable."""
    try:
        for name in names:
            if values := list(islice(_samples(page, name), MAX_SERIES + 1)):
                return values if len(values) <= MAX_SERIES else []
    except _UnbelievableError:
        pass
    return []


def _samples(page: bytes, name: bytes) -> Iterator[float]:
    """Yield the value of each line that begins with exactly this name.

    Raises:
        _UnbelievableError: a line does not have the form of a sample of a count or fraction.
    """
    if page.startswith(name):
        yield from _sample(page, len(name))
    line_with_name = b"\n" + name
    at = page.find(line_with_name)
    while at >= 0:
        end = at + len(line_with_name)
        yield from _sample(page, end)
        at = page.find(line_with_name, end)


def _sample(page: bytes, end_of_name: int) -> Iterator[float]:
    if page[end_of_name : end_of_name + 1] not in (b"{", b" ", b"\t"):
        return  # a longer name that begins like this one
    end_of_line = page.find(b"\n", end_of_name, end_of_name + MAX_LINE_BYTES)
    if end_of_line < 0:
        end_of_line = len(page)
    if end_of_line - end_of_name > MAX_LINE_BYTES:
        raise _UnbelievableError
    match = _SAMPLE.fullmatch(page, end_of_name, end_of_line)
    if match is None:
        raise _UnbelievableError
    try:
        yield float(match[1])
    except ValueError as error:  # 1.2.3
        raise _UnbelievableError from error
