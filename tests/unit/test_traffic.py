"""traffic.py: counters of the data-plane loop."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from observed import complete, decide

from forebay_epp.core.terms import Dispatched, Outcome, Refused, Request, Shadowed
from forebay_epp.traffic import (
    MAX_LABEL_LENGTH,
    MAX_MODEL_LABELS,
    NO_STATUS,
    OTHER_MODEL,
    SECONDS_BUCKETS,
    UNMATCHED_MODEL,
    Histogram,
    ModelLabels,
    Traffic,
)


@given(st.lists(st.floats(0, 100)))
def test_a_value_counts_under_the_least_bound_that_holds_it(values):
    """Bounds are inclusive, and every value is in exactly one count."""
    histogram = Histogram()
    for value in values:
        histogram.add(value)

    assert sum(histogram.counts) == len(values)
    for number, bound in enumerate(SECONDS_BUCKETS):
        assert sum(histogram.counts[: number + 1]) == sum(value <= bound for value in values)


def test_counts_outcomes_by_band_model_and_outcome():
    """Each combination has its own count."""
    traffic = Traffic()
    traffic.configure(["chat"])
    decide(traffic, "Critical", "chat", Outcome.DISPATCHED, 0.5)
    decide(traffic, "Critical", "chat", Outcome.DISPATCHED, 0.5)
    decide(traffic, "Sheddable", "chat", Outcome.EVICTED_TTL, 10.0)

    assert traffic.outcomes == {
        ("Critical", "chat", Outcome.DISPATCHED): 2,
        ("Sheddable", "chat", Outcome.EVICTED_TTL): 1,
    }
    assert traffic.waits["Critical"].total == 1.0


def test_counts_what_a_plan_that_observes_would_do():
    """By band and model; a model that has lost its label counts as another from then on."""
    traffic = Traffic()
    traffic.configure(["chat"])
    chat = Request(1, "chat", 1, band="Standard", flow="chat")
    for waited_seconds, overtaken in ((1.5, False), (2.0, True)):
        decision = Dispatched(1, "10.0.0.1:8000", waited_seconds)
        traffic.shadowed(Shadowed(chat, decision, overtaken))
    refused = Refused(2, Outcome.REJECTED_QUEUE_FULL, 1, 0.0, "")
    traffic.shadowed(Shadowed(chat, refused, overtaken=False))
    traffic.configure([])

    shadow = traffic.shadow
    assert shadow.outcomes == {
        ("Standard", OTHER_MODEL, Outcome.DISPATCHED): 2,
        ("Standard", OTHER_MODEL, Outcome.REJECTED_QUEUE_FULL): 1,
    }
    assert shadow.waited == {("Standard", OTHER_MODEL): 3.5}
    assert shadow.overtaken == {("Standard", OTHER_MODEL): 1}
    assert sum(shadow.waits["Standard"].counts) == 2
    assert not traffic.outcomes


def test_counts_how_wrong_predicted_waits_were():
    """Of requests that were dispatched, too much and too little alike."""
    traffic = Traffic()
    for waited_seconds, predicted_seconds in ((3.0, 2.0), (1.0, 3.0), (1.0, None)):
        request = Request(1, "m", 1, band="Critical", predicted_seconds=predicted_seconds)
        traffic.decided(request, Dispatched(1, "10.0.0.1:8000", waited_seconds), 0.0)
    request = Request(1, "m", 1, band="Critical", predicted_seconds=1.0)
    traffic.decided(request, Refused(1, Outcome.EVICTED_TTL, 1, 9.0, ""), 0.0)

    assert sum(traffic.wait_errors["Critical"].counts) == 2
    assert traffic.wait_errors["Critical"].total == 3.0


@pytest.mark.parametrize("outcome", Outcome)
def test_only_requests_that_were_queued_have_waited(outcome):
    """What is rejected before it is queued would make the queue look fast."""
    traffic = Traffic()
    decide(traffic, "Standard", "chat", outcome, 0.0)

    assert bool(traffic.waits) == outcome.startswith(("Dispatched", "Evicted"))


def test_models_beyond_the_cap_share_a_label():
    """A plan may have thousands of models, and each label is several series."""
    traffic = Traffic()
    models = [f"m{number}" for number in range(10 * MAX_MODEL_LABELS)]
    traffic.configure(models)
    for model in models:
        decide(traffic, "Standard", model, Outcome.DISPATCHED, 0.0)
        complete(traffic, "Standard", model, 200, 1.0, 1, 1)

    labels = {model for _, model, _ in traffic.outcomes}
    assert labels == {*models[:MAX_MODEL_LABELS], OTHER_MODEL}
    assert traffic.prompt_tokens[OTHER_MODEL] == 9 * MAX_MODEL_LABELS
    assert len(traffic.completion_tokens) == MAX_MODEL_LABELS + 1


def test_invented_names_take_no_label():
    """What matches no model has one label, what was not read none, and both never run out."""
    traffic = Traffic()
    traffic.configure(["real"])
    for _ in range(2 * MAX_MODEL_LABELS):
        decide(traffic, "Standard", "", Outcome.DISPATCHED, 0.0)
        traffic.answered(1, Outcome.REJECTED_BAD_REQUEST, 0.0)
    decide(traffic, "Standard", "real", Outcome.DISPATCHED, 0.0)

    assert {model for _, model, _ in traffic.outcomes} == {"real", UNMATCHED_MODEL, ""}


@pytest.mark.parametrize("name", [UNMATCHED_MODEL, OTHER_MODEL])
def test_a_model_may_not_pass_for_the_unmatched(name):
    """A model of that name is counted as other, so `unmatched` is what it says."""
    labels = ModelLabels()
    labels.configure([name, "chat"])

    assert [labels.label(flow) for flow in (name, "chat", "")] == [
        OTHER_MODEL,
        "chat",
        UNMATCHED_MODEL,
    ]


def test_models_that_come_and_go_leave_no_series():
    """What was counted for them is kept in the sum, under `other`."""
    traffic = Traffic()
    for number in range(1000):
        traffic.configure(["stays", f"m{number}"])
        for model in ("stays", f"m{number}"):
            decide(traffic, "Standard", model, Outcome.DISPATCHED, 0.0)
            complete(traffic, "Standard", model, 200, 1.0, 2, 3)

    assert traffic.outcomes == {
        ("Standard", "stays", Outcome.DISPATCHED): 1000,
        ("Standard", "m999", Outcome.DISPATCHED): 1,
        ("Standard", OTHER_MODEL, Outcome.DISPATCHED): 999,
    }
    assert traffic.prompt_tokens == {"stays": 2000, "m999": 2, OTHER_MODEL: 1998}
    assert traffic.completion_tokens == {"stays": 3000, "m999": 3, OTHER_MODEL: 2997}


def test_a_model_keeps_its_label_while_the_plan_has_it():
    """Older models that appear before it in the plan do not push it out."""
    labels = ModelLabels()
    labels.configure(["mine"])
    labels.configure([*(f"m{number}" for number in range(2 * MAX_MODEL_LABELS)), "mine"])

    assert labels.label("mine") == "mine"
    assert labels.label(f"m{MAX_MODEL_LABELS - 2}") == f"m{MAX_MODEL_LABELS - 2}"
    assert labels.label(f"m{MAX_MODEL_LABELS - 1}") == OTHER_MODEL


@given(st.text(st.characters(), min_size=1, max_size=3 * MAX_LABEL_LENGTH))
def test_a_label_is_short_and_valid_utf_8(model):
    """Lone surrogates and long names do not reach the page."""
    labels = ModelLabels()
    labels.configure([model])

    assert len(labels.label(model).encode().decode()) <= MAX_LABEL_LENGTH


@pytest.mark.parametrize(
    ("status", "status_class"),
    [
        (200, "2xx"),
        (404, "4xx"),
        (599, "5xx"),
        (0, NO_STATUS),
        (99, NO_STATUS),
        (600, NO_STATUS),
        (-1, NO_STATUS),
    ],
)
def test_counts_answers_by_class_of_status(status, status_class):
    """A status that is none has a class of its own."""
    traffic = Traffic()
    complete(traffic, "Standard", "chat", status, 1.0, 0, 0)

    assert traffic.responses == {status_class: 1}


@pytest.mark.parametrize("tokens", [-1, 0, 10**9, 10**400])
def test_token_counts_that_cannot_be_are_not_counted(tokens):
    """They come from the model server, and a counter never goes down."""
    traffic = Traffic()
    complete(traffic, "Standard", "chat", 200, 1.0, tokens, tokens)

    assert traffic.prompt_tokens == {}
    assert traffic.completion_tokens == {}


def test_the_worst_stall_is_told_once():
    """It is the worst since it was last asked for."""
    traffic = Traffic()
    for seconds in (0.001, 0.2, 0.01):
        traffic.stalled(seconds)

    assert traffic.take_worst_stall() == 0.2
    assert traffic.take_worst_stall() == 0.0
    assert sum(traffic.stalls.counts) == 3


def test_streams_open_are_those_opened_and_not_closed():
    """Refused streams were opened too."""
    traffic = Traffic()
    traffic.stream_opened()
    traffic.stream_opened()
    traffic.stream_refused()
    traffic.stream_closed()

    assert traffic.streams_open == 1
    assert traffic.streams_opened == 2
    assert traffic.streams_refused == 1
