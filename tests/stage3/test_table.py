"""Stage 2's invariants with the radix cache: shared prefixes, tiny caches, aborts, preemptions."""

from collections import Counter

import pytest

from stages.interface import Request, SamplingParams
from stages.stage1_naive.limits import Limits
from stages.stage2_paged.request_table import RequestTable, SampledToken
from stages.stage2_paged.scheduler import Scheduler
from stages.stage3_radix.prefix_cache import RadixPrefixCache
from tests.stage2.fakes import VOCAB, FakeRunner, token_at
from tests.stage2.table_machine import TableMachine, machine
from tests.stage3.watched import WatchedRadixCache

seen: Counter[str] = Counter()  # what the random runs of this file met

TestAtOnce = machine(TableMachine, seen, late=False, make_cache=WatchedRadixCache)
TestLate = machine(TableMachine, seen, late=True, make_cache=WatchedRadixCache)


def test_the_machines_met_what_they_are_for() -> None:
    if not seen:
        pytest.skip("the machines were not run")
    for what in (
        "aborted",
        "preempted",
        "preempted in flight",
        "discarded rows",
        "cache hits",
        "evicted",
    ):
        assert seen[what] > 0, what


class Drive:
    """A table with a radix cache, its scheduler, and a runner that checks every position a row can see."""

    def __init__(self, pages: int = 40, page_size: int = 4, rows: int = 8, budget: int = 100) -> None:
        self.cache = WatchedRadixCache(page_size)
        self.table = RequestTable(Limits(VOCAB, 120, frozenset()), pages, page_size, rows, self.cache)
        self.scheduler = Scheduler(self.table, budget)
        self.runner = FakeRunner(page_size)
        self.computed: list[tuple[str, int, int]] = []  # request, first position, how many

    def add(self, name: str, prompt: list[int], max_tokens: int = 4) -> None:
        self.table.add(Request(name, prompt, SamplingParams(max_tokens=max_tokens)))

    def step(self, between: str | None = None, preempt: str | None = None) -> None:
        """One step; `between` is aborted, or `preempt` preempted, before its tokens are known."""
        batch = self.scheduler.schedule()
        assert batch is not None
        self.computed += [(row.sequence.request.id, row.start, row.length) for row in batch.rows]
        sampled: list[SampledToken] = self.runner.launch(batch)
        if between is not None:
            self.table.abort(between)
        if preempt is not None:
            self.table.preempt(next(s for s in self.table.running if s.request.id == preempt))
        self.table.commit(batch, sampled)

    def finish(self) -> None:
        while self.table.has_work:
            self.step()

    def starts(self) -> dict[str, list[int]]:
        """Where each request's rows begin that are longer than one token."""
        found: dict[str, list[int]] = {}
        for name, start, length in self.computed:
            if length > 1:
                found.setdefault(name, []).append(start)
        return found


SHARED = [1 + i % 7 for i in range(16)]


def test_a_prefix_is_computed_once_inside_one_batch() -> None:
    drive = Drive()
    for i in range(4):
        drive.add(str(i), [*SHARED, 30 + i, 40])
    drive.step()
    assert drive.computed == [("0", 0, 18), ("1", 16, 2), ("2", 16, 2), ("3", 16, 2)]
    assert len(drive.cache.pages) == 4, "one copy of the shared pages"
    drive.finish()
    statistics = drive.table.statistics
    assert (statistics.prompt_tokens, statistics.cached_tokens) == (4 * 18, 3 * 16)
    assert statistics.hit_rate == pytest.approx(2 / 3)


@pytest.mark.parametrize("how", ["between", "preempt"])
def test_the_computing_request_goes_before_its_batch_is_committed(how: str) -> None:
    """The FakeRunner would find holes where the others read."""
    drive = Drive()
    for name in "abc":
        drive.add(name, [*SHARED, ord(name) % 50])
    drive.step(**{how: "a"})
    drive.add("d", [*SHARED, 3, 3, 3, 3])
    drive.finish()
    assert drive.starts()["d"] == [16]
    if how == "preempt":  # it finds its own prefix again, and the token that was sampled meanwhile
        assert drive.starts()["a"] == [0, 16]


def test_a_whole_prompt_in_the_cache_leaves_its_last_token_to_compute() -> None:
    drive = Drive()
    drive.add("a", SHARED)
    drive.finish()
    drive.add("b", SHARED)
    drive.finish()
    assert drive.starts()["b"] == [12], "a whole page, for positions are computed by pages"


def test_generated_tokens_are_found_by_the_next_turn() -> None:
    drive = Drive(page_size=1, pages=120)
    prompt, turns = list(SHARED), 4
    for turn in range(turns):
        name = str(turn)
        drive.add(name, prompt, max_tokens=5)
        drive.finish()
        request = Request(name, prompt, SamplingParams())
        prompt = [*prompt, *(token_at(request, len(prompt) + i) for i in range(5)), 9, 9, 9]
    # a turn computes what is new: the last sampled token, whose keys nobody computed, and the user's three
    assert drive.starts() == {str(turn): [0 if turn == 0 else 12 + 8 * turn] for turn in range(turns)}


def test_an_aborted_prompt_stays_cached() -> None:
    drive = Drive()
    drive.add("a", SHARED)
    drive.step(between="a")
    assert not drive.table.has_work
    assert drive.table.statistics.cached_pages == 4
    drive.add("b", [*SHARED, 9])
    drive.finish()
    assert drive.starts().get("b") is None, "one token was left to compute"


def test_a_blocked_head_is_not_matched_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    matched = 0
    match = RadixPrefixCache.match

    def counted(cache: RadixPrefixCache, tokens: list[int]) -> object:
        nonlocal matched
        matched += 1
        return match(cache, tokens)

    monkeypatch.setattr(RadixPrefixCache, "match", counted)
    drive = Drive(pages=12)
    drive.add("running", [7] * 4, max_tokens=20)
    drive.add("head", [8] * 44, max_tokens=1)
    drive.step()
    before = matched
    for _ in range(15):
        drive.step()
    assert matched == before
    drive.finish()
    assert [name for name, _, _ in drive.computed][-1] == "head"
