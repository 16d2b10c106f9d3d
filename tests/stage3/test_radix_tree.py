"""The radix tree against a dictionary of every prefix."""

import os
import random
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from stages.stage3_radix.radix_tree import Node, RadixTree

EXAMPLES = int(os.environ.get("RADIX_EXAMPLES", "60"))  # more by hand
Key = tuple[int, ...]
seen: Counter[str] = Counter()


@dataclass
class Entry:
    """A page under all tokens that lead to its end."""

    page: int
    used: int
    locks: int = 0


class TreeMachine(RuleBasedStateMachine):
    @initialize(page_size=st.sampled_from([1, 2, 3, 8]))
    def start(self, page_size: int) -> None:
        self.size, self.tree = page_size, RadixTree(page_size)
        self.model: dict[Key, Entry] = {}
        self.clock = self.pages = 0
        self.locked: list[tuple[Key, Node]] = []  # handles, each to be unlocked once

    # Few tokens, so that sequences share prefixes of every length; a page is cut anywhere.
    sequences = st.lists(st.integers(0, 1), max_size=40)

    @rule(tokens=sequences, lock=st.booleans())
    def match(self, tokens: list[int], lock: bool) -> None:
        keys = self._known(tokens)
        pages, node = self.tree.match(tokens)
        assert pages == [self.model[key].page for key in keys]
        self._touch(keys)
        if lock:
            self._lock(keys, node)
        seen["part of an edge matched"] += bool(keys) and any(
            key[: len(keys[-1])] == keys[-1] != key for key in self.model
        )

    @rule(tokens=sequences, lock=st.booleans())
    def insert(self, tokens: list[int], lock: bool) -> None:
        count = len(tokens) // self.size
        tokens = tokens[: count * self.size]
        known = self._known(tokens)
        given = list(range(self.pages, self.pages + count))
        self.pages += count
        pages, node = self.tree.insert(tokens, given)
        keys = [tuple(tokens[: (i + 1) * self.size]) for i in range(count)]
        for i in range(len(known), count):
            self.model[keys[i]] = Entry(given[i], 0)
        assert pages == [self.model[key].page for key in keys], "known pages stay, the others are taken"
        self._touch(keys)
        if lock:
            self._lock(keys, node)

    @precondition(lambda self: self.locked)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        key, node = self.locked.pop(data.draw(st.integers(0, len(self.locked) - 1)))
        self.tree.unlock(node)
        for end in range(self.size, len(key) + 1, self.size):
            self.model[key[:end]].locks -= 1

    @rule(count=st.integers(0, 12))
    def evict(self, count: int) -> None:
        free = sum(entry.locks == 0 for entry in self.model.values())
        taken = self.tree.evict(count)
        assert len(taken) == min(count, free)
        for page in taken:  # each was the least recently used of the leaves that were left
            parents = {key[: -self.size] for key in self.model}
            leaves = {e.page: e.used for k, e in self.model.items() if not e.locks and k not in parents}
            assert leaves.get(page) == min(leaves.values())
            del self.model[next(key for key, entry in self.model.items() if entry.page == page)]
        seen["evicted"] += len(taken)
        seen["locked pages outlived an eviction"] += bool(taken and self.locked)

    def _known(self, tokens: list[int]) -> list[Key]:
        keys: list[Key] = []
        for end in range(self.size, len(tokens) + 1, self.size):
            if (key := tuple(tokens[:end])) not in self.model:
                break
            keys.append(key)
        return keys

    def _touch(self, keys: list[Key]) -> None:
        self.clock += 1
        for key in keys:
            self.model[key].used = self.clock

    def _lock(self, keys: list[Key], node: Node) -> None:
        self.tree.lock(node)
        self.locked.append((keys[-1] if keys else (), node))
        for key in keys:
            self.model[key].locks += 1

    @invariant()
    def the_tree_is_the_dictionary(self) -> None:
        if not hasattr(self, "tree"):
            return
        found: dict[Key, tuple[int, int]] = {}
        paths: dict[int, list[int]] = {id(self.tree.root): []}
        for node in self.tree.nodes():
            assert node.parent is not None
            assert len(node.tokens) == len(node.pages) * self.size > 0
            assert node.parent.children[tuple(node.tokens[: self.size])] is node
            assert node.locks >= sum(child.locks for child in node.children.values())
            path = [*paths[id(node.parent)], *node.tokens]
            paths[id(node)] = path
            for i, page in enumerate(node.pages):
                end = len(path) - len(node.tokens) + (i + 1) * self.size
                found[tuple(path[:end])] = page, node.locks
        assert found == {key: (entry.page, entry.locks) for key, entry in self.model.items()}
        assert self.tree.cached == len(found)
        assert self.tree.evictable == sum(locks == 0 for _, locks in found.values())

    def teardown(self) -> None:
        if hasattr(self, "tree"):
            for _, node in self.locked:
                self.tree.unlock(node)
            assert sorted(self.tree.evict(10**9)) == sorted(entry.page for entry in self.model.values())
            assert (self.tree.cached, self.tree.evictable, list(self.tree.nodes())) == (0, 0, [])


TestTree = TreeMachine.TestCase
TestTree.settings = settings(max_examples=EXAMPLES, stateful_step_count=50, deadline=None, derandomize=True)


def test_the_machine_met_what_it_is_for() -> None:
    if not seen:
        pytest.skip("the machine was not run")
    assert all(
        seen[what] for what in ("evicted", "part of an edge matched", "locked pages outlived an eviction")
    )


def test_recency_decides() -> None:
    tree = RadixTree(1)
    tree.insert([1, 2, 3], [0, 1, 2])
    tree.insert([1, 7], [9, 3])
    tree.match([1, 2, 3])
    assert tree.evict(1) == [3], "7 was used longest ago"
    assert tree.evict(2) == [2, 1], "an edge gives its end first"
    assert tree.match([1, 2, 3])[0] == [0]


def test_costs_do_not_grow_with_what_is_cached() -> None:
    """Counted in comparisons of tokens, not in seconds: a busy machine must not fail it."""
    compared = 0

    class Token(int):
        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return int.__eq__(self, other) is True

        __hash__ = int.__hash__

    def cost(prompts: int) -> int:
        nonlocal compared
        rng, tree = random.Random(0), RadixTree(16)
        for i in range(prompts):
            tree.insert(rng.choices(range(50_000), k=160), list(range(10 * i, 10 * i + 10)))
        probe = [Token(rng.randrange(50_000)) for _ in range(160)]
        tree.insert(probe, list(range(-10, 0)))
        compared = 0
        assert len(tree.match([Token(token) for token in probe])[0]) == 10
        return compared

    few, many = cost(10), cost(2000)
    assert many <= few + 32, f"{few} comparisons with 10 prompts cached, {many} with 2,000"
