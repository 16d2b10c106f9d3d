"""The joined all-reduce, with two ranks that are two streams of one GPU."""

import pytest
import torch
from torch import Tensor

from stages.stage1_naive import model as plain

pytestmark = pytest.mark.gpu
EPS = 1e-6


class Pair:
    """Two ranks' kernels in one process, for rows of `width` numbers."""

    def __init__(self, most_rows: int, width: int, dtype: torch.dtype) -> None:
        from stages.stage6_parallel.one_shot import OneShot

        pdl = torch.cuda.get_device_capability() >= (9, 0)
        parts = [torch.zeros(2, most_rows, width, dtype=dtype, device="cuda") for _ in range(2)]
        self.meetings = [torch.zeros(most_rows, 2, dtype=torch.int32, device="cuda") for _ in range(2)]
        self.ranks = [OneShot(rank, parts, self.meetings, pdl) for rank in range(2)]
        self.streams = [torch.cuda.Stream() for _ in range(2)]
        self._load(width, dtype)

    def _load(self, width: int, dtype: torch.dtype) -> None:
        """To load a kernel, or to take memory, may wait for kernels that run. So each rank does both here,
        where it need not wait for the other."""
        for meetings in self.meetings:
            meetings.fill_(1 << 30)
        for few, stream in zip(self.ranks, self.streams, strict=True):
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                rows = [torch.zeros(40, width, dtype=dtype, device="cuda") for _ in range(12)]
                for residual in (None, rows[0][:1]):
                    few.add_norm(rows[1][:1], residual, rows[2][0], EPS)
                del rows
        torch.cuda.synchronize()
        for meetings, few in zip(self.meetings, self.ranks, strict=True):
            meetings.zero_()
            few._counts.zero_()
        torch.cuda.synchronize()

    def add_norm(
        self, xs: list[Tensor], residual: Tensor | None, weight: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        results = []
        torch.cuda.synchronize()
        for few, stream, x in zip(self.ranks, self.streams, xs, strict=True):
            with torch.cuda.stream(stream):
                own = None if residual is None else residual.clone()
                results.append(few.add_norm(x.clone(), own, weight, EPS))
        torch.cuda.synchronize()
        return results


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 1000, 5120])
def test_it_is_all_reduce_then_add_norm(width: int, dtype: torch.dtype) -> None:
    """Meeting after meeting, with other numbers of rows, the first without a residual."""
    torch.manual_seed(0)
    pair = Pair(40, width, dtype)
    weight = torch.randn(width, device="cuda").to(dtype)
    for meeting, rows in enumerate([3, 1, 40, 2, 40, 40, 7, 1, 1, 33]):
        xs = [torch.randn(rows, width, device="cuda").to(dtype) for _ in range(2)]
        residual = None if meeting % 4 == 0 else torch.randn(rows, width, device="cuda").to(dtype)
        (normed, stream), other = pair.add_norm(xs, residual, weight)
        assert torch.equal(normed, other[0]), "ranks must agree to the last bit"
        assert torch.equal(stream, other[1])
        summed = xs[0].float() + xs[1].float()
        wide = None if residual is None else residual.float()
        expected = plain.add_norm(summed, wide, weight.float(), EPS)
        torch.testing.assert_close(normed.float(), expected[0], rtol=0.02, atol=0.02)
        torch.testing.assert_close(stream.float(), expected[1], rtol=0.01, atol=0.01)


def test_a_rank_may_be_ahead() -> None:
    """Ten meetings of one rank are queued before the other's first: nothing is overwritten unread."""
    torch.manual_seed(0)
    pair, rows, width = Pair(8, 512, torch.bfloat16), 8, 512
    xs = torch.randn(10, 2, rows, width, device="cuda").bfloat16()
    weight = torch.ones(width, device="cuda", dtype=torch.bfloat16)
    results: list[list[Tensor]] = [[], []]
    torch.cuda.synchronize()
    for rank in (1, 0):
        with torch.cuda.stream(pair.streams[rank]):
            own = [x[rank].clone() for x in xs]
            results[rank] = [pair.ranks[rank].add_norm(x, None, weight, EPS)[1] for x in own]
    torch.cuda.synchronize()
    for x, first, second in zip(xs, *results, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first.float(), x.float().sum(0), rtol=0.01, atol=0.01)
