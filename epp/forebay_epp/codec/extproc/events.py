"""The events of an ext_proc stream: facts that carry everything their reader needs.

Acting on them belongs in data_plane.py. They are msgspec's structs because
every request makes two: a frozen dataclass of five fields takes 3.9 us to make, one of these 0.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from forebay_epp.codec.callers import Caller
    from forebay_epp.codec.openai import Usage
    from forebay_epp.core.terms import Outcome


class BodyPart(msgspec.Struct, frozen=True, gc=False):
    """A part of a request's body that is not the last one: `size_bytes` long."""

    size_bytes: int


class Arrived(msgspec.Struct, frozen=True, gc=False):
    """The request is complete: submit it, or answer it if it asks for the list of models.

    Attributes:
        model: name as the client wrote it; "" where none could be read.
        size_bytes: of the body so far.
        subset: addresses the proxy restricts the choice to; None means all.
        caller: what its headers say, as far as they are trusted.
        asked_model: the model the client asks about, "" for all of them, None for neither.
        prefix: names of its prompt's beginnings, as in `core.terms.Request`.
        streamed: whether its body is known to ask for a stream.
    """

    model: str
    size_bytes: int
    subset: frozenset[str] | None
    caller: Caller
    asked_model: str | None
    prefix: tuple[int, ...] = ()
    streamed: bool = False


class Rejected(msgspec.Struct, frozen=True, gc=False):
    """The request cannot be read; the client has its answer and nothing is to be submitted.

    `param` is the field of the body that is wrong, if it is one.
    """

    outcome: Outcome
    message: str
    param: str | None = None


class Abandoned(msgspec.Struct, frozen=True, gc=False):
    """The request needs no decision any more; cancel it if it was submitted."""


class FirstChunk(msgspec.Struct, frozen=True, gc=False):
    """The answer is a stream of events and has begun.

    Of others the first bytes say nothing: they come with the last token.
    """


class HeadersOnly(msgspec.Struct, frozen=True, gc=False):
    """A stream of events has begun as answer, and the proxy shows nothing of it but its headers."""


class Progress(msgspec.Struct, frozen=True, gc=False):
    """The answer has about so many tokens by now, more than the event before said."""

    answer_tokens: int


class Finished(msgspec.Struct, frozen=True, gc=False):
    """The dispatched request has ended; its slot is free.

    Attributes:
        status: of HTTP; 0 where no answer was seen.
        usage: tokens as the model server counted them; None where it did not tell.
        whole: whether the answer came to its end.
        blind: the proxy shows nothing of the answer, so that its end is unknown.
        headers_only: `HeadersOnly` came before: what has ended may be the answer, or what the
            proxy shows of it.
    """

    status: int
    usage: Usage | None = None
    whole: bool = False
    blind: bool = False
    headers_only: bool = False


class Untied(msgspec.Struct, frozen=True, gc=False):
    """The stream shows an answer, and not whose; it ends."""


Request = BodyPart | Arrived | Rejected | Abandoned
Answer = FirstChunk | HeadersOnly | Progress | Finished
Event = Request | Answer | Untied

ABANDONED = Abandoned()
UNTIED = Untied()
FIRST_CHUNK = FirstChunk()
HEADERS_ONLY = HeadersOnly()
