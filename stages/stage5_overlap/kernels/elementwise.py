"""What lies between the matrix products: each a single pass over memory instead of several.

Every kernel here and beside begins with `begin(PDL)`. With programmatic dependent launch (Hopper and newer) a
kernel's blocks are already there when the one before it ends, and wait in place of being launched.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def begin(PDL: tl.constexpr):
    """Let the next kernel's blocks come, and wait until what the last one wrote can be read."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def finite(x):
    """NaN is 0, and inf the largest number of its kind: as `PagedKVCache.store` has it for values."""
    largest = 65504.0 if x.dtype == tl.float16 else 3.38e38
    wide = x.to(tl.float32)
    wide = tl.where(wide == wide, wide, 0.0)
    return tl.minimum(tl.maximum(wide, -largest), largest).to(x.dtype)


@triton.jit
def fetch(at):
    """Bring the cache lines of these addresses into L2, and wait for none."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [at.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, pdl: bool
) -> tuple[Tensor, Tensor]:
    """Stage 1's `add_norm` in one kernel. `x` [T, H] and `residual` are overwritten, and are the result."""
    rows, size = x.shape
    normed = x if residual is not None else torch.empty_like(x)
    stream = x if residual is None else residual
    block = triton.next_power_of_2(size)
    warps = min(8, max(1, block // 512))
    _add_norm[(rows,)](
        x, stream, normed, weight, size, eps,
        ADD=residual is not None, BLOCK=block, PDL=pdl, num_warps=warps, launch_pdl=pdl,
    )  # fmt: skip
    return normed, stream


@triton.jit
def _add_norm(
    x, stream, normed, weight, size, eps, ADD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)  # does not wait for anyone
    begin(PDL)
    at = tl.program_id(0).to(tl.int64) * size + columns
    value = tl.load(x + at, mask=inside, other=0.0)
    if ADD:
        value = value + tl.load(stream + at, mask=inside, other=0.0)  # rounded, as in PyTorch
        tl.store(stream + at, value, mask=inside)
    value = value.to(tl.float32)
    rms = tl.rsqrt(tl.sum(value * value) / size + eps)
    tl.store(normed + at, value * rms * scale, mask=inside)


def silu_mul(gate_up: Tensor, pdl: bool) -> Tensor:
    """`gate_up` [T, 2 * I] -> silu(gate) * up [T, I]."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    block = 1024
    _silu_mul[(rows, triton.cdiv(size, block))](gate_up, out, size, BLOCK=block, PDL=pdl, launch_pdl=pdl)
    return out


@triton.jit
def _silu_mul(gate_up, out, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    at = gate_up + row * 2 * size + columns
    gate = tl.load(at, mask=inside).to(tl.float32)
    up = tl.load(at + size, mask=inside).to(tl.float32)
    tl.store(out + row * size + columns, gate * tl.sigmoid(gate) * up, mask=inside)
