"""Matrix products with a few rows: all their time is reading the weights, so these are streamed once.

cuBLAS is made for many rows. With one to some tens of them each block here takes some rows of the weights
and all of `x`. With programmatic dependent launch it fetches its weights, which depend on nobody, into the L2
cache while the kernel before it still runs, and only then waits for `x`.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from stages.stage5_overlap.kernels.elementwise import fetch

MOST_ROWS = 16  # beyond, cuBLAS is as fast


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, pdl: bool, gated: bool = False) -> Tensor:
    """`x` [R, K] with R up to MOST_ROWS, `weight` [N, K], `bias` [N] -> [R, N].

    `gated`: the weights are gate and up, one below the other, and the result is silu(gate) * up [R, N / 2].
    """
    rows, depth = x.shape
    size = weight.shape[0] // 2 if gated else weight.shape[0]
    out = x.new_empty(rows, size)
    block_size, parts, block_depth, warps, stages = _shape(rows, size, depth, gated)
    _linear[(triton.cdiv(size, block_size),)](
        x, weight, bias, out, rows, size, depth, x.stride(0),
        ROWS=1 if rows == 1 else max(16, triton.next_power_of_2(rows)), SIZE=block_size, PARTS=parts,
        DEPTH=block_depth, GATED=gated, BIAS=bias is not None, PDL=pdl,
        num_warps=warps, num_stages=stages, launch_pdl=pdl,
    )  # fmt: skip
    return out


def _shape(rows: int, size: int, depth: int, gated: bool) -> tuple[int, int, int, int, int]:
    """Rows of weights in a block; of each, how many parts at a time of which depth; warps; stages.

    Every warp multiplies a part of its own: one after the other they would wait for each other's sums.
    """
    if rows > 1:
        return (8, 4, 64, 4, 3) if size <= 2048 else (8, 1, 256, 1, 3) if gated else (16, 2, 128, 2, 3)
    if gated and size > 8192:
        return 1, 1, 2048, 2, 2
    if size > 2048 and depth <= 2048 and not gated:
        return 4, 1, min(1024, triton.next_power_of_2(depth)), 2, 2
    if size > 2048:
        return 8, 1, min(512, triton.next_power_of_2(depth)), 4, 2
    return 2, 1, min(2048, triton.next_power_of_2(depth)), 4, 2


@triton.jit
def _linear(
    x, weight, bias, out, rows, size, depth, stride,
    ROWS: tl.constexpr, SIZE: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    mine = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    safe = tl.minimum(mine, size - 1).to(tl.int64)  # rows beyond the end are computed, and not stored
    gate_at = weight + safe * depth
    up_at = gate_at + size * depth
    if PDL:
        gdc_launch_dependents()
        line = tl.minimum(tl.arange(0, PARTS * DEPTH // 64) * 64, depth - 1)[None, :]  # 128 bytes each
        fetch(gate_at[:, None] + line)
        if GATED:
            fetch(up_at[:, None] + line)
        gdc_wait()
    row = tl.arange(0, ROWS)
    part = tl.arange(0, PARTS)[:, None, None] * DEPTH + tl.arange(0, DEPTH)[None, None, :]
    gate = tl.zeros([PARTS, SIZE, DEPTH] if ROWS == 1 else [PARTS, ROWS, SIZE], dtype=tl.float32)
    up = tl.zeros([PARTS, SIZE, DEPTH] if ROWS == 1 else [PARTS, ROWS, SIZE], dtype=tl.float32)
    for start in range(0, depth, PARTS * DEPTH):
        here = start + part  # [PARTS, 1, DEPTH]
        inside = here < depth
        present = inside & (row[None, :, None] < rows)
        value = tl.load(x + row[None, :, None] * stride + here, mask=present, other=0.0)
        w = tl.load(gate_at[None, :, None] + here, mask=inside, other=0.0)
        gate = _add_product(gate, value, w, ROWS)
        if GATED:
            w = tl.load(up_at[None, :, None] + here, mask=inside, other=0.0)
            up = _add_product(up, value, w, ROWS)
    gate, up = _sum(gate, ROWS), _sum(up, ROWS)  # [ROWS, SIZE]
    if BIAS:
        gate += tl.load(bias + safe)[None, :].to(tl.float32)
    if GATED:
        gate = gate * tl.sigmoid(gate) * up
    tl.store(
        out + row[:, None] * size + mine[None, :], gate, mask=(row[:, None] < rows) & (mine[None, :] < size)
    )


@triton.jit
def _add_product(acc, x, weight, ROWS: tl.constexpr):
    """One tile's share, x [PARTS, ROWS, DEPTH] and weight [PARTS, SIZE, DEPTH]; no dot if ROWS is 1."""
    if ROWS == 1:
        acc += weight.to(tl.float32) * x.to(tl.float32)
    else:
        acc = tl.dot(x, tl.permute(weight, (0, 2, 1)), acc, input_precision="ieee")
    return acc


@triton.jit
def _sum(acc, ROWS: tl.constexpr):
    """The parts together: [ROWS, SIZE]."""
    acc = tl.sum(acc, 0)
    if ROWS == 1:
        acc = tl.sum(acc, 1)[None, :]
    return acc
