"""Reads a model server's load from its /metrics page: a few numbers out of 300 kB of text.

The page is Prometheus or OpenMetrics text. It is not parsed as a whole: only the lines that matter
are looked for, because an EPP reads such a page several times a second from every server. `ENGINES`
names the series of the known model servers; a policy may name others (`engines`). The server is
not trusted: a number that cannot be true makes its signal unknown, and never 0. Fetching the page
(adapters/scraper.py) and deciding by it (core/limits/) do not belong here.
"""

from __future__ import annotations

import math
import operator
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from forebay_control.plan import MetricsPlan, SeriesPlan

MAX_REQUESTS = 1_000_000
MAX_TOTAL = 1e15
MAX_SERIES = 1_000
MAX_COMMENTS = 4  # between two samples of a metric
MAX_LINE_BYTES = 16 << 10

# What follows the name: labels in which braces and blanks may be quoted, the value, a timestamp
# (OpenMetrics: a fraction) and OpenMetrics' exemplar.
_SAMPLE = re.compile(
    rb"""(?:[ \t]*(\{ (?: [^"}]++ | "[^"\\]*+(?:\\.[^"\\]*+)*+" )*+ \}))?
         [ \t]+ ([^ \t\r{}]++)
         (?:[ \t]+ -?[0-9][0-9.eE+-]*+)?
         (?:[ \t]+ \#[ ][^\r]*+)?
         [ \t]*\r?""",
    re.VERBOSE,
)
_LABEL = re.compile(rb'([a-zA-Z_][a-zA-Z0-9_]*+)[ \t]*=[ \t]*"([^"\\]*+(?:\\.[^"\\]*+)*+)"')
# Counts and fractions start with a digit: this refuses NaN, Inf and what is below zero.
_NUMBER = re.compile(rb"[0-9][0-9.eE+-]*+")


class _UnbelievableError(ValueError):
    """A sample of the signal that has no value which could be true."""


class Series:
    """The samples of one metric whose labels have these values, as PromQL selects them.

    A label that a sample lacks has the value "", and labels that are not named may have any.

    Attributes:
        name: the metric's name.
        labels: label names and values as a page writes them.
        scattered: whether other lines come between the samples, as in a histogram, whose count and
            sum follow the buckets of the same labels.
        value_labels: those whose product is the value, as in a metric of information, which is
            always 1; empty: the sample has it.
    """

    __slots__ = ("labels", "line_start", "name", "scattered", "value_labels")

    def __init__(
        self,
        name: str,
        labels: tuple[tuple[str, str], ...] = (),
        *,
        scattered: bool = False,
        value_labels: tuple[str, ...] = (),
    ) -> None:
        self.name = name.encode()
        self.scattered = scattered
        self.value_labels = tuple(label.encode() for label in value_labels)
        self.line_start = b"\n" + self.name
        self.labels = tuple((label.encode(), _escaped(value)) for label, value in labels)

    def selects(self, labels: bytes | None) -> bool:
        """Return whether a sample with these labels, `{a="b"}` as on the page, is one of them."""
        given = dict(_LABEL.findall(labels or b""))
        return all(given.get(name, b"") == value for name, value in self.labels)


def _escaped(value: str) -> bytes:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").encode()


@dataclass(frozen=True, slots=True)
class Engine:
    """Where a kind of model server publishes its load.

    The first series of a signal that the page has counts, the others are ignored.

    Attributes:
        prefix: what names of its metrics begin with, and no other server's; empty: any page is its.
        running, waiting, kv_usage, steps, step_tokens, prefix_hits, answer_tokens: see
            `PageMetrics`.
        kv_tokens: that fit in the KV cache; where that is empty:
        kv_blocks, kv_block_tokens: the blocks of the KV cache and the tokens that fit in each; both
            have a sample for each engine.
    """

    prefix: str
    running: tuple[Series, ...]
    waiting: tuple[Series, ...]
    kv_usage: tuple[Series, ...] = ()
    steps: tuple[Series, ...] = ()
    step_tokens: tuple[Series, ...] = ()
    kv_tokens: tuple[Series, ...] = ()
    kv_blocks: tuple[Series, ...] = ()
    kv_block_tokens: tuple[Series, ...] = ()
    prefix_hits: tuple[Series, ...] = ()
    answer_tokens: tuple[Series, ...] = ()

    def publishes(self, page: bytes) -> bool:
        """Return whether the page is one of this kind of server."""
        prefix = self.prefix.encode()
        return page.startswith(prefix) or b"\n" + prefix in page


ENGINES = (
    Engine(
        "vllm:",
        (Series("vllm:num_requests_running"),),
        (
            # Others are deferred: they wait for their grammar, LoRA or KV transfer.
            Series("vllm:num_requests_waiting_by_reason", (("reason", "capacity"),)),
            Series("vllm:num_requests_waiting"),
        ),
        (
            Series("vllm:kv_cache_usage_perc"),
            Series("vllm:gpu_cache_usage_perc"),  # before the end of 2025
        ),
        (Series("vllm:iteration_tokens_total_count", scattered=True),),
        (Series("vllm:iteration_tokens_total_sum", scattered=True),),
        (Series("vllm:cache_config_info", value_labels=("num_gpu_blocks", "block_size")),),
        prefix_hits=(
            Series("vllm:prefix_cache_hits_total"),
            Series("vllm:gpu_prefix_cache_hits_total"),  # before the end of 2025
        ),
        answer_tokens=(Series("vllm:generation_tokens_total"),),
    ),
    Engine(
        "sglang:",
        (Series("sglang:num_running_reqs"),),
        (Series("sglang:num_queue_reqs"),),
        (Series("sglang:token_usage"),),
        kv_tokens=(Series("sglang:cache_config_info", value_labels=("num_pages", "page_size")),),
        answer_tokens=(Series("sglang:generation_tokens_total"),),
    ),
    Engine(
        "trtllm_",  # trtllm-serve
        (Series("trtllm_num_requests_running"),),
        (Series("trtllm_num_requests_waiting"),),
        (Series("trtllm_kv_cache_utilization"),),
        kv_blocks=(Series("trtllm_kv_cache_max_blocks"),),
        kv_block_tokens=(Series("trtllm_kv_cache_tokens_per_block"),),
    ),
    Engine(
        "nv_trt_llm_",  # Triton with its TensorRT-LLM backend
        (Series("nv_trt_llm_request_metrics", (("request_type", "scheduled"),)),),
        (Series("nv_trt_llm_request_metrics", (("request_type", "waiting"),)),),
        (Series("nv_trt_llm_kv_cache_block_metrics", (("kv_cache_block_type", "fraction"),)),),
        kv_blocks=(Series("nv_trt_llm_kv_cache_block_metrics", (("kv_cache_block_type", "max"),)),),
        kv_block_tokens=(
            Series("nv_trt_llm_kv_cache_block_metrics", (("kv_cache_block_type", "tokens_per"),)),
        ),
    ),
    Engine(
        "tgi_",  # text-generation-inference; does not show its KV cache
        (Series("tgi_batch_current_size"),),
        (Series("tgi_queue_size"),),
    ),
)


def engines(plan: MetricsPlan) -> tuple[Engine, ...]:
    """Return the engines whose pages a pool's servers may have: the plan's own, or all known."""
    if plan.running is None or plan.waiting is None:
        return ENGINES
    return (Engine("", _series(plan.running), _series(plan.waiting), _series(plan.kv_cache_usage)),)


def _series(plan: SeriesPlan | None) -> tuple[Series, ...]:
    if plan is None:
        return ()
    return (Series(plan.name, tuple((label.name, label.value) for label in plan.labels)),)


@dataclass(frozen=True, slots=True)
class PageMetrics:
    """The load of one model server; None is "unknown", which never means idle.

    Attributes:
        running: requests in the batch, summed over engines.
        waiting: requests queued inside the server for a batch slot, summed over engines.
        kv_usage: fraction 0-1 of KV cache in use, the fullest engine.
        steps: that produced a token, since the start, summed over engines.
        step_tokens: prompt and answer tokens of these steps, 0 where they are unknown. vLLM counts
            a prompt in the step that ends its prefill.
        kv_capacity_tokens: that fit in the KV cache, summed over engines.
        prefix_hits: tokens found in the prefix cache since the start, summed over engines.
        answer_tokens: generated since the start, summed over engines.
    """

    running: int | None
    waiting: int | None
    kv_usage: float | None
    steps: float | None = None
    step_tokens: float = 0.0
    kv_capacity_tokens: int | None = None
    prefix_hits: float | None = None
    answer_tokens: float | None = None


UNKNOWN = PageMetrics(None, None, None)


def parse_page(page: bytes, known: tuple[Engine, ...] = ENGINES) -> PageMetrics:
    """Read the signals of the first engine whose page it is; never raises."""
    for engine in known:
        if engine.publishes(page):
            steps, step_tokens = _total(page, engine.steps), _total(page, engine.step_tokens)
            if steps is None or step_tokens is None:  # one is worth nothing without the other
                steps, step_tokens = None, 0.0
            return PageMetrics(
                running=_count(page, engine.running),
                waiting=_count(page, engine.waiting),
                kv_usage=_fullest(page, engine.kv_usage),
                steps=steps,
                step_tokens=step_tokens,
                kv_capacity_tokens=_kv_capacity(page, engine),
                prefix_hits=_total(page, engine.prefix_hits),
                answer_tokens=_total(page, engine.answer_tokens),
            )
    return UNKNOWN


def _count(page: bytes, series: tuple[Series, ...]) -> int | None:
    values = _values(page, series)
    if not values or any(value > MAX_REQUESTS or value != int(value) for value in values):
        return None
    return int(sum(values))


def _total(page: bytes, series: tuple[Series, ...]) -> float | None:
    values = _values(page, series)
    if not values or any(value > MAX_TOTAL for value in values):
        return None
    return sum(values)


def _kv_capacity(page: bytes, engine: Engine) -> int | None:
    if engine.kv_tokens:
        capacity = sum(_values(page, engine.kv_tokens))
    else:
        blocks = _values(page, engine.kv_blocks)
        tokens = _values(page, engine.kv_block_tokens)
        if len(blocks) != len(tokens):
            return None
        capacity = sum(map(operator.mul, blocks, tokens))
    return int(capacity) if 0 < capacity <= MAX_TOTAL else None  # vLLM has no blocks at first


def _fullest(page: bytes, series: tuple[Series, ...]) -> float | None:
    fullest = max(_values(page, series), default=None)
    return None if fullest is None or fullest > 1 else fullest


def _values(page: bytes, series: tuple[Series, ...]) -> list[float]:
    """Return the values of the first series the page has; none if one of them is unbelievable."""
    try:
        for one in series:
            if values := list(_samples(page, one)):
                return values
    except _UnbelievableError:
        pass
    return []


def _samples(page: bytes, series: Series) -> Iterator[float]:
    """Yield the value of each sample of the series.

    All samples of a metric are one group of lines (both formats demand it), so the search ends with
    the group and most of the page is never looked at. Comments inside a group are not the end.
    Only for a scattered series the rest of the page is searched.

    Raises:
        _UnbelievableError: a line does not have the form of a sample of a count or fraction, or
            there are too many.
    """
    end_of_name = _next_sample(page, series, 0)
    if end_of_name < 0:
        return
    for _ in range(MAX_SERIES):
        end_of_line = page.find(b"\n", end_of_name, end_of_name + MAX_LINE_BYTES)
        if end_of_line < 0:
            end_of_line = len(page)
        if end_of_line - end_of_name > MAX_LINE_BYTES:
            raise _UnbelievableError
        yield from _sample(page, end_of_name, end_of_line, series)
        for _ in range(MAX_COMMENTS):
            if not page.startswith(b"\n#", end_of_line):
                break
            end_of_line = page.find(b"\n", end_of_line + 1)
        end_of_name = end_of_line + len(series.line_start)
        if not page.startswith(series.line_start, end_of_line) or _goes_on(page, end_of_name):
            if not series.scattered:
                return
            end_of_name = _next_sample(page, series, end_of_line)
            if end_of_name < 0:
                return
    raise _UnbelievableError


def _next_sample(page: bytes, series: Series, start: int) -> int:
    """Return where the name ends in the next line that begins with it; -1 if there is none."""
    if not start and page.startswith(series.name) and not _goes_on(page, len(series.name)):
        return len(series.name)
    at = page.find(series.line_start, start)
    while at >= 0:
        end = at + len(series.line_start)
        if not _goes_on(page, end):
            return end
        at = page.find(series.line_start, end)
    return -1


def _goes_on(page: bytes, end: int) -> bool:
    """Return whether this is not the end of a name but another name that begins like it."""
    return page[end : end + 1] not in (b"{", b" ", b"\t")


def _sample(page: bytes, start: int, end: int, series: Series) -> Iterator[float]:
    """Yield the value of a line whose name ends at `start`, if the series has it."""
    match = _SAMPLE.fullmatch(page, start, end)
    if match is None:
        raise _UnbelievableError
    labels, value = match.groups()
    if series.labels and not series.selects(labels):
        return
    factors = [value]
    if series.value_labels:
        given = dict(_LABEL.findall(labels or b""))
        factors = [given.get(label, b"") for label in series.value_labels]
    if not all(map(_NUMBER.fullmatch, factors)):
        raise _UnbelievableError
    try:
        yield math.prod(map(float, factors))
    except ValueError as error:  # 1.2.3
        raise _UnbelievableError from error
