"""Multipart forms as clients write them, and as an attacker writes them to be misread."""

from __future__ import annotations

import email
import email.policy

import pytest
from aiohttp import FormData
from hypothesis import given
from hypothesis import strategies as st

from forebay_epp.codec import openai
from forebay_epp.codec.openai import forms

TYPE = "multipart/form-data; boundary=XyZ"
AUDIO = bytes(range(256)) * 3

CURL = (
    b"--XyZ\r\n"
    b'Content-Disposition: form-data; name="file"; filename="a\\"b;c.wav"\r\n'
    b"Content-Type: audio/wav\r\n\r\n" + AUDIO + b"\r\n"
    b"--XyZ\r\n"
    b'Content-Disposition: form-data; name="model"\r\n\r\n'
    b"whisper\r\n"
    b"--XyZ--\r\n"
)


def form(*parts, end=b"--XyZ--\r\n"):
    """A form of parts, each headers and content."""
    return (
        b"".join(b"--XyZ\r\n" + head + b"\r\n\r\n" + text + b"\r\n" for head, text in parts) + end
    )


def field(name, text, more=b""):
    return b'Content-Disposition: form-data; name="' + name + b'"' + more, text


MODEL = field(b"model", b"whisper")


def aiohttp_form(fields):
    """Let a client library write a form; return body and content type."""
    data = FormData(quote_fields=False)
    for name, value in fields:
        if isinstance(value, bytes):
            data.add_field(name, value, filename="a b.wav", content_type="audio/wav")
        else:
            data.add_field(name, value)
    payload = data()
    chunks = []

    class Writer:
        async def write(self, chunk):
            chunks.append(bytes(chunk))

    writing = payload.write(Writer())
    try:
        while True:
            writing.send(None)
    except StopIteration:
        pass
    return b"".join(chunks), payload.headers["Content-Type"]


def test_the_model_of_a_form_is_read_and_rewritten_in_place():
    """All other bytes are as they were."""
    assert openai.read_asked(CURL, TYPE).model == "whisper"

    assert openai.with_model(CURL, "whisper-large-v3", TYPE) == CURL.replace(
        b"\r\n\r\nwhisper\r\n", b"\r\n\r\nwhisper-large-v3\r\n"
    )


@pytest.mark.parametrize(
    "content_type",
    [
        'multipart/form-data; boundary="XyZ"',
        "Multipart/Form-Data;boundary=XyZ",
        "multipart/form-data; charset=utf-8; boundary=XyZ ",
    ],
)
def test_the_boundary_may_be_written_in_several_ways(content_type):
    """As clients do."""
    assert openai.read_asked(CURL, content_type).model == "whisper"


def test_a_form_without_a_model_means_the_default_and_gets_it():
    """The field is put before the others."""
    body = form(field(b"file", AUDIO, b'; filename="x"'))
    assert openai.read_asked(body, TYPE, default="whisper").model == "whisper"
    with pytest.raises(openai.BadRequestError, match="model not found"):
        openai.read_asked(body, TYPE)

    assert openai.with_model(body, "large", TYPE) == form(field(b"model", b"large"), end=b"") + body


names = st.text(min_size=1, max_size=8).filter(
    lambda name: name.isprintable() and not set(name) & {'"', "\\"}
)
values = st.text(max_size=20) | st.binary(max_size=200)


@given(
    before=st.lists(st.tuples(names, values), max_size=3),
    after=st.lists(st.tuples(names, values), max_size=3),
    model=st.text(min_size=1, max_size=20).filter(str.isprintable),
    target=st.text(min_size=1, max_size=20).filter(str.isprintable),
)
def test_what_a_client_library_writes_is_read_and_only_the_model_changes(
    before, after, model, target
):
    """Whatever the other fields are."""
    others = [[item for item in part if item[0] != "model"] for part in (before, after)]
    body, content_type = aiohttp_form([*others[0], ("model", model), *others[1], ("file", AUDIO)])
    boundary = content_type.rpartition("=")[2].encode()
    place = forms.find_field(body, content_type, "model")

    assert body[place] == model.encode()
    rewritten = openai.with_model(body, target, content_type)
    assert rewritten == body[: place.start] + target.encode() + body[place.stop :]
    assert openai.read_asked(rewritten, content_type).model == target
    assert rewritten.count(b"--" + boundary) == body.count(b"--" + boundary)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"", "does not begin"),
        (b"preamble\r\n" + form(MODEL), "does not begin"),
        (b"\r\n" + form(MODEL), "does not begin"),
        (form(MODEL, end=b""), "does not end"),
        (form(MODEL) + b"epilogue", "does not end"),
        (form(MODEL, end=b"--XyZ-- \r\n"), "does not end"),
        (form(MODEL, end=b"--XyZ\r\n"), "does not end"),
        (form(MODEL).replace(b"\r\n", b"\n"), "does not end"),
        (form(field(b"a", b"\n--XyZ\nb")), "not a line of its own"),
        (form(field(b"a", b"b\n--XyZ\r\n\r\n")), "not a line of its own"),
        (form(field(b"a", b"\r\n--XyZ2")), "not a line of its own"),
        (b"--XyZ \r\n" + form(MODEL)[7:], "not a line of its own"),
        (b"--XyZ\r\n--XyZ--", "do not end"),
        (b'--XyZ\r\nContent-Disposition: form-data; name="model"\r\n--XyZ--', "do not end"),
        (form(field(b"a", b"", b"; x=" + b"y" * 4096)), "do not end"),
        (form((b"X: y", b"z")), "parameters of form-data"),
        (form((b"Content-Disposition: form-data", b"z")), "with a name"),
        (form((b"Content-Disposition: attachment; name=a", b"z")), "parameters of form-data"),
        (form((b'Content-Disposition: form-data; name="model', b"z")), "parameters"),
        (form((b"Content-Disposition: form-data; name*=utf-8''model", b"z")), "parameters"),
        (form((b"Content-Disposition: form-data; name=a; name=model", b"z")), "parameters"),
        (form((b'Content-Disposition: form-data; name="mo\\del"', b"z")), "backslash"),
        (form((b"Content-Disposition: form-data;\r\n name=model", b"z")), "headers"),
        (form((b"Content-Disposition : form-data; name=model", b"z")), "headers"),
        (form((b"Content-Disposition: form-data; name=a\nX: y", b"z")), "headers"),
        (
            form(
                (
                    b"Content-Disposition: form-data; name=a\r\ncontent-disposition: form-data",
                    b"z",
                )
            ),
            "headers",
        ),
        (form(*[field(b"a", b"")] * 129), "more than 128 parts"),
        (form(MODEL, MODEL), "more than once"),
        (form(field(b"model", b"m", b'; filename="m"')), "must be a text field"),
        (form(field(b"model", b"bQ==", b"\r\nContent-Transfer-Encoding: base64")), "text field"),
        (form(field(b"model", b"m", b"\r\nContent-Type: text/plain; charset=utf-16")), "text"),
        (form(field(b"model", b"\xff")), "not UTF-8"),
        (form(field(b"model", b"")), "must not be empty"),
        (form(field(b"model", b"m\r\n")), "control characters"),
        (form(field(b"model", b"m" * 257)), "at most 256"),
    ],
)
def test_a_form_that_could_be_read_in_two_ways_is_refused(body, what):
    """In words that tell the client what is wrong; also where no model need be named."""
    for optional in (False, bool(body)):
        with pytest.raises(openai.BadRequestError, match=what):
            openai.read_asked(body, TYPE, optional=optional)


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        'multipart/form-data; boundary=""',
        'multipart/form-data; boundary="XyZ',
        'multipart/form-data; boundary="XyZ "',
        "multipart/form-data; boundary=" + "x" * 71,
        "multipart/form-data; boundary=XyZ; boundary=other",
        "multipart/form-data; boundary=XyZ, multipart/form-data; boundary=other",
        "multipart/form-data; boundary*=XyZ",
        "multipart/form-data; boundary=XyZ; x",
        "multipart/form-data; boundary=é",
    ],
)
def test_a_form_needs_one_boundary(content_type):
    """Two readers might take different ones."""
    with pytest.raises(openai.BadRequestError, match="not a valid multipart/form-data"):
        openai.read_asked(CURL, content_type)


def test_a_target_that_is_no_plain_text_is_not_written_into_a_form():
    """It could end the part."""
    with pytest.raises(openai.BadRequestError, match="cannot be written"):
        openai.with_model(CURL, "a\r\n--XyZ--", TYPE)


@given(
    at=st.integers(0, len(CURL)),
    cut=st.integers(0, 9),
    text=st.sampled_from(
        [
            b"",
            b"\r\n",
            b"\n",
            b"--XyZ",
            b"--",
            b'"',
            b";",
            b"\\",
            b" ",
            b"model",
            b"\r\n\r\n",
            MODEL[0],
        ]
    ),
)
def test_whatever_is_accepted_another_reader_understands_in_the_same_way(at, cut, text):
    """The judge is the standard library's parser, which forgives."""
    body = CURL[:at] + text + CURL[at + cut :]
    try:
        model = openai.read_asked(body, TYPE, default="").model
    except openai.BadRequestError:
        return

    head = b"Content-Type: " + TYPE.encode() + b"\r\n\r\n"
    message = email.message_from_bytes(head + body, policy=email.policy.HTTP)
    fields = [
        part.get_payload(decode=True).decode()
        for part in message.iter_parts()
        if part.get_param("name", header="content-disposition") == "model"
    ]
    assert fields == ([model] if model else [])
