"""What a plan must be, and how the errors say so: the same for operator, command line and EPP."""

from __future__ import annotations

from dataclasses import make_dataclass
from typing import Annotated

import pytest

from forebay_control import fields
from forebay_control.plan import (
    BandPlan,
    LimitsPlan,
    MetricsPlan,
    ModelPlan,
    ObjectivePlan,
    Plan,
    PlanError,
    SaturationMode,
    SaturationPlan,
    SeriesLabelPlan,
    SeriesPlan,
    TargetPlan,
    UnmatchedPlan,
)

ONE_BAND = (BandPlan("Standard", 0),)
COUNT = "must be 1 to 1000000, is"
BYTES = "must be 1 to 1099511627776, is"
SECONDS = "must be above 0 and at most 3600, is"
NAN = float("nan")


def in_band(**given):
    return Plan(bands=(BandPlan("Standard", 0, **given),))


def model(*targets, name="m", band="Standard"):
    return Plan(models=(ModelPlan(name, band, targets),))


def metrics(running="r", waiting="w", **given):
    series = {"running": running, "waiting": waiting}
    parts = {name: SeriesPlan(text) for name, text in series.items() if text is not None}
    return Plan(metrics=MetricsPlan(**parts, **given))


@pytest.mark.parametrize(
    ("plan", "path", "what"),
    [
        (Plan(pool="p" * 318), "pool", "must have 0-317 characters, has 318"),
        (Plan(bands=()), "bands", "must have 1-64 entries, has 0"),
        (
            Plan(bands=(*ONE_BAND, *(BandPlan(f"b{n}", n) for n in range(1, 65)))),
            *("bands", "must have 1-64 entries, has 65"),
        ),
        (
            Plan(bands=(*ONE_BAND, BandPlan("", 1))),
            *("bands[1].name", "must have 1-253 characters, has 0"),
        ),
        (
            Plan(bands=(*ONE_BAND, BandPlan("Standard", 1))),
            *("bands[1].name", "must be unique, and 'Standard' is that of [0]"),
        ),
        (
            Plan(bands=(*ONE_BAND, BandPlan("b", 0))),
            *("bands[1].priority", "must be unique, and 0 is that of [0]"),
        ),
        (
            Plan(bands=(*ONE_BAND, BandPlan("b", 2**31))),
            *("bands[1].priority", "must be -2147483648 to 2147483647, is 2147483648"),
        ),
        (in_band(ttl_seconds=0), "bands[0].ttlSeconds", f"{SECONDS} 0"),
        (in_band(ttl_seconds=NAN), "bands[0].ttlSeconds", f"{SECONDS} nan"),
        (in_band(ttl_seconds=float("inf")), "bands[0].ttlSeconds", f"{SECONDS} inf"),
        (in_band(max_requests=0), "bands[0].maxRequests", f"{COUNT} 0"),
        (in_band(max_requests=1_000_001), "bands[0].maxRequests", f"{COUNT} 1000001"),
        (in_band(max_bytes=-1), "bands[0].maxBytes", f"{BYTES} -1"),
        (in_band(flow_max_requests=0), "bands[0].flowMaxRequests", f"{COUNT} 0"),
        (in_band(flow_max_bytes=0), "bands[0].flowMaxBytes", f"{BYTES} 0"),
        (
            Plan(models=tuple(ModelPlan(f"m{n}", "Standard") for n in range(4097))),
            *("models", "must have 0-4096 entries, has 4097"),
        ),
        (model(name=""), "models[0].name", "must have 1-256 characters, has 0"),
        (
            Plan(models=(ModelPlan("m", "Standard"), ModelPlan("m", "Critical"))),
            *("models[1].name", "must be unique, and 'm' is that of [0]"),
        ),
        (model(band="Gold"), "models[0].band", "no band is named 'Gold'"),
        (
            model(*(TargetPlan(f"t{n}") for n in range(11))),
            *("models[0].targets", "must have 0-10 entries, has 11"),
        ),
        (
            model(TargetPlan("t"), TargetPlan("")),
            *("models[0].targets[1].name", "must have 1-253 characters, has 0"),
        ),
        (model(TargetPlan("t", 0)), "models[0].targets[0].weight", f"{COUNT} 0"),
        (Plan(unmatched=UnmatchedPlan(band="Gold")), "unmatched.band", "no band is named 'Gold'"),
        (Plan(limits=LimitsPlan(max_requests=0)), "limits.maxRequests", f"{COUNT} 0"),
        (Plan(limits=LimitsPlan(max_bytes=0)), "limits.maxBytes", f"{BYTES} 0"),
        (Plan(limits=LimitsPlan(max_body_bytes=0)), "limits.maxBodyBytes", f"{BYTES} 0"),
        (
            Plan(saturation=SaturationPlan(SaturationMode.CONCURRENCY, 0)),
            *("saturation.maxConcurrency", f"{COUNT} 0"),
        ),
        (
            Plan(saturation=SaturationPlan(kv_cache_usage_threshold=1.5)),
            *("saturation.kvCacheUsageThreshold", "must be above 0 and at most 1, is 1.5"),
        ),
        (Plan(no_endpoints_ttl_seconds=0), "noEndpointsTtlSeconds", f"{SECONDS} 0"),
        (
            Plan(objectives=(ObjectivePlan("o", "Gold"),)),
            *("objectives[0].band", "no band is named 'Gold'"),
        ),
        (
            Plan(objectives=(ObjectivePlan("o", "Standard"),) * 2),
            *("objectives[1].name", "must be unique, and 'o' is that of [0]"),
        ),
        (
            metrics(path="metrics"),
            "metrics.path",
            """must be an absolute path of a URL, such as "/metrics", is 'metrics'""",
        ),
        (metrics(port=65536), "metrics.port", "must be 0 to 65535, is 65536"),
        (metrics(waiting=None), "metrics", "running and waiting must be set together"),
        (
            metrics(None, None, kv_cache_usage=SeriesPlan("kv")),
            *("metrics.kvCacheUsage", "needs running and waiting"),
        ),
        (
            metrics("a{}"),
            *("metrics.running.name", "must be a metric's name, without labels, is 'a{}'"),
        ),
        (
            metrics(kv_cache_usage=SeriesPlan("kv", (SeriesLabelPlan("a b"),))),
            "metrics.kvCacheUsage.labels[0].name",
            "must be a label of letters, digits and underscores, is 'a b'",
        ),
    ],
)
def test_a_plan_that_cannot_be_applied_says_where_and_why(plan, path, what):
    """Each rule names the field in the words of the resources, and no other field."""
    with pytest.raises(PlanError) as raised:
        plan.validate()

    assert (path, what) in raised.value.problems
    assert f"{path}: {what}" in str(raised.value)


def test_every_problem_of_a_plan_is_told_at_once():
    """An author who repairs a plan sees all problems, not one at each attempt."""
    plan = Plan(
        bands=(BandPlan("Standard", 0, ttl_seconds=-1), BandPlan("b", 0)),
        models=(ModelPlan("m", "Gold"),),
        unmatched=UnmatchedPlan(band="Silver"),
    )

    with pytest.raises(PlanError) as raised:
        plan.validate()

    assert {path for path, _ in raised.value.problems} == {
        *("bands[0].ttlSeconds", "bands[1].priority", "models[0].band", "unmatched.band"),
    }


def test_the_default_plan_is_valid():
    """A pool without any policy works."""
    Plan().validate()


def test_a_request_without_a_model_means_the_only_one():
    """Of several, none; without any, no model in particular."""
    chat, code = ModelPlan("chat", "Standard"), ModelPlan("code", "Standard")

    assert Plan().default_model == ""
    assert Plan(models=(chat,)).default_model == "chat"
    assert Plan(models=(chat, code)).default_model is None


@pytest.mark.parametrize(
    "hint",
    [
        dict[str, int],
        int | str,
        tuple[int, int],
        tuple[Annotated[int, fields.Range(0, 1)], ...],
    ],
)
def test_a_field_of_a_type_that_no_mapping_knows_is_refused(hint):
    """A declaration that would be half honoured is the author's error, at once."""
    with pytest.raises(TypeError, match="odd"):
        fields.fields_of(make_dataclass("Odd", [("odd", hint)], frozen=True))
