"""The first kernel of a captured decode step: from what the host packed to what the model reads."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents


def unpack(packed: Tensor, table: Tensor, newest: Tensor, token_ids: Tensor, positions: Tensor) -> None:
    """`packed` [4 or more, R] int32: token (-1: the slot's newest), the new page's index in the slot's row
    (-1: none), that page, and the slot. Writes `token_ids` [R] int64 and, into `table` [slots, pages], the
    new pages; `positions` [R] int64 are one less than the sampler's, its second row."""
    _unpack[(packed.shape[1],)](packed, table, newest, token_ids, positions, packed.shape[1], table.stride(0))


@triton.jit
def _unpack(packed, table, newest, token_ids, positions, size, stride):
    row = tl.program_id(0)
    gdc_launch_dependents()
    token = tl.load(packed + row).to(tl.int64)
    index = tl.load(packed + size + row)
    page = tl.load(packed + 2 * size + row)
    slot = tl.load(packed + 3 * size + row).to(tl.int64)
    if token < 0:
        token = tl.load(newest + slot)
    tl.store(token_ids + row, token)
    tl.store(positions + row, tl.load(packed + 4 * size + row).to(tl.int64) - 1)
    if index >= 0:
        tl.store(table + slot * stride + index, page)
