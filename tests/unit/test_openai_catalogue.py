"""The list of models that clients get."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_control.plan import ModelPlan, Plan, UnmatchedAction, UnmatchedPlan
from forebay_epp.codec import openai
from forebay_epp.codec.openai import ServedModel

LLAMA = ServedModel("llama", 1700000000, "vllm")
CHAT = {"id": "chat", "object": "model", "created": 7, "owned_by": "forebay"}


def catalogue(*models, served=(), unmatched=UnmatchedAction.QUEUE):
    plan = Plan(
        models=tuple(ModelPlan(name, "Standard") for name in models),
        unmatched=UnmatchedPlan(unmatched),
    )
    made = openai.Catalogue(plan, created=7)
    made.serve(served)
    return made


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/v1/models", ""),
        ("GET", "/openai/v1/models/?limit=20", ""),
        ("GET", "/v1/models/chat", "chat"),
        ("GET", "/v1/models/meta-llama/Llama-3", "meta-llama/Llama-3"),
        ("GET", "/v1/models/meta-llama%2FLlama-3?x", "meta-llama/Llama-3"),
        ("GET", "/v1/modelsx", None),
        ("GET", "/models", None),
        ("POST", "/v1/models", None),
        ("", "", None),
    ],
)
def test_which_requests_ask_for_models(method, path, expected):
    """For all of them, or for one whose name may have slashes."""
    assert openai.asked_model(method, path) == expected


def test_the_plans_models_and_the_servers_are_listed_once():
    """A name that both have is the plan's."""
    made = catalogue("chat", served=[LLAMA, ServedModel("chat", 0, "vllm")])

    assert json.loads(made.answer("")) == {
        "object": "list",
        "data": [
            CHAT,
            {"id": "llama", "object": "model", "created": 1700000000, "owned_by": "vllm"},
        ],
    }
    assert json.loads(made.answer("chat")) == CHAT
    assert made.answer("gpt-x") is None
    assert made.complete


def test_where_unmatched_models_are_rejected_only_the_plans_are_listed():
    """Others could not be asked for."""
    made = catalogue("chat", served=[LLAMA], unmatched=UnmatchedAction.REJECT)

    assert json.loads(made.answer(""))["data"] == [CHAT]
    assert made.answer("llama") is None
    assert made.complete
    empty = catalogue(unmatched=UnmatchedAction.REJECT)
    assert json.loads(empty.answer("")) == {"object": "list", "data": []}


def test_while_no_server_has_said_what_it_serves_the_list_is_not_complete():
    """The plan's models are known; with none of them there is nothing to say."""
    assert catalogue().answer("") is None
    assert json.loads(catalogue("chat").answer(""))["data"] == [CHAT]
    assert not catalogue("chat").complete


def test_a_new_plan_makes_a_new_list():
    """So do servers that serve something else."""
    made = catalogue("chat")
    made.answer("")
    made.configure(Plan())
    assert made.answer("") is None
    made.serve([LLAMA])
    assert [model["id"] for model in json.loads(made.answer(""))["data"]] == ["llama"]


def test_a_servers_list_is_read():
    """What vLLM says of itself and an adapter; what cannot be is left out."""
    cards = [
        {"id": "llama", "object": "model", "created": 1700000000, "owned_by": "vllm", "root": "x"},
        {"id": "sql-lora", "parent": "llama", "created": -1, "owned_by": "a\nb"},
        {"id": ""},
        {"id": "x" * 257},
        {"id": "a\u0000"},
    ]
    page = json.dumps({"object": "list", "data": cards}).encode()

    assert openai.read_served(page) == (LLAMA, ServedModel("sql-lora", 0, ""))


@given(st.binary(max_size=50) | st.sampled_from([b"{}", b'{"data":1}', b"[" * 9999]))
def test_a_page_that_is_no_list_is_a_value_error(page):
    """Whatever a server answers."""
    with pytest.raises(ValueError, match="not a list of models"):
        openai.read_served(page)
