"""Exercises of lesson 3. Fill in the functions, then run, in the repository's root:

    python -m docs.exercises.stage3

Each one says whether it passed. Solutions are in tests/docs/test_exercises_stage3.py.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

from docs.exercises.checker import run_checks
from stages.interface import Request, SamplingParams
from stages.stage1_naive.limits import Limits
from stages.stage2_paged.batch import Row
from stages.stage2_paged.request_table import RequestTable, SampledToken
from stages.stage2_paged.scheduler import Scheduler
from stages.stage3_radix.prefix_cache import RadixPrefixCache
from stages.stage3_radix.radix_tree import RadixTree


def computed(prompts: Sequence[Sequence[int]], page_size: int) -> int:
    """Exercise 1: how many positions does stage 3 compute for these prompts, if they arrive together, in this
    order, at an engine that has cached nothing? One batch takes them all."""
    raise NotImplementedError


def victims(tree: RadixTree, count: int) -> list[int]:
    """Exercise 2: the pages that `tree.evict(count)` would return, in its order, without changing the tree.

    Take what `tree.nodes()` and the attributes of `Node` tell. No two leaves have the same `last_used`, now
    or as others go. Speed does not matter.
    """
    raise NotImplementedError


class LongestPrefixFirst(Scheduler):
    """Exercise 3: whoever finds most pages in the cache is admitted first; among equals, who came first.

    It is enough to decide once a step. `waiting` is in order of arrival, and has to be when you return.
    """

    def _prefill(self) -> list[Row]:
        raise NotImplementedError


class ChainedPages:
    """Exercise 4: a prefix cache in one dictionary, with an entry for each page.

    It finds what `RadixTree` finds. The work of a call must be in proportion to the tokens that it is given,
    so a key may not hold all the tokens that lead to its page.
    """

    def __init__(self, page_size: int) -> None:
        raise NotImplementedError

    def match(self, tokens: Sequence[int]) -> list[int]:
        """The pages of the longest known prefix of `tokens`, by whole pages."""
        raise NotImplementedError

    def insert(self, tokens: Sequence[int], pages: Sequence[int]) -> list[int]:
        """Remember `pages`, which hold `tokens` (as many as fill them); returns the pages that the cache now
        has for these tokens. Those that it knew before stay."""
        raise NotImplementedError


# --- The checks ----------------------------------------------------------------------------------


def check_computed(solution: Callable[[Sequence[Sequence[int]], int], int]) -> None:
    shared = list(range(16))
    loads = [
        [[*shared, 30 + i, 40] for i in range(4)],
        [shared, shared],  # a whole prompt is known
        [shared, [*shared, 1]],
        [[7], [7], [7, 7]],
        [[1, *shared], shared, [1, *shared[:9], 5]],
    ]
    draw = random.Random(0)
    loads += [[draw.choices((1, 2), k=draw.randint(1, 12)) for _ in range(6)] for _ in range(20)]
    for prompts in loads:
        for page_size in (1, 2, 4, 16):
            table = _table(page_size=page_size, pages=400, rows=len(prompts))
            for i, prompt in enumerate(prompts):
                table.add(Request(str(i), prompt, SamplingParams(max_tokens=1)))
            batch = Scheduler(table, 400).schedule()
            assert batch is not None
            expected = sum(row.length for row in batch.rows)
            result = solution([list(prompt) for prompt in prompts], page_size)
            assert result == expected, (
                f"with pages of {page_size}, {prompts} need {expected} positions, not {result}"
            )


def check_victims(solution: Callable[[RadixTree, int], list[int]]) -> None:
    for seed in range(60):
        tree = _tree(seed)
        before = _contents(tree)
        for count in (0, 1, 3, 7, 1000):
            result = solution(tree, count)
            assert _contents(tree) == before, "the tree was changed"
            same = _tree(seed)
            expected = same.evict(count)
            assert result == expected, f"evict({count}) gives {expected}, not {result}"


def _tree(seed: int) -> RadixTree:
    """Branches of all lengths, some of them locked."""
    draw = random.Random(seed)
    tree, page = RadixTree(2), 0
    for _ in range(12):
        tokens = draw.choices((0, 1), k=2 * draw.randint(1, 5))
        tree.insert(tokens, range(page, page + len(tokens) // 2))
        page += len(tokens) // 2
        if draw.random() < 0.4:
            tree.match(draw.choices((0, 1), k=10))
        if draw.random() < 0.15:
            tree.lock(tree.match(draw.choices((0, 1), k=10))[1])
    return tree


def _contents(tree: RadixTree) -> list[Any]:
    nodes = [(node.tokens[:], node.pages[:], node.locks, node.last_used) for node in tree.nodes()]
    return [nodes, tree.cached, tree.evictable]


def check_longest_prefix_first(solution: type[Scheduler]) -> None:
    first_come, _ = serve(Scheduler)
    longest, admitted = serve(solution)
    for name, found, waiting in admitted:
        best = max(waiting.values())
        assert waiting[name] == best, f"{name} finds {waiting[name]} pages, but another finds {best}"
        first = min((n for n, pages in waiting.items() if pages == best), key=int)
        assert name == first, f"{name} and {first} find {best} pages each, and {first} came first"
        assert found == best, f"{name} was to find {best} pages, but found {found}"
    assert longest > first_come, (
        f"the hit rate is {longest:.0%}, and {first_come:.0%} first come, first served"
    )
    print(f"  hit rate {longest:.0%} instead of {first_come:.0%}")


Admission = tuple[str, int, dict[str, int]]


def serve(scheduler_type: type[Scheduler]) -> tuple[float, list[Admission]]:
    """Serve four families of prompts by turns, one request at a time, with a cache that has room for little
    more than one family; the hit rate, and for each admission: who, the pages that it found, and those that
    each of the waiting would have found."""
    cache = RadixPrefixCache(4)
    table = _table(page_size=4, pages=14, rows=1, cache=cache)
    scheduler = scheduler_type(table, 56)
    for i in range(24):
        family = i % 4
        table.add(Request(str(i), [family] * 32 + [10 + i, 0, 0, 0, 0], SamplingParams(max_tokens=1)))
    admitted: list[Admission] = []
    while table.has_work:
        known = {s.request.id: _known(cache.tree, s.tokens[:-1]) for s in table.waiting}
        batch = scheduler.schedule()
        assert batch is not None, "there is work, but nothing was scheduled"
        arrivals = [sequence.arrival for sequence in table.waiting]
        assert arrivals == sorted(arrivals), "the queue is not in order of arrival any more"
        row = batch.rows[0]
        admitted.append((row.sequence.request.id, row.start // 4, known))
        table.commit(batch, [SampledToken(1)] * len(batch.sampling))
    return table.statistics.hit_rate, admitted


def _known(tree: RadixTree, tokens: Sequence[int]) -> int:
    """How many pages of `tokens` the tree has, without touching it."""
    stored = {(): 0}
    paths: dict[int, tuple[int, ...]] = {id(tree.root): ()}
    for node in tree.nodes():
        above = paths[id(node.parent)]
        paths[id(node)] = (*above, *node.tokens)
        for end in range(tree.page_size, len(node.tokens) + 1, tree.page_size):
            path = (*above, *node.tokens[:end])
            stored[path] = len(path) // tree.page_size
    ends = range(0, len(tokens) + 1, tree.page_size)
    return max(stored.get(tuple(tokens[:end]), 0) for end in ends)


def _table(page_size: int, pages: int, rows: int, cache: RadixPrefixCache | None = None) -> RequestTable:
    limits = Limits(vocab_size=100, context_length=64, eos_token_ids=frozenset())
    return RequestTable(limits, pages, page_size, rows, cache or RadixPrefixCache(page_size))


class _Token(int):
    """A token that counts how often one was hashed or compared."""

    used = 0

    def __hash__(self) -> int:
        _Token.used += 1
        return int.__hash__(self)

    def __eq__(self, other: object) -> bool:
        _Token.used += 1
        return int(self) == other


def check_chained_pages(solution: Callable[[int], ChainedPages]) -> None:
    draw = random.Random(0)
    for page_size in (1, 2, 3):
        tree, chained, page = RadixTree(page_size), solution(page_size), 0
        for _ in range(300):
            tokens = draw.choices((0, 1), k=draw.randint(0, 14))
            if draw.random() < 0.5:
                full = len(tokens) // page_size
                given, tokens = list(range(page, page + full)), tokens[: full * page_size]
                page += full
                expected, result = tree.insert(tokens, given)[0], chained.insert(list(tokens), list(given))
                assert result == expected, f"insert({tokens}, {given}) gives {expected}, not {result}"
            else:
                expected, result = tree.match(tokens)[0], chained.match(list(tokens))
                assert result == expected, f"match({tokens}) gives {expected}, not {result}"
    few, many = (_work(solution(4), pages) for pages in (50, 200))
    assert many < 6 * few, f"four times the tokens need {many / few:.0f} times the work"


def _work(cache: ChainedPages, pages: int) -> int:
    """Tokens hashed and compared to insert and match so many pages."""
    tokens = list(range(1000, 1000 + 4 * pages))
    _Token.used = 0
    cache.insert([_Token(token) for token in tokens], list(range(pages)))
    assert cache.match([_Token(token) for token in tokens]) == list(range(pages))
    return max(_Token.used, 1)


CHECKS: dict[str, Callable[[], None]] = {
    "1 computed": lambda: check_computed(computed),
    "2 victims": lambda: check_victims(victims),
    "3 LongestPrefixFirst": lambda: check_longest_prefix_first(LongestPrefixFirst),
    "4 ChainedPages": lambda: check_chained_pages(ChainedPages),
}


if __name__ == "__main__":
    run_checks(CHECKS)
