"""What lies inside `attend` for decode rows, in one kernel.

A decode row has one query token, so its attention is bound by reading the cache. Its kernel reads it once and
does the rest on the way: it normalises and rotates q and k, stores k and v, and splits long rows over several
blocks (flash-decoding, Dao et al. 2023), whose last one joins the parts. It needs no plan from the CPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from stages.stage1_naive.config import ModelConfig
from stages.stage1_naive.model import Layer
from stages.stage2_paged.kv_cache import PagedKVCache
from stages.stage5_overlap.kernels.elementwise import fetch, finite

_MOST = 32  # splits of a row


class DecodeAttention:
    """Attention of one new token a row over the row's pages, from the raw product to the result."""

    def __init__(
        self, cache: PagedKVCache, config: ModelConfig, rope: Tensor, max_rows: int, pdl: bool
    ) -> None:
        self._cache = cache
        self._config = config
        self._rope = rope
        self._pdl = pdl
        device, self._sms = rope.device, 132
        if rope.is_cuda:
            self._sms = torch.cuda.get_device_properties(device).multi_processor_count
        pairs = max_rows * config.num_kv_heads
        parts = max(self._splits(rows) * rows for rows in range(1, max_rows + 1)) * config.num_heads
        self._parts = torch.empty(parts, config.head_dim, dtype=torch.float32, device=device)
        self._scales = torch.empty(parts, 2, dtype=torch.float32, device=device)
        self._finished = torch.zeros(pairs, dtype=torch.int32, device=device)

    def __call__(self, layer: Layer, qkv: Tensor, positions: Tensor, table: Tensor, slots: Tensor) -> Tensor:
        """`qkv` [R, (N + 2K) * D], `positions` [R], `slots` [R] rows of the page table [slots, pages], all
        but the first of any integer dtype -> [R, N * D]."""
        c, cache, rows = self._config, self._cache, len(qkv)
        out = qkv.new_empty(rows, c.num_heads * c.head_dim)
        splits, group = self._splits(rows), c.num_heads // c.num_kv_heads
        tile, warps, stages, early, join = _shape(rows)
        _decode[(c.num_kv_heads, rows, splits)](
            qkv, layer.q_norm, layer.k_norm, self._rope, positions, slots, table,
            cache.keys[layer.index], cache.values[layer.index], out,
            self._parts, self._scales, self._finished,
            qkv.stride(0), table.stride(0), splits, self._least(rows), c.norm_eps,
            c.head_dim**-0.5 * 1.4426950408889634,
            G=group, GROUP=triton.next_power_of_2(group), ROWS=max(16, triton.next_power_of_2(group)),
            JOIN=max(join, triton.next_power_of_2(group)), K=c.num_kv_heads, D=c.head_dim,
            PAGE=cache.page_size, TILE=tile, EARLY=early, NORM=layer.q_norm is not None,
            PDL=self._pdl, num_warps=warps, num_stages=stages, launch_pdl=self._pdl,
        )  # fmt: skip
        return out

    def _splits(self, rows: int) -> int:
        """Into how many parts a long row is cut: few rows must fill the GPU, and many must end together."""
        tenths = 20 if rows <= 16 else 19 if rows <= 32 else 40  # an idle block costs something, too
        blocks = tenths * self._sms // 10
        return max(1, min(_MOST, -(-blocks // (rows * self._config.num_kv_heads))))

    def _least(self, rows: int) -> int:
        """Tokens that are worth a block: more where there are many blocks anyway."""
        return min(1024, max(128, 2 * rows * self._config.num_kv_heads))


def _shape(rows: int) -> tuple[int, int, int, bool, int]:
    """Tokens at a time; warps; stages of the pipeline; whether the first tile is loaded before q is there;
    how many partial results are joined at once (with many rows a block has few registers). Measured on an
    H200. Triton counts the loading of pages as a stage: with three, they are there when a tile begins, and
    with five, so is the next tile."""
    if rows <= 32:
        return 128, 4, *((1, True, 64) if rows <= 16 else (3, True, 16))
    if rows <= 192:
        return 64 if rows <= 128 else 128, 4, 2, False, 16
    return 64, 2, 5, False, 16


@triton.jit
def _rotated(x, partners, cos, sin, norm, partner_norm, eps, D: tl.constexpr, NORM: tl.constexpr):
    """RMSNorm, then RoPE: heads [H, D], and the same with the halves of D exchanged, in float32."""
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / D + eps)
        x = x * scale * norm
        partners = partners * scale * partner_norm
    return x * cos + partners * sin


@triton.jit
def _load_tile(
    keys, values, table, start, end, kv,
    K: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """K and V of TILE tokens of one row [TILE, D], and which of them there are."""
    token = start + tl.arange(0, TILE)
    inside = token < end
    page = tl.load(table + token // PAGE, mask=inside, other=0).to(tl.int64)
    where = ((page * PAGE + token % PAGE) * K + kv)[:, None] * D + tl.arange(0, D)[None, :]
    k = tl.load(keys + where, mask=inside[:, None], other=0.0)
    return k, tl.load(values + where, mask=inside[:, None], other=0.0), inside


@triton.jit
def _attend(q, k, v, inside, scale, best, total, acc):
    """One step of the online softmax (Milakov and Gimelshein 2018), in powers of two."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where(inside[None, :], scores, -float("inf"))
    larger = tl.maximum(best, tl.max(scores, 1))
    weights = tl.exp2(scores - larger[:, None])
    shrink = tl.exp2(best - larger)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return larger, total * shrink + tl.sum(weights, 1), acc


@triton.jit
def _join(
    out, parts, scales, group, active, splits,
    G: tl.constexpr, GROUP: tl.constexpr, JOIN: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The result of one group of heads from its parts: some at a time, always in the same order."""
    WIDE: tl.constexpr = JOIN // GROUP
    d = tl.arange(0, D)[None, :]
    flat = tl.arange(0, JOIN)
    best = tl.full([GROUP], -float("inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    acc = tl.zeros([GROUP, D], tl.float32)
    for first in range(0, active, WIDE):
        split, g = first + flat // GROUP, flat % GROUP
        there = (split < active) & (g < G)
        part = (group * splits + split) * G + g
        its_best = tl.load(scales + part * 2, mask=there, other=-float("inf"), cache_modifier=".cg")
        its_total = tl.load(scales + part * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
        its = tl.load(parts + part[:, None] * D + d, mask=there[:, None], other=0.0, cache_modifier=".cg")
        its_best = tl.reshape(its_best, [WIDE, GROUP])
        larger = tl.maximum(best, tl.max(its_best, 0))
        old, weight = tl.exp2(best - larger), tl.exp2(its_best - larger[None, :])
        acc = acc * old[:, None] + tl.sum(tl.reshape(its, [WIDE, GROUP, D]) * weight[:, :, None], 0)
        total = total * old + tl.sum(tl.reshape(its_total, [WIDE, GROUP]) * weight, 0)
        best = larger
    head = tl.arange(0, GROUP)[:, None]
    tl.store(out + (group * G + head) * D + d, acc / total[:, None], mask=head < G)


# What changes from step to step must not be a reason to compile a kernel again, for seconds, under load.
@triton.jit(
    do_not_specialize=["table_stride", "splits", "least"],
    do_not_specialize_on_alignment=["positions", "slots", "table"],
)
def _decode(
    qkv, q_norm, k_norm, rope, positions, slots, table, keys, values, out, parts, scales, finished,
    stride, table_stride, splits, least, eps, scale,
    G: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, JOIN: tl.constexpr, K: tl.constexpr,
    D: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, EARLY: tl.constexpr,
    NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    kv, row, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    position = tl.load(positions + row).to(tl.int32)  # of the new token; as many are in the cache
    active = tl.maximum(1, tl.minimum(splits, tl.cdiv(position, least)))
    size = tl.maximum(1, tl.cdiv(tl.cdiv(position, active), TILE)) * TILE  # of each split
    active = tl.maximum(1, tl.cdiv(position, size))
    if split >= active:
        return
    table += tl.load(slots + row).to(tl.int64) * table_stride
    d = tl.arange(0, D)[None, :]
    end = tl.minimum((split + 1) * size, position)
    start = split * size
    if EARLY:  # only `qkv` is new: positions, pages and older keys and values are there since the step began
        k, v, inside = _load_tile(keys, values, table, start, end, kv, K, D, PAGE, TILE)
    if PDL:
        if not EARLY:  # the first of them can come as far as the L2 cache
            token = start + tl.arange(0, TILE)
            page = tl.load(table + token // PAGE, mask=token < end, other=0).to(tl.int64)
            lines = tl.arange(0, D // 64 if D > 64 else 1)[None, :] * 64  # 128 bytes each
            first = ((page * PAGE + token % PAGE) * K + kv)[:, None] * D + lines
            fetch(keys + first)
            fetch(values + first)
        gdc_wait()

    partner = (d + D // 2) % D
    head = tl.arange(0, ROWS)[:, None]  # of the group that shares this head of k and v
    cos, sin = tl.load(rope + position * 2 * D + d), tl.load(rope + position * 2 * D + D + d)
    at = qkv + row * stride + (kv * G + head) * D
    q = tl.load(at + d, mask=head < G, other=0.0).to(tl.float32)
    partners = tl.load(at + partner, mask=head < G, other=0.0).to(tl.float32)
    new_at = qkv + row * stride + (G * K + kv) * D
    new_k = tl.load(new_at + d)
    new_partners = tl.load(new_at + partner).to(tl.float32)
    new_v = tl.load(new_at + K * D + d)
    norm, partner_norm = cos, cos
    if NORM:
        norm, partner_norm = tl.load(q_norm + d).to(tl.float32), tl.load(q_norm + partner).to(tl.float32)
    q = _rotated(q, partners, cos, sin, norm, partner_norm, eps, D, NORM).to(qkv.dtype.element_ty)

    best = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    if EARLY:
        if start < end:
            best, total, acc = _attend(q, k, v, inside, scale, best, total, acc)
        start += TILE
    for tile in range(start, end, TILE):
        k, v, inside = _load_tile(keys, values, table, tile, end, kv, K, D, PAGE, TILE)
        best, total, acc = _attend(q, k, v, inside, scale, best, total, acc)

    if split == 0:  # it also takes the new token
        if NORM:
            norm, partner_norm = tl.load(k_norm + d).to(tl.float32), tl.load(k_norm + partner).to(tl.float32)
        new_k = new_k.to(tl.float32)
        new_k = _rotated(new_k, new_partners, cos, sin, norm, partner_norm, eps, D, NORM).to(q.dtype)
        new_page = tl.load(table + position // PAGE).to(tl.int64)
        new_where = ((new_page * PAGE + position % PAGE) * K + kv) * D + d
        tl.store(keys + new_where, new_k)
        new_v = finite(new_v)
        tl.store(values + new_where, new_v)
        score = tl.sum(q.to(tl.float32) * new_k.to(tl.float32), 1) * scale
        new_best = tl.maximum(best, score)
        weight, shrink = tl.exp2(score - new_best), tl.exp2(best - new_best)
        acc = acc * shrink[:, None] + weight[:, None] * new_v.to(tl.float32)
        total = total * shrink + weight
        best = new_best

    group = row * K + kv
    ours = out + (group * G + head) * D + d
    if active == 1:
        tl.store(ours, acc / total[:, None], mask=head < G)
        return
    rows = tl.arange(0, ROWS)
    part = (group * splits + split) * G + rows
    tl.store(parts + part[:, None] * D + d, acc, mask=head < G)
    tl.store(scales + part * 2, best, mask=rows < G)
    tl.store(scales + part * 2 + 1, total, mask=rows < G)
    tl.debug_barrier()  # all of this block has stored before one of its threads says so
    if tl.atomic_add(finished + group, 1) != active - 1:
        return
    tl.debug_barrier()
    _join(out, parts, scales, group, active, splits, G, GROUP, JOIN, D)
    tl.store(finished + group, 0)
