"""The page invariant after every step, whatever arrives, ends, is aborted or preempted, and however late."""

from collections import Counter

import pytest

from stages.interface import Request, SamplingParams
from stages.stage1_naive.limits import Limits
from stages.stage2_paged.prefix_cache import NoPrefixCache
from stages.stage2_paged.request_table import RequestTable, SampledToken
from stages.stage2_paged.scheduler import Scheduler
from tests.stage2.fakes import VOCAB, DictPrefixCache, token_at
from tests.stage2.table_machine import CONTEXT, TableMachine, machine

seen: Counter[str] = Counter()  # what the random runs of this file met


def no_cache(page_size: int) -> NoPrefixCache:
    return NoPrefixCache()


TestAtOnce = machine(TableMachine, seen, late=False, make_cache=no_cache)
TestLate = machine(TableMachine, seen, late=True, make_cache=no_cache)
TestCaching = machine(TableMachine, seen, late=False, make_cache=DictPrefixCache)
TestLateCaching = machine(TableMachine, seen, late=True, make_cache=DictPrefixCache)


def test_the_machines_met_what_they_are_for() -> None:
    """Runs after them: a random test that meets nothing proves nothing."""
    if not seen:
        pytest.skip("the machines were not run")
    for what in ("refused", "aborted", "preempted", "preempted in flight", "discarded rows", "cache hits"):
        assert seen[what] > 0, what
    assert token_at(Request("a", [3], SamplingParams()), 0) == 3


def test_a_token_in_flight_is_waited_for() -> None:
    """Out of turn, as stage 4 may preempt: who has a token under way is not readmitted before it is known."""
    table = RequestTable(Limits(VOCAB, CONTEXT, frozenset()), 4, 4, 2, NoPrefixCache())
    scheduler = Scheduler(table, 8)
    table.add(Request("a", [1, 2, 3], SamplingParams(max_tokens=9)))
    batch = scheduler.schedule()
    assert batch is not None
    table.preempt(table.running[0])
    assert scheduler.schedule() is None
    table.commit(batch, [SampledToken(7)])
    again = scheduler.schedule()
    assert again is not None
    assert [(row.start, row.length, row.sequence.tokens) for row in again.rows] == [(0, 4, [1, 2, 3, 7])]
