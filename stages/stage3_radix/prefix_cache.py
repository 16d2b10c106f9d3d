"""The radix tree as stage 2's `PrefixCache`."""

from collections.abc import Sequence

from stages.stage2_paged.prefix_cache import Prefix
from stages.stage3_radix.radix_tree import RadixTree


class RadixPrefixCache:
    """Remembers every page that was computed, until it is needed for something else."""

    def __init__(self, page_size: int) -> None:
        self.tree = RadixTree(page_size)

    @property
    def cached(self) -> int:
        return self.tree.cached

    @property
    def evictable(self) -> int:
        return self.tree.evictable

    def match(self, tokens: Sequence[int]) -> Prefix:
        return Prefix(*self.tree.match(tokens))

    def insert(self, tokens: Sequence[int], pages: Sequence[int]) -> Prefix:
        return Prefix(*self.tree.insert(tokens, pages))

    def lock(self, prefix: Prefix) -> None:
        self.tree.lock(prefix.node or self.tree.root)  # an empty `Prefix()` has no node

    def unlock(self, prefix: Prefix) -> None:
        self.tree.unlock(prefix.node or self.tree.root)

    def evict(self, count: int) -> list[int]:
        return self.tree.evict(count)
