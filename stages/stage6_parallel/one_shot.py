"""All-reduce, add and RMSNorm in one kernel, which reads the other ranks' memory.

A decode step's all-reduces are small: their time is not that of their bytes, but of kernels that come, meet
and go. Here each rank lays its part of the sum where the others can read it, waits until all have done so,
and adds up all parts by itself: one trip (one-shot), where a ring takes one for each rank. What it has then
are whole rows, in registers, so it adds them to the residual stream and normalises them on the way.

It needs GPUs that read each other's memory, as those of one machine do over NVLink.
"""

import logging
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from stages.stage5_overlap.kernels.elementwise import begin
from stages.stage6_parallel.peer_memory import NotShared, shared

logger = logging.getLogger(__name__)

# That a rank reads of the others. On two H200s 2.6 MB took 14 µs, NCCL and the norm 31; no more was tried.
_MOST_BYTES = 4 << 20


class OneShot:
    """`Ops.add_norm` of a row-parallel product's parts, for up to `most_rows` rows.

    `parts` [2, most_rows, H] and `meetings` [most_rows, ranks] int32, zero in the beginning, are every rank's
    memory in the order of ranks, as this rank sees it. Of each row there are two copies: a rank may be one
    meeting ahead, and writes its next part while another still reads its last one.
    """

    def __init__(self, rank: int, parts: Sequence[Tensor], meetings: Sequence[Tensor], pdl: bool) -> None:
        own = parts[rank]
        self.most_rows = own.shape[1]
        self._rank, self._pdl = rank, pdl
        self._parts, self._meetings = tuple(parts), tuple(meetings)
        self._counts = torch.zeros(self.most_rows, dtype=torch.int32, device=own.device)

    def release(self) -> None:
        """Free a kernel that waits for a rank that will not come: it finds that all were there long ago.
        Copies alone do it, for which no multiprocessor is needed. What it computed is of no use."""
        if not self._meetings:  # closed
            return
        own = self._meetings[self._rank]
        with torch.cuda.device(own.device), torch.cuda.stream(torch.cuda.Stream()):
            ahead = self._counts.cpu() + (1 << 30)
            own.copy_(ahead.unsqueeze(1).expand(own.shape))

    def close(self) -> None:
        """Give the memory back; no kernel may use it any more."""
        self._parts = self._meetings = ()

    def add_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """`x` [T, H] is this rank's part of what is added to `residual`. Returns `(normed, new residual)`,
        the same on all ranks to the last bit; both arguments are overwritten."""
        rows, size = x.shape
        normed = x if residual is not None else torch.empty_like(x)
        stream = x if residual is None else residual
        block = triton.next_power_of_2(size)
        _reduce_add_norm[(rows,)](
            x, stream, normed, weight, self._parts, self._meetings, self._counts, self.most_rows, size, eps,
            RANK=self._rank, RANKS=len(self._parts), ADD=residual is not None, BLOCK=block, PDL=self._pdl,
            num_warps=min(16, max(1, block // 512)), launch_pdl=self._pdl,
        )  # fmt: skip
        return normed, stream


def connect(
    rank: int, size: int, max_rows: int, width: int, dtype: torch.dtype, device: torch.device, pdl: bool
) -> OneShot | None:
    """A `OneShot` for rows of `width` numbers, or None on all ranks where one cannot read another's memory.
    All ranks call it, the device of each being numbered as the rank."""
    rows = min(max_rows, _MOST_BYTES // (max(1, size - 1) * width * dtype.itemsize))
    if not rows:
        return None
    part, meetings = 2 * rows * width * dtype.itemsize, rows * size * torch.int32.itemsize
    try:
        seen = shared(part + meetings, device, rank, size)
    except NotShared as error:
        if rank == 0:
            logger.warning("NCCL does all collectives, since the GPUs cannot share memory: %s", error)
        return None
    return OneShot(
        rank,
        [memory[:part].view(dtype).view(2, rows, width) for memory in seen],
        [memory[part : part + meetings].view(torch.int32).view(rows, size) for memory in seen],
        pdl,
    )


@triton.jit
def _reduce_add_norm(
    x, stream, normed, weight, parts, meetings, counts, most_rows, size, eps,
    RANK: tl.constexpr, RANKS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)  # does not wait for anyone
    begin(PDL)
    count = tl.load(counts + row) + 1  # all ranks have met as often over this row
    at = row * size + columns
    shared = ((count & 1) * most_rows + row) * size + columns
    mine = tl.load(x + at, mask=inside, other=0.0)
    tl.store(parts[RANK] + shared, mine, mask=inside)
    if ADD:
        before = tl.load(stream + at, mask=inside, other=0.0).to(tl.float32)
    _meet(meetings, row, count, RANK, RANKS)
    total = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(RANKS):  # in this order on every rank: they must round alike
        if rank == RANK:
            total += mine.to(tl.float32)
        else:
            # not from L1, which may hold what was there two meetings ago
            part = tl.load(parts[rank] + shared, mask=inside, other=0.0, cache_modifier=".cg")
            total += part.to(tl.float32)
    if ADD:
        total += before
    value = total.to(x.dtype.element_ty)
    tl.store(stream + at, value, mask=inside)
    value = value.to(tl.float32)
    rms = tl.rsqrt(tl.sum(value * value) / size + eps)
    tl.store(normed + at, value * rms * scale, mask=inside)
    tl.store(counts + row, count)


@triton.jit
def _meet(meetings, row, count, RANK: tl.constexpr, RANKS: tl.constexpr):
    """Tell the others that this block's row is there, and wait until theirs are."""
    tl.debug_barrier()  # all of this block has stored before one of its threads says so
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            tl.atomic_xchg(meetings[rank] + row * RANKS + RANK, count, sem="release", scope="sys")
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            theirs = meetings[RANK] + row * RANKS + rank
            while tl.atomic_add(theirs, 0, sem="acquire", scope="sys") - count < 0:  # right when it wraps
                pass
    tl.debug_barrier()
