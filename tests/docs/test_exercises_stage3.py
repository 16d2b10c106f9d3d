"""The checks of lesson 3's exercises accept these solutions, and refuse what is almost right."""

from collections.abc import Sequence

import pytest

from docs.exercises import stage3
from stages.stage2_paged.batch import Row
from stages.stage2_paged.scheduler import Scheduler
from stages.stage3_radix.radix_tree import RadixTree


def computed(prompts: Sequence[Sequence[int]], page_size: int) -> int:
    known: set[tuple[int, ...]] = set()  # all tokens up to the end of a page
    total = 0
    for prompt in prompts:
        found = 0
        while found + page_size < len(prompt) and tuple(prompt[: found + page_size]) in known:
            found += page_size
        total += len(prompt) - found
        known |= {tuple(prompt[:end]) for end in range(page_size, len(prompt) + 1, page_size)}
    return total


def victims(tree: RadixTree, count: int) -> list[int]:
    nodes = list(tree.nodes())
    children = {id(node): len(node.children) for node in nodes}
    gone: set[int] = set()
    taken: list[int] = []
    while len(taken) < count:
        leaves = [n for n in nodes if not (n.locks or children[id(n)] or id(n) in gone)]
        if not leaves:
            break
        leaf = min(leaves, key=lambda node: node.last_used)
        gone.add(id(leaf))
        taken += reversed(leaf.pages)
        if leaf.parent is not tree.root:
            children[id(leaf.parent)] -= 1
    return taken[:count]


class LongestPrefixFirst(Scheduler):
    def _prefill(self) -> list[Row]:
        table = self._table
        table.waiting.sort(key=lambda s: (-len(table.match(s).pages), s.arrival))
        rows = super()._prefill()
        table.waiting.sort(key=lambda s: s.arrival)
        return rows


class ChainedPages:
    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._pages: dict[tuple[int, tuple[int, ...]], int] = {}  # (the page before, tokens) -> page

    def match(self, tokens: Sequence[int]) -> list[int]:
        pages: list[int] = []
        before = -1
        while (page := self._pages.get(self._key(before, tokens, len(pages)))) is not None:
            pages.append(page)
            before = page
        return pages

    def insert(self, tokens: Sequence[int], pages: Sequence[int]) -> list[int]:
        known = self.match(tokens)
        for i in range(len(known), len(pages)):
            self._pages[self._key(known[-1] if known else -1, tokens, i)] = pages[i]
            known.append(pages[i])
        return known

    def _key(self, before: int, tokens: Sequence[int], page: int) -> tuple[int, tuple[int, ...]]:
        return before, tuple(tokens[page * self._page_size : (page + 1) * self._page_size])


def test_the_stubs_are_to_do() -> None:
    for check in stage3.CHECKS.values():
        with pytest.raises(NotImplementedError):
            check()


def test_the_solutions_pass() -> None:
    stage3.check_computed(computed)
    stage3.check_victims(victims)
    stage3.check_longest_prefix_first(LongestPrefixFirst)
    stage3.check_chained_pages(ChainedPages)


def test_counts_that_forget_something_are_refused() -> None:
    def forgets_the_last_token(prompts: Sequence[Sequence[int]], page_size: int) -> int:
        known: set[tuple[int, ...]] = set()
        total = 0
        for prompt in prompts:
            ends = range(page_size, len(prompt) + 1, page_size)
            found = max((end for end in ends if tuple(prompt[:end]) in known), default=0)
            known |= {tuple(prompt[:end]) for end in ends}
            total += len(prompt) - found
        return total

    for wrong in (
        forgets_the_last_token,
        lambda prompts, size: computed(prompts, 1),  # forgets pages
        lambda prompts, size: sum(map(len, prompts)),  # forgets to share
    ):
        with pytest.raises(AssertionError, match="positions"):
            stage3.check_computed(wrong)


def test_victims_must_be_the_right_ones_and_the_tree_stay_whole() -> None:
    with pytest.raises(AssertionError, match="changed"):
        stage3.check_victims(lambda tree, count: tree.evict(count))

    def oldest_nodes(tree: RadixTree, count: int) -> list[int]:
        nodes = sorted(tree.nodes(), key=lambda node: node.last_used)
        return [page for node in nodes if not node.locks for page in reversed(node.pages)][:count]

    def only_leaves(tree: RadixTree, count: int) -> list[int]:
        leaves = sorted((n for n in tree.nodes() if not n.children), key=lambda node: node.last_used)
        return [page for node in leaves if not node.locks for page in reversed(node.pages)][:count]

    def first_page_first(tree: RadixTree, count: int) -> list[int]:
        order = {page: i for node in tree.nodes() for i, page in enumerate(node.pages)}
        return sorted(victims(tree, count), key=lambda page: order[page])

    def locked_too(tree: RadixTree, count: int) -> list[int]:
        locks = [(node, node.locks) for node in tree.nodes()]
        for node, _ in locks:
            node.locks = 0
        try:
            return victims(tree, count)
        finally:
            for node, count in locks:
                node.locks = count

    for wrong in (oldest_nodes, only_leaves, first_page_first, locked_too):
        with pytest.raises(AssertionError, match="gives"):
            stage3.check_victims(wrong)


def test_overtaking_goes_by_what_is_found_then_by_arrival() -> None:
    class KeepsItsOrder(Scheduler):
        def _prefill(self) -> list[Row]:
            self._table.waiting.sort(key=lambda s: (-len(self._table.match(s).pages), s.arrival))
            return super()._prefill()

    class LastComesFirst(Scheduler):
        def _prefill(self) -> list[Row]:
            table = self._table
            table.waiting.sort(key=lambda s: (-len(table.match(s).pages), -s.arrival))
            rows = super()._prefill()
            table.waiting.sort(key=lambda s: s.arrival)
            return rows

    with pytest.raises(AssertionError, match="another finds"):
        stage3.check_longest_prefix_first(Scheduler)
    with pytest.raises(AssertionError, match="order of arrival"):
        stage3.check_longest_prefix_first(KeepsItsOrder)
    with pytest.raises(AssertionError, match="came first"):
        stage3.check_longest_prefix_first(LastComesFirst)


def test_a_key_stands_for_all_tokens_and_is_short() -> None:
    class TokensOfThePage(ChainedPages):
        def _key(self, before: int, tokens: Sequence[int], page: int) -> tuple[int, tuple[int, ...]]:
            return super()._key(-1, tokens, page)

    class AllTokens(ChainedPages):
        def _key(self, before: int, tokens: Sequence[int], page: int) -> tuple[int, tuple[int, ...]]:
            end = (page + 1) * self._page_size
            return -1, tuple(tokens[:end]) if end <= len(tokens) else ()

    class Overwrites(ChainedPages):
        def insert(self, tokens: Sequence[int], pages: Sequence[int]) -> list[int]:
            for i, page in enumerate(pages):
                self._pages[self._key(pages[i - 1] if i else -1, tokens, i)] = page
            return list(pages)

    for wrong in (TokensOfThePage, Overwrites):
        with pytest.raises(AssertionError, match="gives"):
            stage3.check_chained_pages(wrong)
    with pytest.raises(AssertionError, match="times the work"):
        stage3.check_chained_pages(AllTokens)
