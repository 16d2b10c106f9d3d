"""The budget, the order, and the invariants of the table, whatever happens in the middle of a prompt."""

from collections import Counter

import pytest

from stages.interface import Request, SamplingParams
from stages.stage1_naive.limits import Limits
from stages.stage2_paged.batch import Batch
from stages.stage2_paged.prefix_cache import NoPrefixCache
from stages.stage2_paged.request_table import RequestTable
from stages.stage4_chunked.scheduler import ChunkedScheduler
from tests.stage2.fakes import VOCAB, FakeRunner
from tests.stage2.table_machine import TableMachine, machine
from tests.stage3.watched import WatchedRadixCache

seen: Counter[str] = Counter()  # what the random runs of this file met


class ChunkedMachine(TableMachine):
    make_scheduler = ChunkedScheduler

    def _check_batch(self, batch: Batch, waiting: list[object]) -> None:
        rows = batch.rows
        assert 1 <= len(rows) <= self.rows
        assert sum(row.length for row in rows) <= self.budget
        assert len({row.slot for row in rows}) == len({id(row.sequence) for row in rows}) == len(rows)
        decode, prefill = rows[: batch.num_decode], rows[batch.num_decode :]
        assert all(row.length == 1 and not row.enters for row in decode)
        for part in (decode, prefill):
            arrivals = [row.sequence.arrival for row in part]
            assert arrivals == sorted(arrivals)
        entering = [row.sequence for row in prefill if row.enters]
        in_queue = [s for s in waiting if s not in self.table.waiting]
        again = [s for s in entering if s not in waiting]  # preempted in this step, and it fits after all
        assert entering == again + in_queue, "the queue goes from its head"
        for row in prefill[:-1]:
            assert row.samples, "only the last row of a batch is cut short"
        for row in rows:
            sequence = row.sequence
            assert row.slot == sequence.slot
            assert row.end == sequence.scheduled <= len(sequence.pages) * self.page_size
            assert row.samples == (sequence.in_flight and row.end == sequence.length - 1)
            assert sequence.length <= sequence.limit
        computed = {row.slot for row in rows}
        for s in self.table.running:
            stopped = s.length == s.limit  # its last token is in flight
            assert s.slot in computed or stopped or s.length - s.scheduled > 1, "who decodes never waits"
        full = sum(row.length for row in rows) == self.budget
        assert full or all(s.slot in computed or s.length == s.limit for s in self.table.running)
        self.seen["cut prompts"] += any(not row.samples for row in prefill)
        self.seen["mixed"] += bool(decode and prefill)

    def _most_steps(self) -> int:
        return 2 * self.context * len(self.live) + 10

    def _abort(self, name: str) -> None:
        for s in self.table.running:
            self.seen["aborted in mid-prompt"] += s.request.id == name and s.length - s.scheduled > 1
        super()._abort(name)


def no_cache(page_size: int) -> NoPrefixCache:
    return NoPrefixCache()


TestAtOnce = machine(ChunkedMachine, seen, late=False, make_cache=WatchedRadixCache)
TestLate = machine(ChunkedMachine, seen, late=True, make_cache=WatchedRadixCache)
TestWithoutCache = machine(ChunkedMachine, seen, late=True, make_cache=no_cache)


def test_the_machines_met_what_they_are_for() -> None:
    if not seen:
        pytest.skip("the machines were not run")
    for what in (
        "aborted in mid-prompt", "preempted", "preempted in flight",
        "discarded rows", "cache hits", "evicted", "cut prompts", "mixed",
    ):  # fmt: skip
        assert seen[what] > 0, what


class Drive:
    """A table without a model; what each step computed, as (request, first position, how many)."""

    def __init__(self, budget: int, pages: int = 100, page_size: int = 4, rows: int = 4) -> None:
        self.cache = WatchedRadixCache(page_size)
        self.table = RequestTable(Limits(VOCAB, 300, frozenset()), pages, page_size, rows, self.cache)
        self.scheduler = ChunkedScheduler(self.table, budget)
        self.runner = FakeRunner(page_size)

    def add(self, name: str, prompt: list[int], max_tokens: int) -> None:
        self.table.add(Request(name, prompt, SamplingParams(max_tokens=max_tokens)))

    def step(self, abort: str | None = None) -> list[tuple[str, int, int]]:
        batch = self.scheduler.schedule()
        assert batch is not None
        sampled = self.runner.launch(batch)
        if abort is not None:
            self.table.abort(abort)
        self.table.commit(batch, sampled)
        return [(row.sequence.request.id, row.start, row.length) for row in batch.rows]


def test_a_step_in_words() -> None:
    drive = Drive(budget=10)
    drive.add("short", [1] * 3, max_tokens=9)
    drive.add("long", [2] * 25, max_tokens=2)
    drive.add("last", [3] * 4, max_tokens=2)
    assert drive.step() == [("short", 0, 3), ("long", 0, 7)]
    assert drive.step() == [("short", 3, 1), ("long", 7, 9)]
    assert drive.step() == [("short", 4, 1), ("long", 16, 9)]
    assert drive.step() == [("short", 5, 1), ("long", 25, 1), ("last", 0, 4)]


@pytest.mark.parametrize("budget", [4, 5, 7, 50])
def test_a_long_prompt_starves_nobody_and_is_not_starved(budget: int) -> None:
    drive = Drive(budget, pages=300)
    for name in "abc":
        drive.add(name, [ord(name) % 50], max_tokens=200)
    drive.add("long", [7] * 120, max_tokens=1)
    steps = 0
    while any(s.request.id == "long" for s in (*drive.table.running, *drive.table.waiting)):
        rows = drive.step()
        steps += 1
        if steps > 1:
            assert [name for name, _, _ in rows[:3]] == ["a", "b", "c"]
        assert len(drive.table.running) < 4 or rows[-1][0] == "long"
        drive.add(f"more {steps}", [9] * 9, max_tokens=1)
        assert steps <= 123
    assert steps <= 3 + 120 // (budget - 3)


def test_finished_chunks_are_found_while_the_prompt_is_still_read() -> None:
    """The long request is aborted in mid-prompt; the one behind it starts where that one was."""
    drive = Drive(budget=8, rows=2)
    stem = [1 + i % 9 for i in range(40)]
    drive.add("first", [*stem, 20], max_tokens=1)
    drive.add("second", [*stem, 30], max_tokens=1)
    drive.step()
    assert drive.step(abort="first") == [("first", 8, 8)]
    assert drive.table.statistics.cached_pages == 4
    assert drive.step() == [("second", 16, 8)]
    while drive.table.has_work:
        drive.step()
    counted = drive.table.statistics
    assert counted.free_pages + counted.cached_pages == counted.pages
    assert drive.cache.evictable == drive.cache.cached


def test_a_prompt_is_preempted_in_its_middle() -> None:
    """Decode rows take pages first; who lost them reads its prompt again, and every row finds its history."""
    drive = Drive(budget=2, pages=6, rows=2)
    drive.add("old", [1, 2, 3], max_tokens=12)
    drive.add("young", [4] * 16, max_tokens=1)
    young = drive.table.waiting[1]
    while not drive.table.statistics.preemptions:
        drive.step()
    assert (young.slot, len(young.tokens)) == (None, 16)
    while drive.table.has_work:
        drive.step()
    assert young.done
