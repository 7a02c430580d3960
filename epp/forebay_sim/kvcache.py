"""The KV cache of a simulated engine: counted blocks and a prefix cache.

A block is *private* (one sequence's), *shared* (a prompt block, named by its hash, that at least
one sequence holds) or *evictable* (a prompt block that no sequence holds: it still serves prefix
hits, but is given up as soon as a block is needed). When to allocate does not belong here.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Holding:
    """The blocks one sequence holds.

    `prefix` are the hashes of its prompt's full blocks, each chained over all blocks before it,
    so they are distinct. `cached_blocks` of them were found in the cache at allocation.
    """

    prefix: tuple[int, ...]
    cached_blocks: int
    private: int
    shared: list[int] = field(default_factory=list)

    @property
    def blocks(self) -> int:
        """How many blocks it holds."""
        return self.private + len(self.shared)


class KVCache:
    """`total` blocks of `block_size_tokens` tokens each."""

    def __init__(self, total: int, block_size_tokens: int) -> None:
        self.total = total
        self.block_size_tokens = block_size_tokens
        self._private = 0
        self._shared: dict[int, int] = {}  # hash -> how many sequences hold it
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def used(self) -> int:
        """Blocks that some sequence holds; evictable ones do not count."""
        return self._private + len(self._shared)

    @property
    def evictable(self) -> int:
        """Prompt blocks kept only for later prefix hits."""
        return len(self._evictable)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold `tokens` tokens."""
        return -(-tokens // self.block_size_tokens)

    def allocate(self, tokens: int, prefix: tuple[int, ...]) -> Holding | None:
        """Take the blocks for a context of `tokens` tokens, reusing what its prefix finds cached.

        Returns None, and changes nothing, when no block is free. The last token is never taken
        from the cache: an engine must compute at least one to have something to sample from.
        """
        hits: list[int] = []
        revived = 0
        for name in prefix[: (tokens - 1) // self.block_size_tokens]:
            if name in self._evictable:
                revived += 1
            elif name not in self._shared:
                break
            hits.append(name)
        private = self.blocks_for(tokens) - len(hits)
        if self.used + revived + private > self.total:
            return None
        for name in hits:
            self._evictable.pop(name, None)
            self._shared[name] = self._shared.get(name, 0) + 1
        self._private += private
        self._evict_surplus()
        return Holding(prefix, len(hits), private, hits)

    def grow(self, holding: Holding) -> bool:
        """Take one more block for a sequence; False, and no change, when no block is free."""
        if self.used == self.total:
            return False
        holding.private += 1
        self._private += 1
        self._evict_surplus()
        return True

    def take(self, blocks: int) -> bool:
        """Take blocks for holdings that grow; False, and no change, when too few are free."""
        if self.used + blocks > self.total:
            return False
        self._private += blocks
        self._evict_surplus()
        return True

    def share(self, holding: Holding) -> None:
        """Offer a sequence's computed prompt blocks to later requests.

        A block that another sequence has put into the cache meanwhile stays a private duplicate.
        """
        for name in holding.prefix[holding.cached_blocks :]:
            if name not in self._shared and name not in self._evictable:
                holding.private -= 1
                self._private -= 1
                holding.shared.append(name)
                self._shared[name] = 1

    def release(self, holding: Holding) -> None:
        """Give a sequence's blocks back; its shared ones stay as evictable if it was the last."""
        self._private -= holding.private
        holding.private = 0
        # Last block first: the head of a prefix is worth more, so it should be evicted later.
        for name in reversed(holding.shared):
            if self._shared[name] > 1:
                self._shared[name] -= 1
            else:
                del self._shared[name]
                self._evictable[name] = None
        holding.shared.clear()

    def _evict_surplus(self) -> None:
        while self.used + len(self._evictable) > self.total:
            self._evictable.popitem(last=False)
