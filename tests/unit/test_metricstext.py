"""codec/metricstext.py: a few numbers out of a page that is not trusted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_control.plan import MetricsPlan, SeriesLabelPlan, SeriesPlan
from forebay_epp.codec.metricstext import (
    MAX_LINE_BYTES,
    MAX_SERIES,
    PageMetrics,
    engines,
    parse_page,
)
from forebay_sim.hardware import PRESETS
from forebay_sim.metricspage import ENGINES, Load, MetricsPage
from forebay_sim.stepping import StepEngine
from forebay_sim.terms import EngineRequest

MODEL = 'engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"'
UNKNOWN = PageMetrics(None, None, None)


def realistic_page(size_bytes: int) -> bytes:
    """A page as vLLM writes it: the gauges first, then histograms up to the size."""
    lines = [
        "# HELP python_gc_objects_collected_total Objects collected during gc",
        "# TYPE python_gc_objects_collected_total counter",
        'python_gc_objects_collected_total{generation="0"} 14350.0',
    ]
    for name, value in (
        ("num_requests_running", 3.0),
        ("num_requests_waiting", 1.0),
        ("kv_cache_usage_perc", 0.25),
    ):
        lines += [
            f"# HELP vllm:{name} Describes vllm:{name} 9.0",
            f"# TYPE vllm:{name} gauge",
            f"vllm:{name}{{{MODEL}}} {value}",
        ]
    size = sum(len(line) + 1 for line in lines)
    number = 0
    while size < size_bytes:
        family = f"vllm:request_time_{number // 60}_seconds"
        bound = number % 60 * 0.05
        lines.append(f'{family}_bucket{{le="{bound:.2f}",{MODEL}}} {number * 7}.0')
        size += len(lines[-1]) + 1
        number += 1
    return ("\n".join(lines) + "\n").encode()


def running(page: bytes) -> int | None:
    """What the page says of running requests."""
    return parse_page(page).running


def test_reads_the_signals_of_a_realistic_page():
    """A vLLM page gives whole numbers of running and waiting, and the KV usage."""
    assert parse_page(realistic_page(300_000)) == PageMetrics(3, 1, 0.25)


def test_sums_counts_over_engines_and_takes_the_fullest_cache():
    """Data-parallel engines share one page."""
    page = b"""\
vllm:num_requests_running{engine="0"} 3.0
vllm:num_requests_running{engine="1"} 4.0
vllm:num_requests_waiting{engine="0"} 0.0
vllm:num_requests_waiting{engine="1"} 2.0
vllm:kv_cache_usage_perc{engine="0"} 0.9
vllm:kv_cache_usage_perc{engine="1"} 0.1
"""

    assert parse_page(page) == PageMetrics(7, 2, 0.9)


def test_reads_the_old_name_of_the_cache_usage():
    """Until the end of 2025 vLLM called it gpu_cache_usage_perc."""
    assert parse_page(b"vllm:gpu_cache_usage_perc 0.5\n").kv_usage == 0.5


def test_prefers_the_new_name_of_the_cache_usage():
    """A page with both names counts once."""
    page = b"vllm:gpu_cache_usage_perc 0.9\nvllm:kv_cache_usage_perc 0.5\n"

    assert parse_page(page).kv_usage == 0.5


@pytest.mark.parametrize("kind", sorted(ENGINES.keys() - {"other"}))
def test_reads_the_page_of_every_known_model_server(kind):
    """Each has its own names and labels; only text-generation-inference hides its cache."""
    page = MetricsPage(StepEngine(PRESETS["plain"]), 'a"b', loras=True, kind=kind)

    metrics = parse_page(page.render(Load(running=5, waiting=2, kv=0.25)).encode())

    assert (metrics.running, metrics.waiting) == (5, 2)
    assert metrics.kv_usage == (None if kind == "tgi" else 0.25)
    plain = PRESETS["plain"]
    capacity = plain.kv_blocks * plain.block_size_tokens
    assert metrics.kv_capacity_tokens == (None if kind == "tgi" else capacity)


@pytest.mark.parametrize(
    ("blocks", "capacity"),
    [
        (("100", "200"), 4800),
        (("None",), None),  # a vLLM that starts
        (("0",), None),
        (("1e300",), None),
        (("-5", "100"), None),
    ],
)
def test_sums_the_kv_caches_of_engines_or_knows_nothing_of_them(blocks, capacity):
    """One engine whose size cannot be true makes the sum unknown."""
    labels = 'block_size="16",engine="{}",num_gpu_blocks="{}"'
    page = "vllm:num_requests_running 1\n" + "".join(
        f"vllm:cache_config_info{{{labels.format(number, given)}}} 1.0\n"
        for number, given in enumerate(blocks)
    )

    assert parse_page(page.encode()).kv_capacity_tokens == capacity


def test_reads_the_steps_of_an_engine_and_their_tokens():
    """From a page of the simulated server: a prompt of 30 tokens, then two more steps."""
    engine = StepEngine(PRESETS["plain"])
    engine.submit(EngineRequest(1, 30, 3), 0.0)
    engine.advance(1.0)
    page = MetricsPage(engine, "m", loras=False).render(Load())

    metrics = parse_page(page.encode())

    assert (metrics.steps, metrics.step_tokens) == (3, 33)


def test_sums_the_steps_of_engines_whose_histograms_follow_each_other():
    """Buckets of the second come between; one that cannot be true makes the sum unknown."""
    name = b"vllm:iteration_tokens_total"
    lines = [
        b'%b_bucket{engine="%d",le="1"} 1\n%b_count{engine="%d"} %d.0\n%b_sum{engine="%d"} 9.5\n'
        % (name, number, name, number, 10 + number, name, number)
        for number in range(3)
    ]
    page = b"vllm:num_requests_running 1\n" + b"".join(lines)

    assert (parse_page(page).steps, parse_page(page).step_tokens) == (33, 28.5)
    assert parse_page(page.replace(b" 11.0", b" NaN")).steps is None
    assert parse_page(page.replace(b" 11.0", b" 1e16")).steps is None


def test_what_waits_for_its_grammar_does_not_count_as_waiting():
    """What vLLM calls deferred says nothing about free slots in its batch."""
    page = MetricsPage(StepEngine(PRESETS["plain"]), "m", loras=False)

    assert parse_page(page.render(Load(running=1, waiting=2, deferred=5)).encode()).waiting == 2


def test_a_page_of_waiting_by_reason_without_the_known_reason_is_read_as_before():
    """The sum is better than nothing."""
    page = b'vllm:num_requests_waiting 4\nvllm:num_requests_waiting_by_reason{reason="other"} 4\n'

    assert parse_page(page).waiting == 4


# As the real servers write them, shortened.
REAL_PAGES = {
    "triton": (
        b"# HELP nv_trt_llm_request_metrics TRT LLM request metrics\n"
        b"# TYPE nv_trt_llm_request_metrics gauge\n"
        b'nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="waiting",version="1"} 1\n'
        b'nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="context",version="1"} NaN\n'
        b'nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="scheduled",version="1"} 3\n'
        b'nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="max",version="1"} 512\n'
        b'nv_trt_llm_request_metrics{model="other",request_type="scheduled",version="1"} 4\n'
        b'nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max",model="tensorrt_llm"} 64\n'
        b'nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="fraction",model="other"} 0.5\n'
    ),
    "openmetrics": (
        b"# TYPE trtllm_num_requests_running gauge\n"
        b'trtllm_num_requests_running{model_name="m"} 7.0 1790000000.123\n'
        b'trtllm_num_requests_waiting{model_name="m"} 1.0 1.79e9 # {trace_id="a b"} 0.67 1.0\n'
        b"trtllm_kv_cache_utilization 0.5\n# EOF\n"
    ),
}


@pytest.mark.parametrize("name", REAL_PAGES)
def test_other_labels_and_forms_do_not_disturb(name):
    """Only series with the right label count, over all models; timestamps may be fractions."""
    assert parse_page(REAL_PAGES[name]) == PageMetrics(7, 1, 0.5)


def test_comments_within_a_group_of_samples_do_not_end_it():
    """Some exporters repeat them for each sample."""
    page = (
        b"# TYPE tgi_queue_size gauge\n"
        b'tgi_queue_size{a="1"} 1\n# TYPE tgi_queue_size gauge\n# x\ntgi_queue_size{a="2"} 2\n#'
    )

    assert parse_page(page).waiting == 3


def test_a_policy_can_name_the_series():
    """By name and labels, which are compared as the page escapes them; a missing one is empty."""
    plan = MetricsPlan(
        running=SeriesPlan(
            "jobs", (SeriesLabelPlan("state", "run"), SeriesLabelPlan("node", 'a"b\\c\nd'))
        ),
        waiting=SeriesPlan("jobs", (SeriesLabelPlan("state"),)),
        kv_cache_usage=SeriesPlan("cache", (SeriesLabelPlan("kind", "kv"),)),
    )
    page = (
        b'jobs{state="run",node="a\\"b\\\\c\\nd"} 2\n'
        b'jobs{node="x",state="run"} 50\n'
        b'jobs{node="a\\"b\\\\c\\nd" , state = "run",} 3\n'
        b'jobs{note="state=\\"run\\""} 4\n'
        b"jobs 1\n"
        b'cache{kind="kv"} 0.75\ncache{kind="disk"} 0.9\n'
    )

    assert parse_page(page, engines(plan)) == PageMetrics(5, 5, 0.75)
    assert parse_page(b"vllm:num_requests_running 3\n", engines(plan)) == UNKNOWN


@pytest.mark.parametrize(
    "line",
    [
        b"vllm:num_requests_running 3",
        b"vllm:num_requests_running 3.0\r\n",
        b"vllm:num_requests_running\t3.0 \n",
        b"vllm:num_requests_running 3e0\n",
        b"vllm:num_requests_running 3.0 1790000000000\n",
        b"vllm:num_requests_running {} 3.0 -5\n",
        b'vllm:num_requests_running{a="} 9",} 3.0\n',
        b'vllm:num_requests_running{a="\\"} 9",b="\\\\"} 3.0 1790000000000\n',
        b'vllm:num_requests_running{a=" { x=1 } 7 ",b="\xff"} 3.0\n',
        b"# HELP vllm:num_requests_running 9\nvllm:num_requests_running 3.0\n",
        b"# HELP x\\n\n# TYPE vllm:num_requests_running gauge\r\nvllm:num_requests_running 3.0\r\n",
        b"vllm:num_requests_running_total 9.0\nvllm:num_requests_running 3.0\n",
        b"vllm:num_requests_running 3.0\nvllm:num_requests_running_total 9.0\n",
        b'x{a="vllm:num_requests_running 9"} 1\nvllm:num_requests_running 3.0\n',
    ],
)
def test_reads_every_form_a_sample_may_have(line):
    """Blanks, timestamps, odd labels, comments and longer names do not disturb."""
    assert running(line) == 3


@pytest.mark.parametrize(
    "value",
    [
        *(b"NaN", b"nan", b"Inf", b"+Inf", b"-Inf", b"inf", b"-1", b"-1.0", b"1e308", b"1e999"),
        *(b"2.5", b"1_0", b"0x10", b"1.2.3", b"1e", b".", b"", b"three", b"3 4 5", b"3 x", b"3,0"),
        *(b"\xc2\xb2", b"{", b"3}", b'{a="b} 3', b"1000001"),
    ],
)
def test_a_value_that_cannot_be_true_is_unknown(value):
    """It is not taken for idle, and does not hide what the page says of the rest."""
    page = b"vllm:num_requests_running " + value + b"\nvllm:num_requests_waiting 2\n"

    assert parse_page(page) == PageMetrics(None, 2, None)


def test_one_bad_engine_makes_the_signal_unknown():
    """A sum without one of its parts would be too low."""
    page = b'vllm:num_requests_running{e="0"} 3\nvllm:num_requests_running{e="1"} NaN\n'

    assert running(page) is None


@pytest.mark.parametrize("value", [b"-0.1", b"1.5", b"55", b"NaN"])
def test_a_cache_usage_outside_0_to_1_is_unknown(value):
    """Some servers write percent where a fraction is due."""
    assert parse_page(b"vllm:kv_cache_usage_perc " + value).kv_usage is None


def test_an_invalid_new_name_is_not_replaced_by_the_old_one():
    """The newest name a page has is the one that counts, also when it says nothing."""
    page = b"vllm:kv_cache_usage_perc NaN\nvllm:gpu_cache_usage_perc 0.0\n"

    assert parse_page(page).kv_usage is None


@pytest.mark.parametrize(
    "page",
    [
        b"",
        b"\n\n\n",
        b"<!DOCTYPE html><html><body>vllm:num_requests_running 3</body></html>",
        b"\x1f\x8b\x08\x00" + bytes(range(256)) * 50,
        b"vllm:num_requests_running",
        b"vllm:num_requests_running\n3",
        b"\xff\xfev\x00l\x00l\x00m\x00",
    ],
)
def test_a_page_without_signals_is_unknown(page):
    """HTML, compressed data and fragments say nothing."""
    assert parse_page(page) == UNKNOWN


def test_too_many_series_are_unknown():
    """Ten thousand engines in one server are a label bomb."""
    line = b'vllm:num_requests_running{engine="%d"} 1\n'
    page = b"".join(line % number for number in range(MAX_SERIES + 1))

    assert running(page) is None
    assert running(page[: page.rindex(b"vllm")]) == MAX_SERIES


@pytest.mark.parametrize("line", [b'nv_trt_llm_request_metrics{a="b"} 1\n', b"#\n"])
def test_a_page_of_nothing_else_is_not_read_to_its_end(line):
    """Samples that are not selected are bounded too, and so are comments between samples."""
    page = b'nv_trt_llm_request_metrics{request_type="scheduled"} 1\n' + line * 2 * MAX_SERIES
    page += b'nv_trt_llm_request_metrics{request_type="scheduled"} 1\n'

    assert running(page) in {None, 1}


def test_a_line_without_end_is_unknown():
    """An endless line is not searched to its end: the search holds the interpreter's lock."""
    labels = b'{a="' + b"x" * MAX_LINE_BYTES + b'"}'

    assert running(b"vllm:num_requests_running" + labels + b" 3\n") is None
    assert running(b"vllm:num_requests_running" + labels[: MAX_LINE_BYTES // 2] + b'"} 3\n') == 3


PIECES = st.sampled_from(
    [
        *(b"vllm:num_requests_running", b"vllm:num_requests_waiting", b"vllm:kv_cache_usage_perc"),
        *(b"vllm:cache_config_info", b'num_gpu_blocks="', b'block_size="'),
        *(b"{", b"}", b'"', b"\\", b" ", b"\n", b"\r", b"#", b"=", b",", b"1", b"1e9", b"NaN"),
    ]
)


@given(st.lists(PIECES | st.binary(max_size=8), max_size=60).map(b"".join))
def test_never_raises_and_never_believes_nonsense(page):
    """Whatever the bytes, each signal is unknown or within its bounds."""
    metrics = parse_page(page)

    assert metrics.running is None or 0 <= metrics.running <= 1_000_000 * MAX_SERIES
    assert metrics.waiting is None or 0 <= metrics.waiting <= 1_000_000 * MAX_SERIES
    assert metrics.kv_usage is None or 0 <= metrics.kv_usage <= 1
    assert metrics.kv_capacity_tokens is None or metrics.kv_capacity_tokens >= 0


@given(
    st.lists(st.integers(0, 5000), min_size=1, max_size=5),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)
def test_any_label_value_leaves_the_sum_right(counts, text):
    """Labels are escaped as the format says and then cannot be mistaken for values."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    page = "".join(
        f'vllm:num_requests_running{{engine="{number}",m="{escaped}"}} {count}.0\n'
        for number, count in enumerate(counts)
    )

    assert running(page.encode()) == sum(counts)
