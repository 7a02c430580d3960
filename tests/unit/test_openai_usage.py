"""The usage of answers of all shapes and lengths, however they are cut into chunks."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_epp.codec import openai
from forebay_epp.codec.openai import usage

Usage = openai.Usage


def read(text, size=None, *, events=True):
    """Feed a text in chunks of a size and return its usage."""
    reader = openai.EventUsageReader() if events else openai.JSONUsageReader()
    size = size or len(text)
    for start in range(0, len(text), size):
        reader.feed(text[start : start + size])
    return reader.usage()


def event(data, name=""):
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data)}\n\n".encode()


CHAT = b"".join(
    [
        *[event({"choices": [{"delta": {"content": f"word {n}"}}]}) for n in range(50)],
        event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 50}}),
        b"data: [DONE]\n\n",
    ]
)
MESSAGES = b"".join(
    [
        event(
            {
                "type": "message_start",
                "message": {"content": [], "usage": {"input_tokens": 25, "output_tokens": 1}},
            },
            "message_start",
        ),
        event({"type": "content_block_delta", "delta": {"text": 'a "usage": {'}}),
        event({"type": "message_delta", "usage": {"output_tokens": 15}}, "message_delta"),
        event({"type": "message_stop"}, "message_stop"),
    ]
)


def responses(length):
    """A stream of the Responses API: its last event repeats instructions, tools and answer."""
    tool = {"parameters": {"properties": {"usage": {"input_tokens": 9, "output_tokens": 9}}}}
    response = {
        "instructions": "\\" * length + '{"usage":{"input_tokens":8}}' + '"' * length,
        "tools": [tool],
        "output": [{"content": [{"text": "}" * length}]}],
        "usage": {"input_tokens": 5, "input_tokens_details": {"cached": 1}, "output_tokens": 6},
        "metadata": {"usage": {"input_tokens": 7}},
    }
    return event({"type": "response.output_text.delta", "delta": "x"}) + event(
        {"type": "response.completed", "response": response}, "response.completed"
    )


@pytest.mark.parametrize("size", [7, 100, 4096, None])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CHAT, Usage(3, 50)),
        (CHAT.replace(b"\n", b"\r\n"), Usage(3, 50)),
        (MESSAGES, Usage(25, 15)),
        (responses(10), Usage(5, 6)),
        (responses(50_000), Usage(5, 6)),
        (event({"usage": None, "choices": []}), None),
        (b'data: {"error":{"message":"no"}}\n\n', None),
    ],
    ids=["chat", "chat-crlf", "messages", "responses", "long-responses", "null", "error"],
)
def test_usage_of_a_stream(text, size, expected):
    """In whatever chunks it comes, and of whatever size its events are."""
    assert read(text, size) == expected


@pytest.mark.parametrize(
    ("details", "cached"),
    [
        ('"prompt_tokens_details": {"cached_tokens": 5, "audio_tokens": 0}', 5),
        ('"input_tokens_details": {"cached_tokens": 5}', 5),
        ('"prompt_tokens_details": {"cached_tokens": 70}', 7),
        ('"prompt_tokens_details": {"cached_tokens": -1}', 0),
        ('"prompt_tokens_details": {"cached_tokens": 0}', 0),
        ('"prompt_tokens_details": {"cached_tokens": null}', None),
        ('"prompt_tokens_details": null', None),
        ('"prompt_tokens_details": "none"', None),
    ],
)
def test_cached_tokens_are_told_apart_where_the_server_says_which(details, cached):
    """What it says of them in another way never costs the rest of the usage."""
    text = f'{{"usage": {{"prompt_tokens": 7, "completion_tokens": 9, {details}}}}}'.encode()

    assert read(text, events=False) == read(b"data: " + text + b"\n\n") == Usage(7, 9, cached)


def test_usage_that_is_told_while_it_grows_is_not_added_up():
    """With continuous_usage_stats of vLLM each event tells the sum so far."""
    counts = [{"usage": {"prompt_tokens": 4, "completion_tokens": n}} for n in range(1, 9)]

    assert read(b"".join(map(event, counts))) == Usage(4, 8)


@pytest.mark.parametrize("size", [13, 1000, None])
@pytest.mark.parametrize("length", [10, 50_000])
def test_usage_of_a_json_answer_at_any_size_and_place(length, size):
    """Behind the choices or before them; text that looks like it is none."""
    choices = [{"message": {"content": '"usage":{"prompt_tokens":8}' + "\\" * length}}]
    behind = {"choices": choices, "usage": {"prompt_tokens": 1, "completion_tokens": 2}}
    before = dict(reversed(behind.items()))

    for answer in (behind, before):
        assert read(json.dumps(answer).encode(), size, events=False) == Usage(1, 2)


@pytest.mark.parametrize("events", [True, False])
def test_an_answer_is_not_held(events):
    """Of any length no more than some kilobytes, whatever it is made of."""
    piece = b'{"a":["' + b"x" * 50_000 + b'",' + b"[" * 1000 + b'{"usage":{"b":1}}, '
    reader = openai.EventUsageReader() if events else openai.JSONUsageReader()
    reader.feed(b'data: {"choices":[' if events else b'{"choices":[')
    for _ in range(100):
        reader.feed(piece)
        held = len(reader._held) + (len(reader._scanner._tail) if reader._scanner else 0)
        assert held <= usage.MAX_HELD_BYTES + usage.MAX_USAGE_BYTES


def test_a_usage_that_does_not_end_is_given_up():
    """What it could be used for is to fill the memory."""
    scanner = usage.UsageScanner()
    scanner.feed(b'{"usage":{"x":"')
    for _ in range(100):
        scanner.feed(b"y" * 1000)
        assert len(scanner._tail) <= usage.MAX_USAGE_BYTES
    scanner.feed(b'"},"b":1,"usage":{"prompt_tokens":4}}')

    assert scanner.usage == Usage(4, 0)


TEXT = st.text(st.sampled_from('usage"\\{}[]:, ä😀\n') | st.characters(), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(-1e9, 1e9) | TEXT,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(TEXT | st.sampled_from(["usage", "response", "message"]), inner)
    ),
    max_leaves=20,
)
COUNT = st.integers(0, 10**6)
COUNTS = st.fixed_dictionaries(
    {},
    optional={
        "prompt_tokens": COUNT,
        "completion_tokens": COUNT,
        "details": st.dictionaries(st.sampled_from(["cached_tokens", "}", '"', "usage"]), COUNT),
    },
)
MEMBERS = st.dictionaries(TEXT | st.sampled_from(["response", "message"]), VALUES, max_size=5)


@given(
    members=MEMBERS,
    counts=st.none() | COUNTS,
    place=st.integers(0, 5),
    inside=st.sampled_from(["", "response", "message"]),
    indent=st.sampled_from([None, 1]),
    cuts=st.lists(st.integers(0, 2000), max_size=8) | st.just(list(range(500))),
    ascii_only=st.booleans(),
)
def test_the_scanner_finds_what_a_parser_finds(
    members, counts, place, inside, indent, cuts, ascii_only
):
    """The judge is json.loads, and the chunks are any."""
    items = [item for item in members.items() if item[0] not in ("usage", "response", "message")]
    if counts is not None:
        items.insert(place, ("usage", counts))
    answer = {"a": members.get(""), inside: dict(items)} if inside else dict(items)
    text = json.dumps(answer, indent=indent, ensure_ascii=ascii_only).encode(errors="replace")
    scanner = usage.UsageScanner()
    bounds = [0, *sorted({cut for cut in cuts if cut < len(text)}), len(text)]
    for start, end in pairwise(bounds):
        scanner.feed(text[start:end])

    parsed = json.loads(text)
    found = (parsed[inside] if inside else parsed).get("usage")
    if found is None:
        assert scanner.usage is None
    else:
        expected = Usage(found.get("prompt_tokens", 0), found.get("completion_tokens", 0))
        assert scanner.usage == expected
    assert scanner._tail == b""


PIECES = [
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b",",
    b"usage",
    b'"usage":{',
    b"1",
    b" ",
    b"\n",
]


@given(
    pieces=st.lists(st.sampled_from([*PIECES, b"data:", b"\r"]) | st.binary(max_size=20)),
    events=st.booleans(),
)
def test_usage_of_anything_never_raises(pieces, events):
    """A server may answer whatever it likes."""
    reader = openai.EventUsageReader() if events else openai.JSONUsageReader()
    scanner = usage.UsageScanner()
    for piece in pieces:
        reader.feed(piece)
        scanner.feed(piece)

    assert reader.usage() is None or isinstance(reader.usage(), Usage)
    assert len(scanner._tail) <= usage.MAX_USAGE_BYTES
