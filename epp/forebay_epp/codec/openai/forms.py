"""One text field of a multipart/form-data body, found and replaced in place (RFC 7578, RFC 2046).

Audio and image requests name their model in such a form. All other bytes stay as they are, so what
is needed are offsets into the body; parsers of forms hand out copies of the parts, and forgive what
another parser reads differently. Here a form that is not plainly well-formed is refused: a client
that could show two readers different models could choose its queue. Time and memory are bounded by
the body's size.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING

from forebay_epp.codec.openai.errors import BadRequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_PARTS = 128
MAX_PART_HEADER_BYTES = 4 << 10

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_HEADER_NAME = re.compile(_TOKEN)
_CONTROL = re.compile(rb"[\r\n\x00]")
_PARAMETER = re.compile(
    rb"[ \t]*;[ \t]*(" + _TOKEN + rb')=(?:"((?:[^"\\\r\n\x00]|\\[^\r\n\x00])*)"|(' + _TOKEN + rb"))"
)
_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,\-./:=? ]{0,69}[0-9A-Za-z'()+_,\-./:=?]")
_UTF8_TEXT = re.compile(rb'text/plain(?:[ \t]*;[ \t]*charset="?utf-8"?)?', re.IGNORECASE)


def is_form(content_type: str) -> bool:
    """Return whether a body of this type is a form."""
    return content_type.partition(";")[0].strip().lower() == "multipart/form-data"


def find_field(body: bytes, content_type: str, name: str) -> slice | None:
    """Return where the value of the field `name` is, or None where the form has no such field.

    Raises:
        BadRequestError: not a well-formed form, or the field is a file, encoded, or given twice.
    """
    found = None
    for headers, value in _parts(body, _boundary(content_type)):
        disposition = _parameters(headers.get(b"content-disposition", b""), b"form-data")
        if b"name" not in disposition:
            raise _malformed("a part has no Content-Disposition: form-data with a name")
        if b"\\" in disposition[b"name"]:
            raise _malformed("the name of a part has a backslash")
        if disposition[b"name"] != name.encode():
            continue
        if found is not None:
            raise BadRequestError(f"{name} is given more than once", name)
        if (
            disposition.keys() != {b"name"}
            or b"content-transfer-encoding" in headers
            or not _UTF8_TEXT.fullmatch(headers.get(b"content-type", b"text/plain"))
        ):
            raise BadRequestError(f"{name} must be a text field of the form", name)
        found = value
    return found


def with_field(body: bytes, content_type: str, name: str, value: str) -> bytes:
    """Return the form with another value of a field, or with the field where it has none.

    Raises:
        BadRequestError: see `find_field`; or `value` would not be plain text in it.
    """
    if not value.isprintable():
        raise BadRequestError(f"{name} {value!r} cannot be written into a form", name)
    place = find_field(body, content_type, name)
    if place is not None:
        return body[: place.start] + value.encode() + body[place.stop :]
    disposition = f'Content-Disposition: form-data; name="{name}"'
    part = f"\r\n{disposition}\r\n\r\n{value}\r\n".encode()
    return b"--" + _boundary(content_type) + part + body


def _boundary(content_type: str) -> bytes:
    parameters = _parameters(content_type.strip().encode(), b"multipart/form-data")
    boundary = parameters.get(b"boundary", b"")
    if not _BOUNDARY.fullmatch(boundary):
        raise _malformed("its Content-Type has no usable boundary")
    return boundary


def _parts(body: bytes, boundary: bytes) -> Iterator[tuple[dict[bytes, bytes], slice]]:
    """Yield headers and place of each part's content."""
    delimiter = b"--" + boundary
    if not body.startswith(delimiter):
        raise _malformed("it does not begin with its boundary")
    marks = [0]
    while (mark := body.find(delimiter, marks[-1] + len(delimiter))) >= 0:
        marks.append(mark)
        if len(marks) > MAX_PARTS + 1:
            raise _malformed(f"it has more than {MAX_PARTS} parts")
    if body[marks[-1] + len(delimiter) :] not in (b"--", b"--\r\n"):
        raise _malformed("it does not end with its boundary")
    for mark, next_mark in pairwise(marks):
        start, end = mark + len(delimiter), next_mark - 2
        head = body.find(b"\r\n\r\n", start, start + MAX_PART_HEADER_BYTES)
        if not (body.startswith(b"\r\n", start) and body.startswith(b"\r\n", end)):
            raise _malformed("a boundary is not a line of its own")
        if head < 0 or head + 4 > end:
            raise _malformed("the headers of a part do not end")
        yield _headers(body[start + 2 : head]), slice(head + 4, end)


def _headers(text: bytes) -> dict[bytes, bytes]:
    headers: dict[bytes, bytes] = {}
    for line in text.split(b"\r\n"):
        written, colon, value = line.partition(b":")
        name = written.lower()
        if (
            not (colon and _HEADER_NAME.fullmatch(name))
            or name in headers
            or _CONTROL.search(value)
        ):
            raise _malformed("a part has headers that cannot be read")
        headers[name] = value.strip(b" \t")
    return headers


def _parameters(text: bytes, kind: bytes) -> dict[bytes, bytes]:
    """Read `kind; name=value; ...`; names in small letters, escapes in quoted values as they are.

    Names of another kind (RFC 2231: `name*`) would be a second way to say the same thing.
    """
    parameters: dict[bytes, bytes] = {}
    at = len(kind)
    while at < len(text) and text[: len(kind)].lower() == kind:
        match = _PARAMETER.match(text, at)
        if match is None:
            break
        name = match[1].lower()
        if name in parameters or (b"*" in name and name != b"filename*"):
            break
        parameters[name] = match[3] if match[2] is None else match[2]
        at = match.end()
    if at != len(text):
        raise _malformed(f"the parameters of {kind.decode()} cannot be read")
    return parameters


def _malformed(what: str) -> BadRequestError:
    return BadRequestError(f"the body is not a valid multipart/form-data form: {what}")
