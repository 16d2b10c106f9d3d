"""The checks of lesson 2's exercises accept these solutions, and refuse what is almost right."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from docs.exercises import stage2
from stages.stage2_paged.batch import Row
from stages.stage2_paged.scheduler import Scheduler


def locate(page_tables: Tensor, page_size: int, rows: Tensor, positions: Tensor) -> Tensor:
    return page_tables[rows, positions // page_size] * page_size + positions % page_size


def wasted(lengths: Sequence[int], page_size: int) -> int:
    return sum(-length % page_size for length in lengths)


def attend_by_page(q: Tensor, pages: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    highest = torch.full(q.shape[:1], -torch.inf, dtype=q.dtype)  # [N], the largest score so far
    total = torch.zeros_like(highest)  # of exp(score - highest)
    weighted = torch.zeros_like(q)  # the same, times v
    for k, v in pages:
        scores = torch.einsum("nd,tnd->nt", q, k) / q.shape[-1] ** 0.5
        new = torch.maximum(highest, scores.amax(-1))
        shrink, weights = (highest - new).exp(), (scores - new.unsqueeze(-1)).exp()
        total = total * shrink + weights.sum(-1)
        weighted = weighted * shrink.unsqueeze(-1) + torch.einsum("nt,tnd->nd", weights, v)
        highest = new
    return weighted / total.unsqueeze(-1)


class StaticScheduler(Scheduler):
    def _prefill(self) -> list[Row]:
        return [] if self._table.running else super()._prefill()


def test_the_stubs_are_to_do() -> None:
    for check in stage2.CHECKS.values():
        with pytest.raises(NotImplementedError):
            check()


def test_the_solutions_pass() -> None:
    stage2.check_locate(locate)
    stage2.check_wasted(wasted)
    stage2.check_attend_by_page(attend_by_page)
    stage2.check_static_scheduler(StaticScheduler)


def test_mistakes_are_refused() -> None:
    with pytest.raises(AssertionError, match="locations"):
        stage2.check_locate(lambda tables, size, rows, positions: rows * size + positions)
    with pytest.raises(AssertionError, match="waste"):  # a page more where the last one is just full
        stage2.check_wasted(lambda lengths, size: sum(size - length % size for length in lengths))


def test_attention_by_page_must_not_keep_pages_nor_overflow() -> None:
    def keeps(q: Tensor, pages: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        k, v = (torch.cat(parts) for parts in zip(*list(pages), strict=True))
        return torch.einsum("nt,tnd->nd", (torch.einsum("nd,tnd->nt", q, k) / 8**0.5).softmax(-1), v)

    def overflows(q: Tensor, pages: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        total, weighted = torch.zeros(len(q), 1, dtype=q.dtype), torch.zeros_like(q)
        for k, v in pages:
            weights = (300 + torch.einsum("nd,tnd->nt", q, k) / 8**0.5).exp()
            total += weights.sum(-1, keepdim=True)
            weighted += torch.einsum("nt,tnd->nd", weights, v)
        return weighted / total

    for wrong in (keeps, overflows):
        with pytest.raises(AssertionError, match="off by"):
            stage2.check_attend_by_page(wrong)


def test_a_static_batch_is_full_and_nobody_joins_it() -> None:
    class OneByOne(Scheduler):
        def _prefill(self) -> list[Row]:
            if self._table.running:
                return []
            waiting = self._table.waiting
            self._table.waiting = waiting[:1]
            rows = super()._prefill()
            self._table.waiting += waiting[1:]
            return rows

    with pytest.raises(AssertionError, match="joined while"):
        stage2.check_static_scheduler(Scheduler)
    with pytest.raises(AssertionError, match="at once"):
        stage2.check_static_scheduler(OneByOne)
