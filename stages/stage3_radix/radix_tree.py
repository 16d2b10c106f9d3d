"""A radix tree over token ids that knows the pages of every prefix (RadixAttention, Zheng et al. 2024).

An edge holds whole pages of tokens, so the children of a node differ in their first page. No torch and no
clock: recency is a counter, and the same calls make the same tree.
"""

import heapq
from collections.abc import Iterator, Sequence

PageKey = tuple[int, ...]  # the tokens of one page


class Node:
    """An edge and what hangs below it. The root has no tokens."""

    __slots__ = ("children", "last_used", "locks", "pages", "parent", "queued", "tokens")

    def __init__(self, parent: "Node | None", tokens: list[int], pages: list[int], last_used: int) -> None:
        self.parent = parent
        self.tokens = tokens  # page_size of them for each page
        self.pages = pages
        self.children: dict[PageKey, Node] = {}
        self.locks = 0  # of this node and of all below it
        self.last_used = last_used
        self.queued = False  # whether the queue of leaves has it


class RadixTree:
    """Match, insert, lock and evict by whole pages. The tree owns the pages that `insert` took.

    `match` and `insert` take time in proportion to the tokens given, however many are stored; `evict` takes
    O(log n) a page for n leaves, amortised.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.root = Node(None, [], [], 0)
        self.cached = 0  # pages in the tree
        self.evictable = 0  # those of them on no locked path
        self._clock = 0
        self._leaves: list[tuple[int, int, Node]] = []  # heap: (last_used, tie-breaker, leaf), may be stale
        self._pushed = 0

    def match(self, tokens: Sequence[int]) -> tuple[list[int], Node]:
        """The pages of the longest stored prefix of `tokens`, and the node where it ends.

        An edge that matches in part is split, so that the node stands for exactly these pages.
        """
        node, pages = self.root, list[int]()
        self._clock += 1
        while child := node.children.get(self._key(tokens, len(pages))):
            shared = self._shared_pages(child, tokens, len(pages))
            if shared < len(child.pages):
                child = self._split(child, shared)
            child.last_used = self._clock
            pages += child.pages
            node = child
        return pages, node

    def insert(self, tokens: Sequence[int], pages: Sequence[int]) -> tuple[list[int], Node]:
        """Store `pages`, which hold `tokens`; the tree takes those that it did not know.

        Returns the tree's pages of these tokens, and their node. Where they differ from `pages` the caller
        keeps its own.
        """
        known, node = self.match(tokens)
        new = list(pages[len(known) :])
        if new:
            start = len(known) * self.page_size
            leaf = Node(node, list(tokens[start : start + len(new) * self.page_size]), new, self._clock)
            node.children[self._key(tokens, len(known))] = leaf
            self.cached += len(new)
            self.evictable += len(new)
            self._queue(leaf)
            node = leaf
        return known + new, node

    def lock(self, node: Node) -> None:
        """Keep a node and its ancestors until as many `unlock`s."""
        for each in self._path(node):
            self.evictable -= len(each.pages) if each.locks == 0 else 0
            each.locks += 1

    def unlock(self, node: Node) -> None:
        for each in self._path(node):
            assert each.locks > 0, "unlocked more often than locked"
            each.locks -= 1
            if each.locks == 0:
                self.evictable += len(each.pages)
                self._queue(each)

    def evict(self, count: int) -> list[int]:
        """Take `count` pages out of the tree, or all evictable ones if those are fewer.

        The least recently used unlocked leaf gives its last pages first: a prefix outlives what follows it.
        """
        taken: list[int] = []
        while len(taken) < count and self._leaves:
            last_used, _, leaf = heapq.heappop(self._leaves)
            leaf.queued = False
            if leaf.children or leaf.locks:
                continue  # no leaf any more, or locked: it is queued again when that ends
            if last_used < leaf.last_used:
                self._queue(leaf)  # used since it was queued
                continue
            self._trim(leaf, min(len(leaf.pages), count - len(taken)), taken)
        self.cached -= len(taken)
        self.evictable -= len(taken)
        return taken

    def nodes(self) -> Iterator[Node]:
        """Every node but the root, parents first."""
        pending = list(self.root.children.values())
        while pending:
            node = pending.pop()
            yield node
            pending += node.children.values()

    def _key(self, tokens: Sequence[int], page: int) -> PageKey:
        """The tokens of page number `page`; at the end it is shorter than a page, and then never found."""
        return tuple(tokens[page * self.page_size : (page + 1) * self.page_size])

    def _shared_pages(self, child: Node, tokens: Sequence[int], start: int) -> int:
        """How many pages of `child` continue `tokens` from page `start` on; the first one does."""
        size = self.page_size
        given = list(tokens[start * size : start * size + len(child.tokens)])
        if given == child.tokens:
            return len(child.pages)
        low, high = 1, len(given) // size  # by halves, so that each comparison is one of slices
        while low < high:
            middle = (low + high + 1) // 2
            if given[low * size : middle * size] == child.tokens[low * size : middle * size]:
                low = middle
            else:
                high = middle - 1
        return low

    def _split(self, node: Node, count: int) -> Node:
        """Put a node of the first `count` pages above the rest of `node`; returns the new one."""
        assert node.parent is not None, "the root has no pages to split"
        size = self.page_size
        upper = Node(node.parent, node.tokens[: count * size], node.pages[:count], node.last_used)
        upper.locks = node.locks
        node.parent.children[self._key(upper.tokens, 0)] = upper
        node.parent, node.tokens, node.pages = upper, node.tokens[count * size :], node.pages[count:]
        upper.children[self._key(node.tokens, 0)] = node
        return upper

    def _trim(self, leaf: Node, count: int, taken: list[int]) -> None:
        """Move a leaf's last `count` pages to `taken`, the last one first; an empty leaf leaves the tree."""
        assert leaf.parent is not None, "the root is no leaf"
        kept = len(leaf.pages) - count
        taken += reversed(leaf.pages[kept:])
        key = self._key(leaf.tokens, 0)
        del leaf.pages[kept:], leaf.tokens[kept * self.page_size :]
        if kept:
            self._queue(leaf)
        else:
            del leaf.parent.children[key]
            self._queue(leaf.parent)

    def _queue(self, node: Node) -> None:
        """Let `evict` find a node, if it is an unlocked leaf."""
        if node.queued or node.children or node.locks or node.parent is None:
            return
        node.queued = True
        self._pushed += 1
        heapq.heappush(self._leaves, (node.last_used, self._pushed, node))

    @staticmethod
    def _path(node: Node) -> Iterator[Node]:
        """The node and its ancestors, without the root."""
        while node.parent is not None:
            yield node
            node = node.parent
