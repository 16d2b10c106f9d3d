"""Stage 1's `sample` in three kernels: the same tokens, without noise or sorted logits ever in memory.

Stage 1 writes several tensors as large as the logits, and its filters sort the vocabulary. Here `draw` reads
the logits once and makes each token's noise in registers; `thresholds` finds what a sort would have cut.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from stages.stage1_naive.sampling import Sampled, SamplingBatch, scored
from stages.stage5_overlap.kernels.elementwise import begin

_COLDEST = tl.constexpr(1e-5)  # stage 1's
_BLOCK = tl.constexpr(4096)  # how much of a row `thresholds` reads at once


def sample(logits: Tensor, batch: SamplingBatch, pdl: bool = False) -> Sampled:
    """One token for each row of `logits` [R, V], bfloat16, float16 or float32: stage 1's `sample`."""
    adjusted, limits = batch.adjust(logits), None
    if batch.filters is not None:
        filters = batch.filters
        limits = thresholds(adjusted, batch.temperature, filters.top_k, filters.top_p, filters.min_p, pdl)
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    low, high = batch.seeds.to(torch.int32), (batch.seeds >> 32).to(torch.int32)
    draw(adjusted, batch.temperature, low, high, batch.positions.to(torch.int32), limits, tokens, pdl=pdl)
    return scored(logits, tokens) if batch.logprobs else Sampled(tokens)


def draw(
    logits: Tensor, temperature: Tensor, seeds_low: Tensor, seeds_high: Tensor, positions: Tensor,
    thresholds: Tensor | None, tokens: Tensor, newest: Tensor | None = None, slots: Tensor | None = None,
    pdl: bool = False, first: int = 0, gather: Callable[[Tensor], Tensor] | None = None,
) -> None:  # fmt: skip
    """The Gumbel-max draw with stage 1's noise, or the best token where the temperature is 0.

    `logits` [R, V] may have any stride between rows. `temperature` [R] float32; `seeds_low`, `seeds_high` and
    `positions` [R] int32; `thresholds` [R] float32: smaller logits / temperature are not drawn. Writes
    `tokens` [R] int64 and, if given, newest[slots[r]] = tokens[r], with `newest` int64 and `slots` [R] int32:
    -1 and 0 where a logit is NaN or infinite, or no token is left.
    Never waits for the device, so that a CUDA graph can hold it.

    Where ranks share the vocabulary, `logits` are of this one's tokens, from `first` on, and `gather` puts
    [R, n] int32 of all ranks side by side in their order: the best of each, instead of all logits.
    """
    rows, size = logits.shape
    few = rows <= 8
    block, warps = (1024, 4) if few else (4096, 8)  # few rows on all multiprocessors; many: less per block
    blocks = triton.cdiv(size, block)
    # of each block, its best score as bits; then of each, its token
    candidates = torch.empty(rows, 2 * blocks, dtype=torch.int32, device=logits.device)
    _draw_in_block[(rows, blocks)](
        logits, temperature, seeds_low, seeds_high, positions, thresholds, candidates, size,
        logits.stride(0), first, BLOCK=block, PDL=pdl, num_warps=warps, launch_pdl=pdl,
    )  # fmt: skip
    candidates = candidates if gather is None else gather(candidates)
    total = candidates.shape[1] // 2
    _best_block[(rows,)](
        candidates, tokens, newest, slots, blocks, total,
        BLOCK=triton.next_power_of_2(total), PDL=pdl, num_warps=1, launch_pdl=pdl,
    )  # fmt: skip


_BY_ROW = ["temperature", "seeds_low", "seeds_high", "positions", "thresholds"]  # at any place in a buffer


@triton.jit(do_not_specialize_on_alignment=_BY_ROW)
def _draw_in_block(
    logits, temperature, seeds_low, seeds_high, positions, thresholds, candidates, size, stride, first,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    row, blocks = tl.program_id(0), tl.num_programs(1)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row.to(tl.int64) * stride + columns
    raw = tl.load(logits + at, mask=columns < size, other=-float("inf")).to(tl.float32)
    scores, heat = raw, tl.load(temperature + row)
    if heat >= _COLDEST:
        scores = tl.div_rn(scores, heat)  # rounded as in PyTorch
        if thresholds is not None:
            scores = tl.where(scores < tl.load(thresholds + row), -float("inf"), scores)
        low, high = tl.load(seeds_low + row), tl.load(seeds_high + row)
        scores += _gumbel_noise(low, high, tl.load(positions + row), first + columns)
    scores = tl.where(raw < float("inf"), scores, float("inf"))  # NaN is the best, too: it must be noticed
    best, index = tl.max(scores, 0, return_indices=True)  # of equals the first
    out = candidates + row * 2 * blocks + tl.program_id(1)
    tl.store(out, best.to(tl.int32, bitcast=True))
    tl.store(out + blocks, first + tl.program_id(1) * BLOCK + index)


@triton.jit(do_not_specialize_on_alignment=["newest", "slots"])
def _best_block(candidates, tokens, newest, slots, blocks, total, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """The best of `total` candidates, of which each rank has `blocks`: their scores, then their tokens."""
    begin(PDL)
    row = tl.program_id(0)
    which = tl.arange(0, BLOCK)
    at = candidates + row * 2 * total + (which // blocks) * blocks + which
    bits = tl.load(at, mask=which < total, other=0)
    scores = tl.where(which < total, bits.to(tl.float32, bitcast=True), -float("inf"))
    score, best = tl.max(scores, 0, return_indices=True)
    token = tl.load(candidates + row * 2 * total + (best // blocks) * blocks + best + blocks).to(tl.int64)
    token = tl.where(tl.abs(score) < float("inf"), token, -1)
    tl.store(tokens + row, token)
    if newest is not None:
        tl.store(newest + tl.load(slots + row), tl.maximum(token, 0))  # what the next step reads is a token


@triton.jit
def _gumbel_noise(low, high, position, tokens):
    """Stage 1's `gumbel_noise`: the same bits, and its logarithms to within a few roundings."""
    first = _mix(_mix(_mix(low) ^ high) ^ position)
    second = _mix(_mix(_mix(high ^ 0x5BD1E995) ^ low) ^ position)
    bits = _mix(_mix(tokens ^ first) ^ second)
    uniform = (((bits >> 1) & 0x7FFFFFFF).to(tl.float32) + 0.5) * 2.0**-31
    uniform = tl.minimum(uniform, 1 - 2.0**-24)
    return -tl.log(-libdevice.log1p(-uniform))  # exact where it matters, at the large noises


@triton.jit
def _mix(x):
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x21F0AAAD
    x = (x ^ ((x >> 15) & 0x1FFFF)) * 0x735A2D97
    return x ^ ((x >> 15) & 0x1FFFF)


def thresholds(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, pdl: bool = False
) -> Tensor:
    """The least logit / temperature that stage 1's `Filters.apply` keeps, [R] float32; -inf: it keeps all.

    `logits` [R, V] may have any stride between rows; `temperature`, `top_p`, `min_p` [R] float32; `top_k` [R]
    of any integer type. Top-k and top-p both ask for the least value such that all greater ones together
    count or weigh less than a limit. Floats order as their bits do, read as integers (the negative ones with
    all but the sign inverted), so such a value is found by bisecting these integers: here into four parts
    at a time, with one pass over the row for each time, between bounds that the first pass gives.
    """
    rows, size = logits.shape
    out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _thresholds[(rows,)](
        logits, temperature, top_k, top_p, min_p, out, size, logits.stride(0),
        PDL=pdl, num_warps=32, launch_pdl=pdl,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize_on_alignment=["temperature", "top_k", "top_p", "min_p"])
def _thresholds(logits, temperature, top_k, top_p, min_p, out, size, stride, PDL: tl.constexpr):
    begin(PDL)
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    dtype: tl.constexpr = logits.dtype.element_ty
    heat = tl.maximum(tl.load(temperature + row), _COLDEST)
    k, p, fraction = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
    threshold = tl.full([], -float("inf"), tl.float32)
    if (k < size) | (p < 1.0) | (fraction > 0.0):
        best = tl.full([_BLOCK], -float("inf"), tl.float32)
        for start in range(0, size, _BLOCK):
            best = tl.maximum(best, _values(logits, start, size))
        top = tl.max(best)
        least = tl.full([], -float("inf"), tl.float32)
        if k < size:
            if k <= _BLOCK:  # as many logits are not below the least of as many maxima
                least = tl.min(best)
            key = _search(
                logits, size, _key(least, dtype), _key(top, dtype), k.to(tl.float32), top, heat, False
            )
            least = _value(key, dtype)
        if p < 1.0:
            count, _, _ = _above(logits, size, least, least, least, top, heat, False)
            mass, _, _ = _above(logits, size, least, least, least, top, heat, True)
            mass += (tl.minimum(k, size).to(tl.float32) - count) * tl.exp((least - top) / heat)
            # All below this weigh less than 1 - p together. One key less makes up for its rounding.
            low = _key(top + heat * tl.log((1.0 - p) / size), dtype) - 1
            low = tl.maximum(low, _key(least, dtype))
            limit = tl.maximum(p * mass, 1e-30)  # of 0 even the best would be cut
            least = _value(_search(logits, size, low, _key(top, dtype), limit, top, heat, True), dtype)
        threshold = tl.div_rn(least, heat)
        if fraction > 0.0:
            threshold = tl.maximum(threshold, tl.div_rn(top, heat) + tl.log(fraction))
    tl.store(out + row, threshold)


@triton.jit
def _search(logits, size, low, high, limit, top, heat, WEIGH: tl.constexpr):
    """The least key from `low` to `high` with less than `limit` above it; `high` is taken to be one."""
    dtype: tl.constexpr = logits.dtype.element_ty
    while low < high:
        step = (high - low) // 4 + 1
        a = _value(low + step - 1, dtype)
        b = _value(low + 2 * step - 1, dtype)
        c = _value(low + 3 * step - 1, dtype)
        a, b, c = _above(logits, size, a, b, c, top, heat, WEIGH)
        low += step * ((a >= limit).to(tl.int64) + (b >= limit).to(tl.int64) + (c >= limit).to(tl.int64))
        high = tl.minimum(high, low + step - 1)
    return low


@triton.jit
def _above(logits, size, a, b, c, top, heat, WEIGH: tl.constexpr):
    """How many logits are greater than each of three values, or their sum of exp((logit - top) / heat)."""
    above_a = tl.zeros([_BLOCK], tl.float32)
    above_b = tl.zeros([_BLOCK], tl.float32)
    above_c = tl.zeros([_BLOCK], tl.float32)
    for start in range(0, size, _BLOCK):
        values = _values(logits, start, size)
        weights = tl.where(values > -float("inf"), 1.0, 0.0)
        if WEIGH:
            weights = tl.exp((values - top) * (1.0 / heat))
        above_a += tl.where(values > a, weights, 0.0)
        above_b += tl.where(values > b, weights, 0.0)
        above_c += tl.where(values > c, weights, 0.0)
    return tl.sum(above_a), tl.sum(above_b), tl.sum(above_c)


@triton.jit
def _values(logits, start, size):
    columns = start + tl.arange(0, _BLOCK)
    return tl.load(logits + columns, mask=columns < size, other=-float("inf")).to(tl.float32)


@triton.jit
def _key(value, dtype: tl.constexpr):
    """An integer that orders as `value` of type `dtype` does; int64, so that sums do not overflow."""
    integer: tl.constexpr = tl.int16 if dtype.primitive_bitwidth == 16 else tl.int32
    bits = value.to(dtype).to(integer, bitcast=True).to(tl.int64)
    return bits ^ ((bits >> 63) & (2 ** (dtype.primitive_bitwidth - 1) - 1))


@triton.jit
def _value(key, dtype: tl.constexpr):
    bits = key ^ ((key >> 63) & (2 ** (dtype.primitive_bitwidth - 1) - 1))
    integer: tl.constexpr = tl.int16 if dtype.primitive_bitwidth == 16 else tl.int32
    return bits.to(integer).to(dtype, bitcast=True).to(tl.float32)
