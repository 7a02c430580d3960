"""Names of the beginnings of prompts: equal exactly where prompts begin alike."""

from __future__ import annotations

import json

import pytest

from forebay_epp.codec import openai
from forebay_epp.codec.openai.prompts import MAX_BLOCKS
from forebay_epp.core.terms import PREFIX_BLOCK_BYTES

SYSTEM = {"role": "system", "content": "s" * 3000}
FIRST = {"role": "user", "content": "first " * 400}
ANSWER = {"role": "assistant", "content": "answer " * 400}
OTHER = {"role": "user", "content": "other " * 400}


def names(*messages, model="m", **more):
    body = json.dumps({"model": model, **more, "messages": messages}).encode()
    return openai.read_prefix(body, model)


def common(one, other):
    """How many blocks two prompts begin with."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


def test_a_conversation_goes_on_where_it_was():
    """All full blocks of a turn are the first of the next turn's."""
    turn = names(SYSTEM, FIRST)
    later = names(SYSTEM, FIRST, ANSWER, OTHER)

    assert len(turn) == 5
    assert later[:5] == turn
    assert len(later) > 9


def test_a_shared_system_prompt_is_shared_up_to_its_last_full_block():
    """What follows differs in every block, even where the text is the same."""
    one, other = names(SYSTEM, FIRST, ANSWER), names(SYSTEM, OTHER, ANSWER)

    assert common(one, other) == 2
    assert not set(one[2:]) & set(other[2:])


@pytest.mark.parametrize(
    "other",
    [
        {"model": "adapter"},
        {"cache_salt": "acme"},
        {"tools": [{"type": "function", "function": {"name": "look"}}]},
        {"system": "be brief"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_makes_caches_separate_makes_names_different(other):
    """Another model or adapter, another salt, and what a template puts before the messages."""
    assert not set(names(SYSTEM, FIRST)) & set(names(SYSTEM, FIRST, **other))


def test_what_no_model_sees_makes_no_difference():
    """Sampling parameters, streaming, and where they stand in the body."""
    assert names(SYSTEM, FIRST, temperature=0.5, stream=True) == names(SYSTEM, FIRST)


@pytest.mark.parametrize("field", ["prompt", "input"])
def test_prompts_that_are_no_messages_have_names(field):
    """Completions and Responses."""
    body = json.dumps({"model": "m", field: "word " * 1000}).encode()

    assert len(openai.read_prefix(body, "m")) == 5000 // PREFIX_BLOCK_BYTES


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[1]" + b" " * 2000, b"x" * 2000, b'{"a": "' + b"b" * 2000 + b'"}']
)
def test_what_has_no_prompt_has_no_names(body):
    """Short bodies, other JSON, and what is none."""
    assert openai.read_prefix(body, "m") == ()


def test_a_very_long_prompt_has_names_for_its_beginning():
    """So that no client makes the index grow by one request beyond a bound."""
    body = json.dumps({"prompt": "w" * (2 * MAX_BLOCKS * PREFIX_BLOCK_BYTES)}).encode()

    assert len(openai.read_prefix(body, "m")) == MAX_BLOCKS


def test_names_say_nothing_of_the_prompt():
    """They are numbers."""
    assert all(isinstance(name, int) for name in names(SYSTEM, FIRST))
