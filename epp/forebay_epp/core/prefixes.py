"""Which beginnings of prompts each endpoint is believed to have in its prefix cache.

How a prompt's blocks are named does not belong here (codec/openai/prompts.py), nor what having them
is worth (scorers.py).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from forebay_epp.core.terms import PREFIX_BLOCK_TOKENS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forebay_epp.core.terms import EndpointMetrics, Request
    from forebay_epp.core.tracked import TrackedEndpoint

MAX_BLOCKS = 250_000  # of all endpoints together
ASSUMED_BLOCKS = 2_000  # that fit in a server that does not show the size of its cache
MAX_HOLDERS = 2  # that are considered besides endpoints drawn at random
JUDGED_TOKENS = 8192  # that were promised, at least, for a page to say how much holds
SMOOTHING = 0.3


class Holding:
    """The blocks of one endpoint.

    A name says all that comes before its block, so blocks are of use from the first one on only.
    The last of a prompt are therefore forgotten before its first: what an endpoint has of a prompt
    is always a beginning.

    Attributes:
        bit: of the endpoint in the index.
        blocks: names, the least recently used first.
        capacity: how many it has room for.
        trust: the part of what the index promises that the server delivers, by its own counter of
            prefix cache hits; 1 where it shows none.
    """

    __slots__ = ("_hits", "_promised", "bit", "blocks", "capacity", "trust")

    def __init__(self, bit: int) -> None:
        self.bit = bit
        self.blocks: OrderedDict[int, None] = OrderedDict()
        self.capacity = ASSUMED_BLOCKS
        self.trust = 1.0
        self._promised = 0.0
        self._hits: float | None = None

    def promise(self, tokens: float) -> None:
        """Take note that a request was sent there of which it should have so many tokens."""
        self._promised += tokens

    def judge(self, hits: float | None) -> bool:
        """Compare the server's counter of hits with what was promised.

        Returns:
            False where the counter shows that the server has restarted: it has nothing any more.
        """
        if hits is None:
            return True
        known = self._hits
        if known is None or hits < known:
            self._hits, self._promised = hits, 0.0
            return known is None
        if self._promised >= JUDGED_TOKENS:
            kept = min(1.0, (hits - known) / self._promised)
            self.trust += SMOOTHING * (kept - self.trust)
            self._hits, self._promised = hits, 0.0
        return True


class PrefixIndex:
    """The blocks of all endpoints.

    Sent is believed to be cached: the server computes it before it can be asked for again. Each
    endpoint has as many blocks as fit in its KV cache, and all together at most `MAX_BLOCKS`.
    Finding the longest beginning is a binary search, as of each prompt an endpoint has a beginning.

    Attributes:
        size: blocks, counted once for each endpoint.
    """

    def __init__(self) -> None:
        self.size = 0
        self._owners: dict[int, int] = {}  # name of a block -> bits of the endpoints that have it
        self._holdings: dict[TrackedEndpoint, Holding] = {}
        self._endpoints: dict[int, TrackedEndpoint] = {}  # by bit
        self._next_bit = 1
        self._free_bits: list[int] = []

    def __len__(self) -> int:
        """Return how many endpoints have blocks."""
        return len(self._holdings)

    def sent(self, endpoint: TrackedEndpoint, request: Request) -> None:
        """Take note that an endpoint gets a prompt; write on its request what it has of it."""
        prefix = request.prefix
        holding = self._holdings.get(endpoint) or self._new(endpoint)
        matched = self._matched(holding.bit, prefix)
        tokens = matched * request.block_tokens
        holding.promise(tokens)
        request.cached_tokens = int(tokens * holding.trust)
        blocks, bit, owners = holding.blocks, holding.bit, self._owners
        for name in reversed(prefix[matched:]):
            if name in blocks:
                blocks.move_to_end(name)
            else:
                blocks[name] = None
                owners[name] = owners.get(name, 0) | bit
                self.size += 1
        for name in reversed(prefix[:matched]):
            blocks.move_to_end(name)
        self._trim(holding)

    def cached_tokens(self, endpoint: TrackedEndpoint, request: Request) -> float:
        """Return how many tokens of a request's prompt an endpoint can be trusted to have."""
        holding = self._holdings.get(endpoint)
        if holding is None:
            return 0.0
        return self._matched(holding.bit, request.prefix) * request.block_tokens * holding.trust

    def cached_tokens_of(
        self, endpoints: Sequence[TrackedEndpoint], request: Request
    ) -> list[float]:
        """Return the same for several endpoints, or nothing where none of them has any."""
        prefix = request.prefix
        first = self._owners.get(prefix[0], 0)
        if not first:
            return []
        deepest = self._matched(-1, prefix)
        last = self._owners[prefix[deepest - 1]]
        found = []
        holdings, tokens = self._holdings, request.block_tokens
        for endpoint in endpoints:
            holding = holdings.get(endpoint)
            if holding is None or not first & holding.bit:
                found.append(0.0)
            elif last & holding.bit:
                found.append(deepest * tokens * holding.trust)
            else:
                found.append(self._matched(holding.bit, prefix) * tokens * holding.trust)
        return found if any(found) else []

    def holders(self, request: Request) -> Sequence[TrackedEndpoint]:
        """Return a few endpoints that have the longest beginning of a prompt that any has."""
        prefix = request.prefix
        depth = self._matched(-1, prefix)
        if not depth:
            return ()
        bits = self._owners[prefix[depth - 1]]
        found: list[TrackedEndpoint] = []
        while bits and len(found) < MAX_HOLDERS:
            bit = bits & -bits
            found.append(self._endpoints[bit])
            bits ^= bit
        return found

    def observe(self, endpoint: TrackedEndpoint, page: EndpointMetrics) -> None:
        """Learn from a page how much fits in the server's cache, and what promises are worth."""
        holding = self._holdings.get(endpoint)
        if holding is None:
            return
        if page.kv_capacity_tokens is not None:
            holding.capacity = page.kv_capacity_tokens // PREFIX_BLOCK_TOKENS
        if not holding.judge(page.prefix_hits):
            self.forget(endpoint)

    def forget(self, endpoint: TrackedEndpoint) -> None:
        """An endpoint has nothing any more, because it has left, restarted or fallen asleep."""
        holding = self._holdings.pop(endpoint, None)
        if holding is not None:
            for name in holding.blocks:
                self._drop(name, holding.bit)
            del self._endpoints[holding.bit]
            self._free_bits.append(holding.bit)

    def _new(self, endpoint: TrackedEndpoint) -> Holding:
        if self._free_bits:
            bit = self._free_bits.pop()
        else:
            bit = self._next_bit
            self._next_bit <<= 1
        holding = self._holdings[endpoint] = Holding(bit)
        self._endpoints[bit] = endpoint
        if endpoint.kv_capacity_tokens is not None:
            holding.capacity = endpoint.kv_capacity_tokens // PREFIX_BLOCK_TOKENS
        for other in self._holdings.values():
            self._trim(other)  # each has a smaller part of the whole now
        return holding

    def _trim(self, holding: Holding) -> None:
        """Forget the least recently used blocks beyond what fits in the server and in its part."""
        room = min(holding.capacity, MAX_BLOCKS // len(self._holdings))
        while len(holding.blocks) > room:
            self._drop(holding.blocks.popitem(last=False)[0], holding.bit)

    def _matched(self, bits: int, prefix: tuple[int, ...]) -> int:
        """Return how many of the first blocks endpoints with these bits have."""
        owners = self._owners
        if not prefix or not owners.get(prefix[0], 0) & bits:
            return 0
        low, high = 1, len(prefix)
        while low < high:
            middle = (low + high + 1) // 2
            if owners.get(prefix[middle - 1], 0) & bits:
                low = middle
            else:
                high = middle - 1
        return low

    def _drop(self, name: int, bit: int) -> None:
        left = self._owners[name] & ~bit
        if left:
            self._owners[name] = left
        else:
            del self._owners[name]
        self.size -= 1
