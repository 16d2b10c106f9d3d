"""Exercises of lesson 4. Fill in the functions, then run, in the repository's root:

    python -m docs.exercises.stage4

Each one says whether it passed. Solutions are in tests/docs/test_exercises_stage4.py.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor

from docs.exercises.checker import run_checks
from stages.interface import Request, SamplingParams
from stages.stage1_naive.limits import Limits
from stages.stage2_paged.batch import Batch
from stages.stage2_paged.prefix_cache import NoPrefixCache
from stages.stage2_paged.request_table import RequestTable, SampledToken
from stages.stage4_chunked.scheduler import ChunkedScheduler


def next_rows(
    running: Sequence[int], waiting: Sequence[int], budget: int, free_slots: int
) -> list[tuple[int, int]]:
    """Exercise 1: the rows of the next step, in the order in which `ChunkedScheduler` places them.

    `running` has, in order of arrival, how many positions each request has left to compute (1 for who
    decodes), `waiting` the same of the queue. There are pages enough, and nothing is cached. -> for each row
    (index, positions), where the first request of the queue has the index `len(running)`.
    """
    raise NotImplementedError


def attend_chunk(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Exercise 2: causal attention of one chunk, without a Python loop.

    `q` [C, N, D] are the queries of the chunk; `keys` and `values` [L, N, D] are all that is in the cache
    after the chunk was stored: its past, then its own C positions. Scores are q·k / sqrt(D). -> [C, N, D]
    """
    raise NotImplementedError


@dataclass(frozen=True)
class Cost:
    """What a step takes, in microseconds: a model of a device, and not a good one."""

    step: int  # whatever it holds
    token: int  # for each of its tokens, decode rows included
    pair: int  # for each pair of a prompt's position and one that it attends to, itself included

    def of(self, decoding: int, start: int, length: int) -> int:
        """A step of so many decode rows and a chunk of a prompt that begins at `start`."""
        pairs = sum(range(start + 1, start + length + 1))
        return self.step + self.token * (decoding + length) + self.pair * pairs


def largest_budget(cost: Cost, decoding: int, prompt: int, limit: int) -> int | None:
    """Exercise 3: the largest budget with which no step takes longer than `limit`, while a prompt of so many
    tokens is read beside so many decode rows. At least `decoding + 1`, at most `decoding + prompt`; None if
    no such budget will do."""
    raise NotImplementedError


class ShortestFirst(ChunkedScheduler):
    """Exercise 4: what decode rows leave of the budget goes first to whoever has least left of a prompt,
    half read or still waiting. At equal lengths the order of arrival decides."""

    def schedule(self) -> Batch | None:
        raise NotImplementedError


# --- The checks ----------------------------------------------------------------------------------


def check_next_rows(
    solution: Callable[[Sequence[int], Sequence[int], int, int], list[tuple[int, int]]],
) -> None:
    draw, slots = random.Random(4), 6
    for _ in range(60):
        budget = draw.randint(slots, 24)
        load = [(draw.randint(1, 40), draw.randint(1, 12)) for _ in range(12)]
        table = _table(load, slots)
        scheduler = ChunkedScheduler(table, budget)
        while table.has_work:
            requests = [*table.running, *table.waiting]
            left = [s.length - s.scheduled for s in requests]
            given = left[: len(table.running)], left[len(table.running) :], budget, table.free_slots
            batch = scheduler.schedule()
            assert batch is not None
            expected = [(requests.index(row.sequence), row.length) for row in batch.rows]
            result = [tuple(row) for row in solution(*given)]
            assert result == expected, (
                f"running {given[0]}, waiting {given[1]}, budget {budget}, {given[3]} free slots: "
                f"the rows are {expected}, not {result}"
            )
            table.commit(batch, [SampledToken(1)] * len(batch.sampling))


def check_attend_chunk(solution: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    length = 23
    q, k, v = torch.randn(3, length, 2, 8, dtype=torch.float64)
    whole = F.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True
    ).transpose(0, 1)
    for budget in (length, 7, 16, 1):
        for start in range(0, length, budget):
            end = min(start + budget, length)
            result = solution(q[start:end].clone(), k[:end].clone(), v[:end].clone())
            shape = [end - start, 2, 8]
            assert list(result.shape) == shape, f"the shape is {list(result.shape)}, not {shape}"
            error = float((result - whole[start:end]).abs().nan_to_num(nan=torch.inf).max())
            assert error < 1e-9, f"a chunk from {start} to {end - 1}: off by {error:.2g}"


def check_largest_budget(solution: Callable[[Cost, int, int, int], int | None]) -> None:
    draw = random.Random(4)
    for _ in range(300):
        cost = Cost(draw.randint(0, 200), draw.randint(1, 20), draw.choice([0, 0, 1, 3]))
        decoding, prompt = draw.randint(0, 8), draw.randint(1, 40)
        longest = {
            budget: _longest_step(cost, budget, decoding, prompt)
            for budget in range(decoding + 1, decoding + prompt + 1)
        }
        limit = draw.choice([*longest.values()]) + draw.choice([-1, 0, 1])
        expected = max((budget for budget, time in longest.items() if time <= limit), default=None)
        result = solution(cost, decoding, prompt, limit)
        assert result == expected, (
            f"{cost}, {decoding} decode rows, a prompt of {prompt}, at most {limit}: "
            f"the largest budget is {expected}, not {result}"
        )


def _longest_step(cost: Cost, budget: int, decoding: int, prompt: int) -> int:
    """Of all steps in which stage 4's scheduler reads this prompt beside these decode rows."""
    table = _table([(1, 60)] * decoding, slots=decoding + 1)
    scheduler, longest = ChunkedScheduler(table, budget), 0
    if decoding:
        _step(table, scheduler)
    long = Request("long", [1] * prompt, SamplingParams(max_tokens=1))
    table.add(long)
    while long in (s.request for s in (*table.waiting, *table.running)):
        (row,) = (row for row in _step(table, scheduler).rows if row.sequence.request is long)
        longest = max(longest, cost.of(decoding, row.start, row.length))
    return longest


def _step(table: RequestTable, scheduler: ChunkedScheduler) -> Batch:
    batch = scheduler.schedule()
    assert batch is not None, "there is work, but nothing was scheduled"
    table.commit(batch, [SampledToken(1)] * len(batch.sampling))
    return batch


def check_shortest_first(solution: type[ChunkedScheduler]) -> None:
    load = [(2, 20), (90, 4), (5, 4), (40, 4), (3, 4), (9, 4)]
    theirs, steps = serve(ChunkedScheduler, load)
    mine, my_steps = serve(solution, load)
    short = [i for i, (prompt, _) in enumerate(load) if prompt < 10]
    before, now = (mean(first[i] for i in short) for first in (theirs, mine))
    assert now < before, f"short prompts wait {now:.1f} steps for their first token, and {before:.1f} before"
    order = sorted(range(1, len(load)), key=lambda i: load[i][0])
    assert [mine[i] for i in order] == sorted(mine[i] for i in order), (
        f"first tokens came in steps {mine}, of prompts of {[prompt for prompt, _ in load]} tokens"
    )
    assert my_steps <= steps, f"{my_steps} steps are more than {steps}: some budget was not used"
    print(
        f"  short prompts wait {now:.1f} steps instead of {before:.1f}, the longest {mine[1]} and {theirs[1]}"
    )


def serve(scheduler_type: type[ChunkedScheduler], load: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """Serve requests of these (prompt, answer) lengths, that come one a step. -> after how many steps each
    got its first token, and the number of all steps. Sees to it that every batch is right."""
    slots, budget, steps = 6, 10, 0
    table = _table([], slots)
    scheduler = scheduler_type(table, budget)
    computed, tokens, first = [0] * len(load), [0] * len(load), [0] * len(load)
    while steps < len(load) or table.has_work:
        if steps < len(load):
            prompt, answer = load[steps]
            table.add(Request(str(steps), [1] * prompt, SamplingParams(max_tokens=answer)))
        decoding = [s for s in table.running if s.length - s.scheduled == 1]
        batch = scheduler.schedule()
        assert batch is not None, "there is work, but nothing was scheduled"
        total = sum(row.length for row in batch.rows)
        assert total <= budget, f"{total} tokens are more than the budget of {budget}"
        who = [row.sequence for row in batch.rows]
        assert who[: batch.num_decode] == decoding, "who decodes comes first and never waits"
        assert len(set(map(id, who))) == len(who), "a request has one row in a batch"
        for row in batch.rows:
            name = row.sequence.arrival
            assert row.start == computed[name], f"request {name} goes on at {row.start}, not {computed[name]}"
            assert row.enters == (row.start == 0), (
                f"request {name} begins at {row.start} with first_new_page={row.first_new_page}"
            )
            computed[name] = row.end
        outputs = table.commit(batch, [SampledToken(1)] * len(batch.sampling))
        steps += 1
        for name in (int(output.request_id) for output in outputs):
            tokens[name] += 1
            first[name] = first[name] or steps - name
        assert steps <= 500, "the requests never end"
    assert tokens == [answer for _, answer in load], f"the answers have {tokens} tokens"
    return first, steps


def _table(load: Sequence[tuple[int, int]], slots: int) -> RequestTable:
    """Requests of these (prompt, answer) lengths wait; there is no model, and there are pages enough."""
    limits = Limits(vocab_size=2, context_length=256, eos_token_ids=frozenset())
    table = RequestTable(limits, 1000, page_size=4, max_rows=slots, prefix_cache=NoPrefixCache())
    for i, (prompt, answer) in enumerate(load):
        table.add(Request(str(i), [1] * prompt, SamplingParams(max_tokens=answer)))
    return table


CHECKS: dict[str, Callable[[], None]] = {
    "1 next_rows": lambda: check_next_rows(next_rows),
    "2 attend_chunk": lambda: check_attend_chunk(attend_chunk),
    "3 largest_budget": lambda: check_largest_budget(largest_budget),
    "4 ShortestFirst": lambda: check_shortest_first(ShortestFirst),
}


if __name__ == "__main__":
    run_checks(CHECKS)
