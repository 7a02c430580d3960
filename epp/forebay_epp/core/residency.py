"""How many tokens each answer has come to, where no usage tells: by residency.

An engine of continuous batching gives every request that decodes one token a step. So what a
server has generated between two pages is shared over the requests that were there, each for as
long as it was. The sum is the server's own; prompts count nothing, and the time in which a request
is prefilled is taken for decoding, alike for all.

Charging for tokens does not belong here (charging.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from forebay_epp.core.terms import Request


class Produced(NamedTuple):
    """What an answer has come to: `ended` says whether that is all."""

    request: Request
    tokens: float
    ended: bool


class Residency:
    """The answers of one endpoint and their tokens."""

    __slots__ = ("_here", "_left", "_since", "_total")

    def __init__(self) -> None:
        self._total: float | None = None
        self._since = 0.0
        self._here: dict[int, Produced] = {}
        self._left: list[tuple[Produced, float, bool]] = []

    def joined(self, request: Request) -> None:
        """A request is sent to the endpoint."""
        self._here[request.id] = Produced(request, 0.0, ended=False)

    def left(self, request: Request, now: float, *, known: bool) -> None:
        """A request has ended; `known` says that its usage is, so that only its share counts."""
        produced = self._here.pop(request.id)
        if self._total is not None:
            self._left.append((produced, now, known))

    def forget(self) -> None:
        """The server does not say any more what it generates; answers that have ended are lost."""
        self._total = None
        self._left.clear()

    def page(self, total: float | None, at: float, foreign: int) -> list[Produced]:
        """Share what was generated since the page before, and return what answers have come to.

        Args:
            total: tokens that the server has generated since its start; None where it does not say.
            at: when the page was asked for, in monotonic seconds.
            foreign: requests that are there beside ours.
        """
        known, since = self._total, self._since
        self._total, self._since = total, at
        if known is None or total is None or total < known or at <= since:
            self._left.clear()
            return []
        here, left = list(self._here.values()), self._left
        self._left = [each for each in left if each[1] > at]
        stays = [at - max(since, each.request.dispatched_at) for each in here]
        ends = [min(at, end) - max(since, each.request.dispatched_at) for each, end, _ in left]
        stayed = sum(stay for stay in (*stays, *ends) if stay > 0) + foreign * (at - since)
        rate = (total - known) / stayed if stayed > 0 else 0.0
        found = []
        for each, stay in zip(here, stays, strict=True):
            if stay > 0:
                more = each._replace(tokens=each.tokens + rate * stay)
                self._here[each.request.id] = more
                found.append(more)
        still = []
        for (each, end, is_known), stay in zip(left, ends, strict=True):
            more = each._replace(tokens=each.tokens + rate * max(0.0, stay))
            if end > at:
                still.append((more, end, is_known))
            elif not is_known:
                found.append(more._replace(ended=True))
        self._left = still
        return found
