"""Exercises of lesson 2. Fill in the functions, then run, in the repository's root:

    python -m docs.exercises.stage2

Each one says whether it passed. Solutions are in tests/docs/test_exercises_stage2.py.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from docs.exercises.checker import run_checks
from stages.interface import Request, SamplingParams
from stages.stage1_naive.limits import Limits
from stages.stage2_paged.batch import Row
from stages.stage2_paged.kv_cache import PageAllocator
from stages.stage2_paged.prefix_cache import NoPrefixCache
from stages.stage2_paged.request_table import RequestTable, SampledToken
from stages.stage2_paged.scheduler import Scheduler


def locate(page_tables: Tensor, page_size: int, rows: Tensor, positions: Tensor) -> Tensor:
    """Exercise 1: where in the cache do these positions lie? Without a Python loop.

    `page_tables` [R, W] has the pages of R sequences; position `positions[t]` is one of sequence
    `rows[t]`. -> [T], page * page_size + offset.
    """
    raise NotImplementedError


def wasted(lengths: Sequence[int], page_size: int) -> int:
    """Exercise 2: for how many tokens there is room in the pages of sequences of these lengths, besides
    those that they have."""
    raise NotImplementedError


def attend_by_page(q: Tensor, pages: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """Exercise 3: attention of one query `q` [N, D] to all keys of `pages`, one page at a time.

    Each page is `(k, v)`, [n, N, D] each: as many KV heads as query heads. A page is overwritten when the
    next one comes, so what is needed of it must be computed at once. Scores are q·k / sqrt(D). -> [N, D]
    """
    raise NotImplementedError


class StaticScheduler(Scheduler):
    """Exercise 4: a batch is filled once. New requests are admitted only when nobody runs."""

    def _prefill(self) -> list[Row]:
        raise NotImplementedError


# --- The checks ----------------------------------------------------------------------------------


def check_locate(solution: Callable[[Tensor, int, Tensor, Tensor], Tensor]) -> None:
    tables = torch.tensor([[5, 2, 7], [0, 9, 4]])
    for page_size in (1, 4, 16):
        length = tables.shape[1] * page_size
        rows = torch.tensor([0, 1]).repeat_interleave(length)
        positions = torch.arange(length).repeat(2)
        result = solution(tables, page_size, rows, positions)
        expected = [p * page_size + i for table in tables.tolist() for p in table for i in range(page_size)]
        assert result.tolist() == expected, (
            f"with pages of {page_size}, the locations are {expected}, not {result.tolist()}"
        )


def check_wasted(solution: Callable[[Sequence[int], int], int]) -> None:
    for lengths, page_size in (([], 16), ([16], 16), ([1, 15, 17, 40], 16), ([3, 5], 1), ([63, 64, 65], 64)):
        allocator = PageAllocator(100)
        for length in lengths:
            for position in range(length):
                if position % page_size == 0:
                    allocator.take(1)
        expected = (100 - allocator.free) * page_size - sum(lengths)
        result = solution(lengths, page_size)
        assert result == expected, f"{lengths} in pages of {page_size} waste {expected}, not {result}"


def check_attend_by_page(solution: Callable[[Tensor, Iterator[tuple[Tensor, Tensor]]], Tensor]) -> None:
    torch.manual_seed(0)
    for lengths, size in (((1,), 1.0), ((4, 4, 3), 1.0), ((4, 4, 4, 1), 1000.0)):  # large scores overflow exp
        q = torch.randn(2, 8, dtype=torch.float64) * size
        k, v = torch.randn(2, sum(lengths), 2, 8, dtype=torch.float64)
        expected = F.scaled_dot_product_attention(
            q.unsqueeze(1), k.transpose(0, 1), v.transpose(0, 1)
        ).squeeze(1)
        result = solution(q, _one_by_one(k, v, lengths))
        assert result.shape == q.shape, f"the shape is {list(result.shape)}, not {list(q.shape)}"
        error = float((result - expected).abs().nan_to_num(nan=torch.inf).max())
        assert error < 1e-9, f"pages of {lengths} tokens, queries of size {size:.0f}: off by {error:.2g}"


def _one_by_one(k: Tensor, v: Tensor, lengths: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """The pages of `k` and `v`; each is spoilt when the next one is asked for."""
    for page in zip(k.clone().split(tuple(lengths)), v.clone().split(tuple(lengths)), strict=True):
        yield page
        for part in page:
            part.fill_(torch.nan)


def check_static_scheduler(solution: type[Scheduler]) -> None:
    answers = [3, 12, 5, 2, 9, 1, 7, 4]
    static, steps = serve(solution, answers)
    _, continuous_steps = serve(Scheduler, answers)
    for before, now in pairwise(static):
        joined = now.keys() - before.keys()
        left = {name for name, count in before.items() if count == answers[name]}
        stayed = before.keys() - left
        assert not (joined and stayed), f"{sorted(joined)} joined while {sorted(stayed)} were running"
    assert max(map(len, static)) == 4, f"at most {max(map(len, static))} ran at once, of 4 that could"
    assert steps > continuous_steps, f"{steps} steps are not more than {continuous_steps}"
    print(f"  {steps} steps instead of {continuous_steps}")


def serve(scheduler_type: type[Scheduler], answers: Sequence[int]) -> tuple[list[dict[int, int]], int]:
    """Serve answers of these lengths, four at once, without a model; for each step, who ran and how many
    tokens each had then, and the number of steps."""
    limits = Limits(vocab_size=2, context_length=64, eos_token_ids=frozenset())
    table = RequestTable(limits, num_pages=64, page_size=4, max_rows=4, prefix_cache=NoPrefixCache())
    scheduler = scheduler_type(table, prefill_budget=64)
    for i, length in enumerate(answers):
        table.add(Request(str(i), [1], SamplingParams(max_tokens=length)))
    history: list[dict[int, int]] = []
    while table.has_work:
        batch = scheduler.schedule()
        assert batch is not None, "there is work, but nothing was scheduled"
        running = list(table.running)
        table.commit(batch, [SampledToken(1)] * len(batch.sampling))
        history.append({sequence.arrival: len(sequence.output) for sequence in running})
        assert len(history) <= 10 * sum(answers), "the requests never end"
    return history, len(history)


CHECKS: dict[str, Callable[[], None]] = {
    "1 locate": lambda: check_locate(locate),
    "2 wasted": lambda: check_wasted(wasted),
    "3 attend_by_page": lambda: check_attend_by_page(attend_by_page),
    "4 StaticScheduler": lambda: check_static_scheduler(StaticScheduler),
}


if __name__ == "__main__":
    run_checks(CHECKS)
