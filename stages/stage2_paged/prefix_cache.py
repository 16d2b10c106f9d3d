"""What remembers the pages of finished requests. In this stage: nothing does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Prefix:
    """Pages that hold the beginning of a sequence, and the cache's handle to keep them by."""

    pages: Sequence[int] = ()
    node: Any = None


class PrefixCache(Protocol):
    """Whole pages of tokens that were computed once. It owns the pages that it was given and did not know."""

    def match(self, tokens: Sequence[int]) -> Prefix:
        """The longest known prefix of `tokens`, by whole pages."""

    def insert(self, tokens: Sequence[int], pages: Sequence[int]) -> Prefix:
        """Remember `pages`, which hold `tokens` (as many as fill them).

        Returns the pages that the cache now has for these tokens. Where it knew them already its own are
        returned, and the caller keeps the duplicates.
        """

    def lock(self, prefix: Prefix) -> None:
        """Keep a prefix from being evicted until as many `unlock`s."""

    def unlock(self, prefix: Prefix) -> None: ...

    def evict(self, count: int) -> list[int]:
        """Forget the least recently used unlocked pages, at least `count` if there are as many."""

    @property
    def evictable(self) -> int:
        """How many pages `evict` could return."""

    @property
    def cached(self) -> int:
        """How many pages the cache owns."""


class NoPrefixCache:
    """Remembers nothing, so every page stays its request's own. Stage 3 swaps this for a radix tree."""

    evictable = 0
    cached = 0

    def match(self, tokens: Sequence[int]) -> Prefix:
        return Prefix()

    def insert(self, tokens: Sequence[int], pages: Sequence[int]) -> Prefix:
        return Prefix()

    def lock(self, prefix: Prefix) -> None: ...

    def unlock(self, prefix: Prefix) -> None: ...

    def evict(self, count: int) -> list[int]:
        return []
