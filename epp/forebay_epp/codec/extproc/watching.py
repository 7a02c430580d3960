"""How the two filters of an Envoy that observes answers are tied together.

The first filter asks where a request goes and sees nothing of its answer; the second one shows the
answer's headers and its end in a stream of its own, in ext_proc's observability mode, and waits for
nothing. So answers cost the EPP nothing per token, and outlive it.

What a filter is for stands in the metadata of its calls, which the proxy's configuration sets and
no client can: the first says that there is a second, the second brings the tie that the answer to
the first one has left in Envoy's dynamic metadata. The server sees neither. A tie in a message
would not do: one that is not yet read when the stream is reset is lost.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from forebay_epp.codec.extproc.framing import field

if TYPE_CHECKING:
    from collections.abc import Iterable

RESPONSES_KEY = "x-forebay-responses"
TIE_KEY = "x-forebay-tie"
OBSERVE = "Observe"

NAMESPACE = "forebay"
TIE = "tie"
OWNER = "owner"
SECRET_LENGTH = 32  # hexadecimal digits


class Filter(NamedTuple):
    """What the metadata of a call says of the filter that makes it.

    Attributes:
        observed: another filter shows the answer.
        secret: of the tie of the answer that this one shows; "" where it has none, and None where
            the filter is not there to show an answer.
    """

    observed: bool = False
    secret: str | None = None


PLAIN = Filter()
_OBSERVED = Filter(observed=True)


def calling(metadata: Iterable[tuple[str, str | bytes]]) -> Filter:
    """Read the metadata of a call."""
    for key, value in metadata:
        if key == TIE_KEY:
            # Envoy writes "-" for what is not there.
            return Filter(secret=str(value) if len(value) == SECRET_LENGTH else "")
        if key == RESPONSES_KEY and value == OBSERVE:
            return _OBSERVED
    return PLAIN


class Tie(NamedTuple):
    """What ties an answer to its request.

    Attributes:
        secret: cannot be guessed; `SECRET_LENGTH` digits.
        owner: host:port of the EPP that waits for it, "" where the proxy knows one only.
    """

    secret: str
    owner: str = ""


def tied(tie: Tie) -> bytes:
    """Return what ties a ProcessingResponse when it is appended to its bytes."""
    return _before_secret(tie.owner) + tie.secret.encode()


@lru_cache(maxsize=1)
def _before_secret(owner: str) -> bytes:
    """Return the bytes before the secret, which are the same for every tie of one EPP.

    `dynamic_metadata` is field 8 of a ProcessingResponse. Protobuf merges messages that come twice.
    """
    secret = b"0" * SECRET_LENGTH
    fields = _entry(OWNER, field(3, owner.encode())) if owner else b""
    fields += _entry(TIE, field(3, secret))
    message = field(8, _entry(NAMESPACE, field(5, fields)))
    return message.removesuffix(secret)


def _entry(key: str, value: bytes) -> bytes:
    """Write one of a Struct's fields."""
    return field(1, field(1, key.encode()) + field(2, value))
