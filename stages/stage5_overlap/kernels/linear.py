"""Matrix products with a few rows: all their time is reading the weights, so these are streamed once.

cuBLAS is made for many rows. With one to some tens of them each block here takes some rows of the weights
and all of `x`. With programmatic dependent launch it loads its weights, which depend on nobody, while the
kernel before it still runs, and only then waits for `x`. RMSNorm costs nothing here: every block sees all of
a row, and what the row is divided by can be divided by at the end. Nor does adding to the residual stream.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from stages.stage5_overlap.kernels.elementwise import fetch

MOST_ROWS = 32  # beyond, cuBLAS is as fast


def wins(rows: int, depth: int) -> bool:
    """Whether this is faster than cuBLAS with an RMSNorm before it, as measured on an H200."""
    return rows == 1 or (rows <= 16 and depth <= 2048)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pdl: bool,
    gated: bool = False,
    norm: tuple[Tensor, float] | None = None,
    onto: Tensor | None = None,
) -> Tensor:
    """`x` [R, K] with R up to MOST_ROWS, `weight` [N, K], `bias` [N] -> [R, N].

    `gated`: the weights are gate and up, one below the other, so is the bias, and the result is
    silu(gate) * up [R, N / 2].
    `norm`: weight [K] and epsilon of an RMSNorm of `x` before the product. `onto` [R, N]: the result is added
    to it, in place.
    """
    rows, depth = x.shape
    size = weight.shape[0] // 2 if gated else weight.shape[0]
    out = x.new_empty(rows, size) if onto is None else onto
    block_size, parts, block_depth, warps, stages = _shape(rows, size, depth, gated, norm is not None)
    norm_weight, eps = norm or (None, 0.0)
    _linear[(triton.cdiv(size, block_size),)](
        x, weight, bias, norm_weight, out, rows, size, depth, x.stride(0), eps,
        ROWS=1 if rows == 1 else max(16, triton.next_power_of_2(rows)), SIZE=block_size, PARTS=parts,
        DEPTH=block_depth, WHOLE=parts * block_depth >= depth, GATED=gated, ADD=onto is not None, PDL=pdl,
        num_warps=warps, num_stages=stages, launch_pdl=pdl,
    )  # fmt: skip
    return out


def _shape(rows: int, size: int, depth: int, gated: bool, normed: bool) -> tuple[int, int, int, int, int]:
    """Rows of weights in a block; of each, how many parts at a time of which depth; warps; stages. All as
    measured on an H200.

    Every warp multiplies a part of its own: one after the other they would wait for each other's sums.
    """
    whole = triton.next_power_of_2(depth)
    if rows == 1:
        if gated and depth > 4096 and not normed:  # with a norm it was not measured
            return 1, 1, 2048 if depth >= 8192 else 1024, 2, 2
        if gated:
            return 2, 1, min(1024, whole), 2, 2
        if depth <= 4096:
            return 4, 1, whole, 4, 2
        return 4, 1, 1024, 2 if size > depth else 8, 2
    if rows > 16:
        return 8, 4, 256, 4, 3
    if depth <= 1024:
        return 32 if size > 2048 and not gated else 16, 4, 256, 4, 1
    return (16, 8, 256, 8, 1) if depth <= 2048 else (16, 4, 256, 4, 3)


@triton.jit
def _linear(
    x, weight, bias, norm_weight, out, rows, size, depth, stride, eps,
    ROWS: tl.constexpr, SIZE: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, WHOLE: tl.constexpr,
    GATED: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    mine = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    safe = tl.minimum(mine, size - 1).to(tl.int64)  # rows beyond the end are computed, and not stored
    gate_at = (weight + safe * depth)[None, :, None]
    up_at = gate_at + size.to(tl.int64) * depth
    row = tl.arange(0, ROWS)
    part = tl.arange(0, PARTS)[:, None, None] * DEPTH + tl.arange(0, DEPTH)[None, None, :]
    if PDL:
        gdc_launch_dependents()
    if WHOLE:  # a single tile: it waits in registers for x
        gate_w = tl.load(gate_at + part, mask=part < depth, other=0.0)
        up_w = gate_w
        if GATED:
            up_w = tl.load(up_at + part, mask=part < depth, other=0.0)
    if PDL:
        if not WHOLE:  # the first tile can come as far as the L2 cache
            line = tl.arange(0, PARTS * DEPTH // 64)[None, None, :] * 64  # 128 bytes each
            line = tl.minimum(line, depth - 1)
            fetch(gate_at + line)
            if GATED:
                fetch(up_at + line)
        gdc_wait()
    gate = tl.zeros([PARTS, SIZE, DEPTH] if ROWS == 1 else [PARTS, ROWS, SIZE], dtype=tl.float32)
    up = tl.zeros([PARTS, SIZE, DEPTH] if ROWS == 1 else [PARTS, ROWS, SIZE], dtype=tl.float32)
    squares = tl.zeros([PARTS, ROWS], dtype=tl.float32)
    x_at = x + row[None, :, None] * stride
    present = row[None, :, None] < rows
    if WHOLE:
        value, squares = _read(x_at, norm_weight, part, present, depth, squares)
        gate = _add_product(gate, value, gate_w, ROWS)
        if GATED:
            up = _add_product(up, value, up_w, ROWS)
    else:
        for start in range(0, depth, PARTS * DEPTH):
            here = start + part
            value, squares = _read(x_at, norm_weight, here, present, depth, squares)
            w = tl.load(gate_at + here, mask=here < depth, other=0.0)
            gate = _add_product(gate, value, w, ROWS)
            if GATED:
                w = tl.load(up_at + here, mask=here < depth, other=0.0)
                up = _add_product(up, value, w, ROWS)
    gate, up = _sum(gate, ROWS), _sum(up, ROWS)  # [ROWS, SIZE]
    if norm_weight is not None:
        scale = tl.rsqrt(tl.sum(squares, 0) / depth + eps)[:, None]
        gate *= scale
        up *= scale
    if bias is not None:
        gate += tl.load(bias + safe)[None, :].to(tl.float32)
        if GATED:
            up += tl.load(bias + safe + size)[None, :].to(tl.float32)
    if GATED:
        gate = gate * tl.sigmoid(gate) * up
    out_at = out + row[:, None] * size + mine[None, :]
    stored = (row[:, None] < rows) & (mine[None, :] < size)
    if ADD:
        gate += tl.load(out_at, mask=stored, other=0.0).to(tl.float32)
    tl.store(out_at, gate, mask=stored)


@triton.jit
def _read(x_at, norm_weight, here, present, depth, squares):
    """A tile of `x` [PARTS, ROWS, DEPTH] times the norm's weight, and the squares [PARTS, ROWS] so far."""
    value = tl.load(x_at + here, mask=present & (here < depth), other=0.0)
    if norm_weight is not None:
        wide = value.to(tl.float32)
        squares += tl.sum(wide * wide, 2)
        scale = tl.load(norm_weight + here, mask=here < depth, other=0.0).to(tl.float32)
        value = (wide * scale).to(value.dtype)
    return value, squares


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
