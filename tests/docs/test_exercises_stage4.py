"""The checks of lesson 4's exercises accept these solutions, and refuse what is almost right."""

from collections.abc import Sequence as Seq

import pytest
import torch
from torch import Tensor

from docs.exercises import stage4
from docs.exercises.stage4 import Cost
from stages.stage2_paged.batch import Batch, Row, Sequence
from stages.stage2_paged.scheduler import decode_rows, place
from stages.stage4_chunked.scheduler import ChunkedScheduler


def next_rows(running: Seq[int], waiting: Seq[int], budget: int, free_slots: int) -> list[tuple[int, int]]:
    rows = [(i, 1) for i, left in enumerate(running) if left == 1]
    budget -= len(rows)
    prompts = [(i, left) for i, left in enumerate(running) if left > 1]
    prompts += [(len(running) + i, left) for i, left in enumerate(waiting[:free_slots])]
    for i, left in prompts:
        if budget:
            rows.append((i, min(left, budget)))
            budget -= rows[-1][1]
    return rows


def attend_chunk(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    chunk, length = len(q), len(keys)
    scores = torch.einsum("cnd,lnd->ncl", q, keys) / q.shape[-1] ** 0.5
    visible = torch.ones(chunk, length, dtype=torch.bool).tril(length - chunk)
    return torch.einsum("ncl,lnd->cnd", scores.masked_fill(~visible, -torch.inf).softmax(-1), values)


def largest_budget(cost: Cost, decoding: int, prompt: int, limit: int) -> int | None:
    for chunk in range(prompt, 0, -1):
        starts = range(0, prompt, chunk)
        if all(cost.of(decoding, start, min(chunk, prompt - start)) <= limit for start in starts):
            return decoding + chunk
    return None


class ShortestFirst(ChunkedScheduler):
    def _key(self, sequence: Sequence) -> tuple[int, ...]:
        return sequence.length - sequence.scheduled, sequence.arrival

    def schedule(self) -> Batch | None:
        table = self._table
        rows = decode_rows(table, [s for s in table.running if s.length - s.scheduled == 1])
        num_decode = len(rows)
        budget = self._budget - num_decode
        prompts = [s for s in table.running if s.length - s.scheduled > 1]
        prompts += [s for s in table.waiting if not s.in_flight]
        for sequence in sorted(prompts, key=self._key):
            if not budget:
                break
            enters = sequence.slot is None
            if enters and not (
                table.free_slots and not table.blocked and table.admit(sequence, table.match(sequence))
            ):
                continue
            budget -= self._add_chunk(rows, sequence, budget, 0 if enters else len(sequence.pages))
        return Batch(rows, num_decode) if rows else None


def test_the_stubs_are_to_do() -> None:
    for check in stage4.CHECKS.values():
        with pytest.raises(NotImplementedError):
            check()


def test_the_solutions_pass() -> None:
    stage4.check_next_rows(next_rows)
    stage4.check_attend_chunk(attend_chunk)
    stage4.check_largest_budget(largest_budget)
    stage4.check_shortest_first(ShortestFirst)


def test_rows_keep_their_order_the_budget_and_the_slots() -> None:
    def prompts_first(running: Seq[int], waiting: Seq[int], budget: int, slots: int) -> list:
        rows = next_rows(running, waiting, budget, slots)
        return [*reversed(rows)]

    def without_slots(running: Seq[int], waiting: Seq[int], budget: int, slots: int) -> list:
        return next_rows(running, waiting, budget, len(waiting))

    def whole(running: Seq[int], waiting: Seq[int], budget: int, slots: int) -> list:
        left = [*running, *waiting]
        return [(i, left[i]) for i, _ in next_rows(running, waiting, budget, slots)]

    for wrong in (prompts_first, without_slots, whole):
        with pytest.raises(AssertionError, match="the rows are"):
            stage4.check_next_rows(wrong)


def test_a_chunk_sees_its_past_and_no_future() -> None:
    def everything(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (torch.einsum("cnd,lnd->ncl", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        return torch.einsum("ncl,lnd->cnd", weights, v)

    def itself(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_chunk(q, k[-len(q) :], v[-len(q) :])

    def from_the_left(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # what is_causal of PyTorch means
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)

    for wrong in (everything, itself, from_the_left):
        with pytest.raises(AssertionError, match="off by"):
            stage4.check_attend_chunk(wrong)


def test_the_longest_step_is_not_always_the_first_nor_the_last() -> None:
    def first(cost: Cost, decoding: int, prompt: int, limit: int) -> int | None:
        fitting = [chunk for chunk in range(1, prompt + 1) if cost.of(decoding, 0, chunk) <= limit]
        return decoding + fitting[-1] if fitting else None

    def last(cost: Cost, decoding: int, prompt: int, limit: int) -> int | None:
        starts = {chunk: (prompt - 1) // chunk * chunk for chunk in range(1, prompt + 1)}
        fitting = [c for c, start in starts.items() if cost.of(decoding, start, prompt - start) <= limit]
        return decoding + fitting[-1] if fitting else None

    def for_the_prompt_alone(cost: Cost, decoding: int, prompt: int, limit: int) -> int | None:
        return largest_budget(cost, 0, prompt, limit)

    for wrong in (first, last, for_the_prompt_alone):
        with pytest.raises(AssertionError, match="largest budget is"):
            stage4.check_largest_budget(wrong)


def test_the_cost_model_is_asked_about_the_steps_that_stage_4_makes() -> None:
    cost = Cost(step=100, token=10, pair=1)
    assert stage4._longest_step(cost, 3, 2, 3) == 100 + 30 + 3
    assert stage4._longest_step(cost, 5, 2, 3) == 100 + 50 + 6
    assert stage4._longest_step(cost, 5, 0, 3) == 100 + 30 + 6


def test_the_short_pass_and_everything_else_stays() -> None:
    class Greedy(ShortestFirst):
        def schedule(self) -> Batch | None:
            self._budget = 1000
            return super().schedule()

    class Stalls(ShortestFirst):
        def schedule(self) -> Batch | None:
            batch = super().schedule()
            return batch and Batch(batch.rows[batch.num_decode :] or batch.rows, 0)

    class HalfReadFirst(ShortestFirst):
        def _key(self, sequence: Sequence) -> tuple[int, ...]:
            return sequence.slot is None, *super()._key(sequence)

    class WastesBudget(ShortestFirst):
        def _add_chunk(self, rows: list[Row], sequence: Sequence, budget: int, first_new_page: int) -> int:
            return super()._add_chunk(rows, sequence, min(budget, 4), first_new_page) and budget

    class ForgetsThePages(ShortestFirst):
        def _add_chunk(self, rows: list[Row], sequence: Sequence, budget: int, first_new_page: int) -> int:
            length = min(sequence.length - sequence.scheduled, budget)
            rows.append(place(sequence, length, 1))
            return length

    for wrong, message in (
        (ChunkedScheduler, "short prompts wait"),
        (Greedy, "more than the budget"),
        (Stalls, "never waits"),
        (HalfReadFirst, "short prompts wait|first tokens came"),
        (WastesBudget, "some budget was not used|short prompts wait|first tokens came"),
        (ForgetsThePages, "first_new_page"),
    ):
        with pytest.raises(AssertionError, match=message):
            stage4.check_shortest_first(wrong)
