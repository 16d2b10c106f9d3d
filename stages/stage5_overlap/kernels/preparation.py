"""What lies inside `attend` before a library's prefill kernel: q, k and v made ready in one pass."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from stages.stage1_naive.config import ModelConfig
from stages.stage1_naive.model import Layer
from stages.stage2_paged.kv_cache import PagedKVCache
from stages.stage5_overlap.kernels.elementwise import finite

_HEADS = 32  # that one block prepares, at most


class Preparation:
    """q-norm, k-norm, RoPE, and the stores into the cache, for rows of any length."""

    def __init__(self, cache: PagedKVCache, config: ModelConfig, rope: Tensor, pdl: bool) -> None:
        self._cache = cache
        self._config = config
        self._rope = rope
        self._pdl = pdl

    def __call__(self, layer: Layer, qkv: Tensor, positions: Tensor, locations: Tensor) -> Tensor:
        """`qkv` [T, (N + 2K) * D] -> q [T, N, D]; k and v go to `locations` [T] of the layer's cache."""
        c, cache = self._config, self._cache
        q = qkv.new_empty(len(qkv), c.num_heads, c.head_dim)
        heads = c.num_heads + 2 * c.num_kv_heads
        block = min(_HEADS, triton.next_power_of_2(heads))
        _prepare[(len(qkv), triton.cdiv(heads, block))](
            qkv, layer.q_norm, layer.k_norm, self._rope, positions, locations,
            q, cache.keys[layer.index], cache.values[layer.index], qkv.stride(0), c.norm_eps,
            N=c.num_heads, K=c.num_kv_heads, D=c.head_dim, HEADS=block, NORM=layer.q_norm is not None,
            PDL=self._pdl, num_warps=4, launch_pdl=self._pdl,
        )  # fmt: skip
        return q


# What changes from step to step must not be a reason to compile a kernel again, for seconds, under load.
@triton.jit(do_not_specialize_on_alignment=["positions", "locations"])
def _prepare(
    qkv, q_norm, k_norm, rope, positions, locations, q, keys, values, stride, eps,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token: each half of a head is read once, and both halves turn together."""
    HALF: tl.constexpr = D // 2
    if PDL:
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    d = tl.arange(0, HALF)[None, :]
    position = tl.load(positions + token)  # as old as the step, like `locations`
    location = tl.load(locations + token).to(tl.int64)
    turn = rope + position * 2 * D + d
    cos, sin = tl.load(turn), tl.load(turn + D + HALF)  # the second half's sines: without the minus
    low_norm, high_norm = cos, cos
    if NORM:
        is_q = head < N
        low_norm = tl.where(is_q, tl.load(q_norm + d), tl.load(k_norm + d)).to(tl.float32)
        high_norm = tl.where(is_q, tl.load(q_norm + HALF + d), tl.load(k_norm + HALF + d)).to(tl.float32)
    if PDL:
        gdc_wait()
    inside = head < N + 2 * K
    at = qkv + token * stride + head * D + d
    raw_low = tl.load(at, mask=inside, other=0.0)
    raw_high = tl.load(at + HALF, mask=inside, other=0.0)
    low, high = raw_low.to(tl.float32), raw_high.to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(low * low + high * high, 1, keep_dims=True) / D + eps)
        low, high = low * scale * low_norm, high * scale * high_norm
    turned_low = (low * cos - high * sin).to(raw_low.dtype)
    turned_high = (high * cos + low * sin).to(raw_low.dtype)
    q_at = q + (token * N + head) * D + d
    tl.store(q_at, turned_low, mask=head < N)
    tl.store(q_at + HALF, turned_high, mask=head < N)
    is_k = (head >= N) & (head < N + K)
    k_at = (location * K + head - N) * D + d
    tl.store(keys + k_at, turned_low, mask=is_k)
    tl.store(keys + k_at + HALF, turned_high, mask=is_k)
    is_v = (head >= N + K) & inside
    v_at = k_at - K * D
    tl.store(values + v_at, finite(raw_low), mask=is_v)
    tl.store(values + v_at + HALF, finite(raw_high), mask=is_v)
