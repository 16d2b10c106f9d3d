"""A radix cache whose pages the table machine can see."""

from stages.stage3_radix.prefix_cache import RadixPrefixCache


class WatchedRadixCache(RadixPrefixCache):
    @property
    def pages(self) -> list[int]:
        return [page for node in self.tree.nodes() for page in node.pages]

    @property
    def locked(self) -> set[int]:
        return {page for node in self.tree.nodes() if node.locks for page in node.pages}
