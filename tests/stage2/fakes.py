"""An engine without a model: a runner whose tokens are known in advance, and a cache of whole pages."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from stages.interface import Request
from stages.stage2_paged.batch import Batch, Row
from stages.stage2_paged.prefix_cache import Prefix
from stages.stage2_paged.request_table import SampledToken

VOCAB = 50
EOS = 0


def token_at(request: Request, position: int) -> int:
    """What stands at a position of a request's sequence: its prompt, then a function of seed and position."""
    if position < len(request.prompt):
        return request.prompt[position]
    if fails(request):
        return 0  # of the row that is under way when it is found
    return random.Random(f"{request.seed} {position}").choice([EOS, *range(1, VOCAB)])


def fails(request: Request) -> bool:
    """Whether no token can be drawn for it; greedy stands for that here."""
    return request.params.temperature == 0


def expected_output(request: Request, context: int) -> tuple[list[int], str]:
    """All tokens of a request that is served to its end, and why it ends."""
    if fails(request):
        return [0], "error"
    start, limit = len(request.prompt), context
    if request.params.max_tokens is not None:
        limit = start + request.params.max_tokens
    output = []
    for position in range(start, limit):
        output.append(token_at(request, position))
        if output[-1] in request.params.stop_token_ids or (
            output[-1] == EOS and not request.params.ignore_eos
        ):
            return output, "stop"
    return output, "length"


class FakeRunner:
    """Stores tokens where a model stores keys, and sees that every row finds its own whole history there.

    It knows of a sequence what the device knows: pages and slots as packed for it, and the newest token of
    each slot. A write into another's page, a stale page table or a shared page that nobody filled shows.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._stored: dict[tuple[int, int], int] = {}  # (page, offset) -> token
        self._tables: dict[int, list[int]] = {}  # slot -> pages
        self._newest: dict[int, int] = {}  # slot -> token

    def launch(self, batch: Batch) -> list[SampledToken]:
        for row in batch.rows:
            known = [] if row.first_new_page == 0 else self._tables[row.slot][: row.first_new_page]
            assert len(known) == row.first_new_page, "the slot's page table has a hole"
            self._tables[row.slot] = known + row.sequence.pages[row.first_new_page :]
        for row in batch.rows:  # every row stores before any attends
            for position in range(row.start, row.end):
                self._stored[self._where(row, position)] = self._token(row, position)
        sampled = []
        for row in batch.rows:
            request = row.sequence.request
            for position in range(row.end):
                assert self._stored[self._where(row, position)] == token_at(request, position), (
                    f"{request.id} finds another's token at {position} of {row.end}"
                )
            if row.samples:
                self._newest[row.slot] = token_at(request, row.end)
                sampled.append(SampledToken(-1 if fails(request) else self._newest[row.slot]))
        return sampled

    def _where(self, row: Row, position: int) -> tuple[int, int]:
        return self._tables[row.slot][position // self._page_size], position % self._page_size

    def _token(self, row: Row, position: int) -> int:
        tokens = row.sequence.tokens
        return tokens[position] if position < len(tokens) else self._newest[row.slot]


@dataclass
class _Node:
    page: int
    locks: int = 0
    used: int = 0


class DictPrefixCache:
    """Every page under the tokens that lead to its end. What stage 3's tree does, without being quick."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._nodes: dict[tuple[int, ...], _Node] = {}
        self._clock = 0

    @property
    def pages(self) -> list[int]:
        return [node.page for node in self._nodes.values()]

    @property
    def locked(self) -> set[int]:
        return {node.page for node in self._nodes.values() if node.locks}

    @property
    def cached(self) -> int:
        return len(self._nodes)

    @property
    def evictable(self) -> int:
        return len(self._nodes) - len(self.locked)

    def match(self, tokens: Sequence[int]) -> Prefix:
        return self._prefix(self._keys(tokens))

    def insert(self, tokens: Sequence[int], pages: Sequence[int]) -> Prefix:
        assert len(tokens) == len(pages) * self._page_size, "whole pages only"
        for i, page in enumerate(pages):
            key = tuple(tokens[: (i + 1) * self._page_size])
            if key not in self._nodes:
                assert page not in self.pages, "a page holds one sequence's tokens"
                self._nodes[key] = _Node(page)
        return self._prefix(self._keys(tokens))

    def lock(self, prefix: Prefix) -> None:
        for key in prefix.node or ():
            self._nodes[key].locks += 1  # KeyError: what is locked was evicted before

    def unlock(self, prefix: Prefix) -> None:
        for key in prefix.node or ():
            assert self._nodes[key].locks > 0, "unlocked more often than locked"
            self._nodes[key].locks -= 1

    def evict(self, count: int) -> list[int]:
        pages = []
        while len(pages) < count:
            parents = {key[: -self._page_size] for key in self._nodes}
            leaves = [key for key, node in self._nodes.items() if not node.locks and key not in parents]
            if not leaves:
                break
            oldest = min(leaves, key=lambda key: self._nodes[key].used)
            pages.append(self._nodes.pop(oldest).page)
        return pages

    def _keys(self, tokens: Sequence[int]) -> list[tuple[int, ...]]:
        keys: list[tuple[int, ...]] = []
        for end in range(self._page_size, len(tokens) + 1, self._page_size):
            if (key := tuple(tokens[:end])) not in self._nodes:
                break
            keys.append(key)
        return keys

    def _prefix(self, keys: list[tuple[int, ...]]) -> Prefix:
        self._clock += 1
        for key in keys:
            self._nodes[key].used = self._clock
        return Prefix([self._nodes[key].page for key in keys], keys)
