"""Random arrivals, aborts and steps against the table and scheduler of any stage, without a model."""

import os
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from stages.interface import Request, RequestRefused, SamplingParams
from stages.stage1_naive.limits import Limits
from stages.stage2_paged.assembly import MakeScheduler
from stages.stage2_paged.batch import Batch
from stages.stage2_paged.prefix_cache import PrefixCache
from stages.stage2_paged.request_table import RequestTable, SampledToken
from stages.stage2_paged.scheduler import Scheduler
from tests.stage2.fakes import EOS, VOCAB, FakeRunner, expected_output, fails

CONTEXT = 40
EXAMPLES = int(os.environ.get("TABLE_EXAMPLES", "40"))  # more by hand


class TableMachine(RuleBasedStateMachine):
    """Arrivals, aborts and steps against a table with a fake runner. `late` commits a batch after the next
    one was scheduled and launched, as stage 5 does. A prefix cache that has `pages` and `locked` is checked.
    `seen` counts what the runs met."""

    seen: ClassVar[Counter[str]]
    late: ClassVar[bool] = False
    make_cache: ClassVar[Callable[[int], PrefixCache]]  # of a page size
    make_scheduler: ClassVar[MakeScheduler] = Scheduler

    @initialize(
        page_size=st.sampled_from([1, 2, 4, 16]), tokens=st.integers(20, 80), rows=st.integers(1, 6),
        budget=st.integers(6, 50),
    )  # fmt: skip
    def start(self, page_size: int, tokens: int, rows: int, budget: int) -> None:
        pages = max(2, tokens // page_size)  # one or two long requests fill them
        self.pages, self.rows, self.budget, self.page_size = pages, rows, budget, page_size
        self.context = min(CONTEXT, pages * page_size)
        limits = Limits(VOCAB, self.context, frozenset({EOS}))
        self.cache: Any = type(self).make_cache(page_size)
        self.table = RequestTable(limits, pages, page_size, rows, self.cache)
        self.scheduler = type(self).make_scheduler(self.table, budget)
        self.runner = FakeRunner(page_size)
        self.in_flight: tuple[Batch, list[SampledToken]] | None = None
        self.requests: dict[str, Request] = {}
        self.outputs: dict[str, list[int]] = {}
        self.ended: dict[str, str] = {}
        self.aborted: set[str] = set()

    @rule(
        length=st.integers(1, 8) | st.integers(1, CONTEXT), max_tokens=st.none() | st.integers(1, 30),
        seed=st.integers(0, 3), follows=st.integers(0, 9), ignore_eos=st.booleans(),
        stops=st.lists(st.integers(1, VOCAB - 1), max_size=3), bad=st.integers(0, 7).map(lambda n: n == 7),
    )  # fmt: skip
    def add(
        self, length: int, max_tokens: int | None, seed: int, follows: int, ignore_eos: bool,
        stops: list[int], bad: bool,
    ) -> None:  # fmt: skip
        name = str(len(self.requests))
        params = SamplingParams(
            temperature=float(not bad), max_tokens=max_tokens, ignore_eos=ignore_eos, stop_token_ids=stops
        )
        prompt = [1 + (seed + i * i) % 7 for i in range(length)]
        if (before := str(follows)) in self.ended:  # the next turn of a conversation
            turn = [*self.requests[before].prompt, *self.outputs[before], 5, 6]
            prompt = [token or 1 for token in turn][: max(self.context - 1, 1)]
            seed = self.requests[before].seed
        request = Request(name, prompt, params, seed=seed)
        total = len(prompt) + (max_tokens or 1)
        if total > self.context:
            with pytest.raises(RequestRefused, match=r"context of"):
                self.table.add(request)
            self.seen["refused"] += 1
            return
        self.table.add(request)
        self.requests[name], self.outputs[name] = request, []

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self._abort(data.draw(st.sampled_from(self.live)))

    @rule(count=st.integers(1, 6), data=st.data())
    def steps(self, count: int, data: st.DataObject) -> None:
        for _ in range(count):
            self._step(data.draw(st.sampled_from(self.live)) if self.live and data.draw(_rarely) else None)
            self.pages_have_one_owner()

    @property
    def live(self) -> list[str]:
        return [name for name in self.requests if name not in self.ended and name not in self.aborted]

    def _abort(self, name: str) -> None:
        self.table.abort(name)
        self.table.abort(name)
        self.aborted.add(name)
        self.seen["aborted"] += 1

    def _step(self, abort: str | None = None) -> None:
        """One step of an engine; `abort` arrives while its batch is under way."""
        waiting, running = list(self.table.waiting), list(self.table.running)
        reading = [s for s in running if s.length - s.scheduled > 1]
        batch = self.scheduler.schedule()
        self.seen["preempted"] += sum(s.slot is None for s in running)
        self.seen["preempted in mid-prompt"] += sum(s.slot is None for s in reading)
        self.seen["preempted in flight"] += sum(s.slot is None and s.in_flight for s in running)
        launched = None
        if batch is not None:
            self._check_batch(batch, waiting)
            launched = batch, self.runner.launch(batch)
        if abort is not None:
            self._abort(abort)
        now, self.in_flight = (self.in_flight, launched) if self.late else (launched, None)
        if now is not None:
            for output in self.table.commit(*now):
                assert output.request_id in self.live, "no output follows an end or an abort"
                self.outputs[output.request_id].append(output.token_id)
                if output.finish_reason is not None:
                    self.ended[output.request_id] = output.finish_reason
            self.seen["discarded rows"] += sum(row.sequence.done for row in now[0].rows)

    def _check_batch(self, batch: Batch, waiting: list[object]) -> None:
        rows, tokens = batch.rows, sum(row.length for row in batch.rows)
        assert 1 <= len(rows) <= self.rows
        assert tokens <= self.budget or len(rows) == 1
        assert len({row.slot for row in rows}) == len({id(row.sequence) for row in rows}) == len(rows)
        assert all(row.length == 1 for row in rows[: batch.num_decode])
        prefill = [row.sequence for row in rows[batch.num_decode :]]
        assert prefill == waiting[: len(prefill)], "the queue goes from its head"
        for row in rows:
            sequence = row.sequence
            assert row.slot == sequence.slot
            assert row.end == sequence.scheduled <= len(sequence.pages) * self.page_size
            assert row.samples == (sequence.scheduled == sequence.length - 1)
            assert sequence.length <= sequence.limit

    @invariant()
    def pages_have_one_owner(self) -> None:
        if not hasattr(self, "table"):
            return
        cached = getattr(self.cache, "pages", [])
        owned = [
            page
            for s in self.table.running
            for i, page in enumerate(s.pages)
            if page not in s.prefix.pages[i : i + 1]
        ]
        everyone = [*self.table._allocator._free, *cached, *owned]
        assert sorted(everyone) == list(range(self.pages)), "free + cached + owned = all pages, each once"
        slots = [s.slot for s in self.table.running]
        assert sorted([*self.table._slots, *slots]) == list(range(self.rows))
        if hasattr(self.cache, "locked"):
            held = {page for s in self.table.running for page in s.prefix.pages}
            assert self.cache.locked == held, "locked is what someone runs on"
        counted = self.table.statistics
        self.seen["cache hits"] += counted.cached_tokens
        self.seen["evicted"] += counted.evicted_pages
        assert counted.free_pages + counted.cached_pages + len(owned) == counted.pages == self.pages
        assert (counted.running, counted.waiting) == (len(self.table.running), len(self.table.waiting))
        for queue in (self.table.waiting, self.table.running):
            assert [s.arrival for s in queue] == sorted(s.arrival for s in queue)
        assert all(not s.pages and s.slot is None for s in self.table.waiting)

    @invariant()
    def outputs_are_what_they_must_be(self) -> None:
        for name, output in getattr(self, "outputs", {}).items():
            expected, reason = expected_output(self.requests[name], self.context)
            assert output == expected[: len(output)]
            assert (name in self.ended) == (len(output) == len(expected))
            assert self.ended.get(name, reason) == reason

    def _most_steps(self) -> int:
        """How many steps the live requests can take, of which each brings a token or waits for one."""
        lives = [self.requests[n] for n in self.live]
        left = sum(len(expected_output(r, self.context)[0]) + fails(r) for r in lives)
        return (2 * left + 2 if self.late else left) + 1

    def teardown(self) -> None:
        if not hasattr(self, "table"):
            return
        most = self._most_steps()
        while self.table.has_work or self.in_flight:
            assert (most := most - 1) >= 0, "somebody starves"
            self._step()
            self.pages_have_one_owner()
        self.outputs_are_what_they_must_be()
        assert not self.live, "nobody is lost"
        assert self.table.statistics.free_pages + self.cache.cached == self.pages
        assert self.table.free_slots == self.rows
        assert self.cache.evictable == self.cache.cached


_rarely = st.integers(0, 9).map(lambda n: n == 9)


def machine(base: type[TableMachine], seen: Counter[str], **attributes: Any) -> type:
    """The test case of a machine with these class attributes; its runs count in `seen`."""
    case: Any = type(base.__name__, (base,), {"seen": seen, **attributes}).TestCase
    case.settings = settings(
        max_examples=EXAMPLES, stateful_step_count=40, deadline=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    return case  # type: ignore[no-any-return]
