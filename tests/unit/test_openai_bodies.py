"""Bodies as clients and servers write them, well-formed and not."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_epp.codec import openai

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("POST", "/v1/chat/completions", "REQUIRED"),
        ("POST", "/v1/chat/completions/batch", "REQUIRED"),
        ("POST", "/gateway/v1/completions?x=1", "REQUIRED"),
        ("POST", "/v1/embeddings/", "REQUIRED"),
        ("POST", "/v1/messages/count_tokens", "REQUIRED"),
        ("POST", "/v1/audio/transcriptions", "REQUIRED"),
        ("POST", "/v1/audio/translations", "REQUIRED"),
        ("POST", "/v1/audio/speech", "REQUIRED"),
        ("POST", "/v1/images/generations", "OPTIONAL"),
        ("POST", "/v1/images/edits", "OPTIONAL"),
        ("POST", "/v1/images/variations", "OPTIONAL"),
        ("POST", "/invocations", "OPTIONAL"),
        ("POST", "/rerank", "OPTIONAL"),
        ("POST", "/v2/rerank", "OPTIONAL"),
        ("POST", "/v1/score", "OPTIONAL"),
        ("POST", "/pooling", "OPTIONAL"),
        ("POST", "/classify", "OPTIONAL"),
        ("POST", "/tokenize", "OPTIONAL"),
        ("POST", "/detokenize", "OPTIONAL"),
        ("POST", "/generate", "OPTIONAL"),
        ("POST", "/inference/v1/generate", "OPTIONAL"),
        ("POST", "/generative_scoring", "OPTIONAL"),
        ("POST", "/v1/chat/completion%73", "REQUIRED"),
        ("POST", "/v1/chat%2Fcompletions?x=%3f", "REQUIRED"),
        ("POST", "/v1/models%3f/completions", "REQUIRED"),
        ("POST", "/v1/models?/completions", "NONE"),
        ("POST", "/v1/load_lora_adapter", "NONE"),
        ("GET", "/v1/chat/completions", "NONE"),
        ("GET", "/v1/models", "NONE"),
        ("", "", "REQUIRED"),
    ],
)
def test_which_paths_name_a_model(method, path, expected):
    """Suffixes of POST paths as servers decode them; no path is taken for completions."""
    assert openai.model_field(method, path).name == expected


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "empty"),
        (b"{", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"{}", "model not found"),
        (b'{"model":1}', "model must be a string"),
        (b'{"model":null}', "model not found"),
        (b'{"model":""}', "must not be empty"),
        (b'{"model":"' + b"m" * 257 + b'"}', "at most 256"),
        (b'{"model":"a\\u0000"}', "control characters"),
        (b'{"model":"a","x":NaN}', "not valid JSON"),
        (b'{"model":"a"}\x00', "not valid JSON"),
        (b'{"model":"\\ud800"}', "not valid JSON"),
        (b'{"model":"\xff"}', "not UTF-8"),
        ('{"model":"a"}'.encode("utf-16"), "not UTF-8"),
        (b'\xef\xbb\xbf{"model":"a"}', "not valid JSON"),
        (b'{"model":"a","x":' + b"[" * 9999 + b"]" * 9999 + b"}", "nested too deeply"),
    ],
    ids=range(16),
)
def test_a_body_without_a_usable_model_is_refused_in_words(body, message):
    """The text tells the client what to fix."""
    with pytest.raises(openai.BadRequestError, match=message):
        openai.read_asked(body)


@pytest.mark.parametrize("body", [b"{}", b'{"model":null}'])
@pytest.mark.parametrize("optional", [True, False])
def test_a_body_that_names_no_model_means_the_default(body, optional):
    """As a model server takes it that serves one model."""
    assert openai.read_asked(body, optional=optional, default="chat").model == "chat"
    assert openai.read_asked(body, optional=optional, default="").model == ""


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"", "application/json"),
        (b"{}", "application/json"),
        (b"[1]", "application/json"),
        (b"1,2,3", "text/csv"),
        (b"\xff", "application/octet-stream"),
    ],
)
def test_where_the_model_is_optional_other_bodies_pass(body, content_type):
    """Not everything that is sent to /invocations is JSON."""
    assert openai.read_asked(body, content_type, optional=True).model == ""


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"{", "application/json"),
        (b"{", ""),
        (b"\xff", "application/vnd.x+json; charset=utf-8"),
        (b'{"model":1}', "text/plain"),
        (b'{"model":""}', "text/plain"),
    ],
)
def test_where_the_model_is_optional_broken_json_does_not_hide_one(body, content_type):
    """A server may read more leniently what this reader cannot."""
    with pytest.raises(openai.BadRequestError):
        openai.read_asked(body, content_type, optional=True)


def test_a_model_is_read_whatever_the_content_type_says():
    """Many servers do not look at it either."""
    assert openai.read_asked(b'{"model":"m"}', "text/plain").model == "m"
    assert openai.read_asked(b'{"model":"m"}', "text/plain", optional=True).model == "m"


@pytest.mark.parametrize(
    ("stream", "expected"),
    [("true", True), ("false", False), ("null", False), ('"true"', False), ('{"a":[1]}', False)],
)
def test_whether_a_stream_is_asked_for(stream, expected):
    """What is neither true nor false is for the server to refuse."""
    body = b'{"model":"m", "stream" : %s}' % stream.encode()
    assert openai.read_asked(body) == ("m", expected)
    assert not openai.read_asked(b'{"model":"m"}').streamed


@given(data=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_body_raises_anything_else(data):
    """Whatever the bytes: a printable name of 1 to 256 characters, or BadRequestError."""
    try:
        model = openai.read_asked(data).model
    except openai.BadRequestError:
        return

    assert 0 < len(model) <= 256
    assert model.isprintable()


@given(fields=st.dictionaries(st.text(max_size=6), JSON, max_size=5), target=st.text(min_size=1))
def test_what_can_be_read_can_be_rewritten_and_only_the_model_changes(fields, target):
    """`with_model` accepts everything that `read_asked` accepts."""
    body = json.dumps(fields | {"model": "m"}).encode()
    try:
        openai.read_asked(body)
        target.encode()
    except (openai.BadRequestError, UnicodeEncodeError):
        return

    rewritten = json.loads(openai.with_model(body, target))

    assert rewritten == json.loads(body) | {"model": target}


def test_members_keep_their_bytes_when_the_model_changes():
    """Numbers are not rounded, escapes not resolved."""
    body = rb'{"n":1.0000000000000000001,"model":"m","s":"\u00e4"}'

    assert openai.with_model(body, "t") == rb'{"n":1.0000000000000000001,"model":"t","s":"\u00e4"}'


def test_names_beyond_ascii_are_restored_in_both_spellings():
    """Servers escape or do not."""
    restorer = openai.ModelRestorer("ziel-ä", "name-ö")

    out = restorer.feed('{"model":"ziel-ä"}{"model": "ziel-\\u00e4"}'.encode(), last=True)

    assert [json.loads(part + b"}")["model"] for part in out.split(b"}")[:2]] == ["name-ö"] * 2
