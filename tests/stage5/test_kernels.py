"""Each fused kernel against the PyTorch that it stands for: on a GPU, or in Triton's interpreter."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="the kernels need Triton")

from stages.stage1_naive import model as plain
from stages.stage1_naive.attention import QKV, rope_table
from stages.stage1_naive.config import ModelConfig
from stages.stage1_naive.model import Layer
from stages.stage2_paged.kv_cache import PagedKVCache
from stages.stage5_overlap.kernels import elementwise
from stages.stage5_overlap.kernels.attention import DecodeAttention
from stages.stage5_overlap.kernels.linear import linear
from stages.stage5_overlap.kernels.preparation import Preparation

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
CLOSE: dict[str, Any] = {"rtol": 0.02, "atol": 0.02} if CUDA else {"rtol": 1e-4, "atol": 1e-5}
CONTEXT = 512
PDL = CUDA and torch.cuda.get_device_capability() >= (9, 0)


def config(heads: int, kv_heads: int, head_dim: int, qk_norm: bool) -> ModelConfig:
    return ModelConfig(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=head_dim, context_length=CONTEXT, norm_eps=1e-6, rope_theta=10_000.0,
        rope_scaling=None, tied_embeddings=True, qkv_bias=False, qk_norm=qk_norm, dtype="bfloat16",
        eos_token_ids=(),
    )  # fmt: skip


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(DEVICE, DTYPE)


def layer(c: ModelConfig) -> Layer:
    one = torch.empty(0)
    norms = {name: random(c.head_dim) if c.qk_norm else None for name in ("q_norm", "k_norm")}
    return Layer(1, one, one, None, norms["q_norm"], norms["k_norm"], one, one, one, one)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(1, 64), (3, 1000), (5, 33)])
@pytest.mark.parametrize("first", [True, False])
def test_add_norm(shape: tuple[int, int], first: bool) -> None:
    x, residual, weight = random(*shape), None if first else random(*shape), random(shape[1])
    expected = plain.add_norm(x.clone(), None if residual is None else residual.clone(), weight, 1e-6)
    for ours, theirs in zip(elementwise.add_norm(x, residual, weight, 1e-6, PDL), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("shape", [(1, 64), (3, 2500)])
def test_silu_mul(shape: tuple[int, int]) -> None:
    x = random(shape[0], 2 * shape[1])
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(elementwise.silu_mul(x, PDL), torch.nn.functional.silu(gate) * up, **CLOSE)


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 32])
@pytest.mark.parametrize(("size", "depth"), [(64, 64), (48, 300), (5, 1100)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(rows: int, size: int, depth: int, bias: bool) -> None:
    x, weight = random(rows, depth), random(size, depth, scale=depth**-0.5)
    b = random(size) if bias else None
    torch.testing.assert_close(linear(x, weight, b, PDL), torch.nn.functional.linear(x, weight, b), **CLOSE)


@pytest.mark.parametrize("rows", [1, 3, 32])
@pytest.mark.parametrize(("size", "depth"), [(64, 64), (10, 300), (6, 5120), (6, 8192)])
@pytest.mark.parametrize("bias", [True, False])
def test_gated_linear(rows: int, size: int, depth: int, bias: bool) -> None:
    x, weight = random(rows, depth), random(2 * size, depth, scale=depth**-0.5)
    b = random(2 * size) if bias else None
    gate, up = torch.nn.functional.linear(x, weight, b).chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(linear(x, weight, b, PDL, gated=True), expected, **CLOSE)


@pytest.mark.parametrize("rows", [1, 3, 16, 20])
@pytest.mark.parametrize(("size", "depth"), [(64, 64), (5, 1100), (2100, 130), (40, 5000)])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_that_normalises_and_adds(rows: int, size: int, depth: int, gated: bool, bias: bool) -> None:
    x, weight = random(rows, depth, scale=3.0), random(size * (1 + gated), depth, scale=depth**-0.5)
    norm_weight, stream = random(depth), random(rows, size)
    b = random(size * (1 + gated)) if bias else None
    product = torch.nn.functional.linear(plain.rms_norm(x, norm_weight, 1e-6), weight, b)
    if gated:
        gate, up = product.chunk(2, dim=-1)
        product = torch.nn.functional.silu(gate) * up
    expected = stream + product
    result = linear(x, weight, b, PDL, gated, (norm_weight, 1e-6), onto=stream)
    assert result is stream
    torch.testing.assert_close(stream, expected, rtol=0.02, atol=0.06 if CUDA else 1e-4)


SHAPES = [(4, 2, 16, True), (2, 2, 64, False), (10, 2, 32, True), (16, 1, 16, False)]


@pytest.mark.parametrize("shape", SHAPES)
def test_preparation(shape: tuple[int, int, int, bool]) -> None:
    c = config(*shape)
    cache = PagedKVCache(c, 40, 16, DTYPE, DEVICE)
    rope, the_layer, tokens = rope_table(c, CONTEXT, DEVICE), layer(c), 21
    qkv = random(tokens, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim)
    positions = torch.randperm(CONTEXT)[:tokens].to(DEVICE)
    locations = torch.randperm(40 * 16)[:tokens].to(DEVICE)
    qkv[3, c.num_heads * c.head_dim + 1] = torch.inf  # a key
    qkv[4, -1] = torch.nan  # a value
    q, k, v = QKV(c, rope)(the_layer, qkv, positions)
    twin = replace_cache(cache)
    twin.store(1, k, v, locations)
    torch.testing.assert_close(
        Preparation(cache, c, rope, PDL)(the_layer, qkv, positions, locations), q, **CLOSE
    )
    assert cache.values.isfinite().all()
    torch.testing.assert_close(cache.keys, twin.keys, equal_nan=True, **CLOSE)
    torch.testing.assert_close(cache.values, twin.values, **CLOSE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("lengths", [[0], [1, 63, 64, 65], [511], [5, 300, 0, 17, 128, 127]])
@pytest.mark.parametrize("bad", [False, True])
def test_decode_attention(
    shape: tuple[int, int, int, bool], page_size: int, lengths: list[int], bad: bool
) -> None:
    c, rows = config(*shape), len(lengths)
    pages = CONTEXT // page_size
    cache = PagedKVCache(c, pages * rows, page_size, DTYPE, DEVICE)
    for stored in (cache.keys, cache.values):
        stored.copy_(random(*stored.shape))
    rope, the_layer = rope_table(c, CONTEXT, DEVICE), layer(c)
    qkv = random(rows, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim)
    if bad:
        qkv[-1, -1] = qkv[-1, (c.num_heads + c.num_kv_heads) * c.head_dim - 1] = torch.nan
    positions = torch.tensor(lengths, device=DEVICE)
    table = torch.randperm(pages * rows).view(rows, pages).int().to(DEVICE)
    slots = torch.randperm(rows).to(DEVICE)
    expected = attend_plainly(c, rope, the_layer, qkv, positions, table[slots], replace_cache(cache))
    decode = DecodeAttention(cache, c, rope, rows, PDL)
    for _ in range(2):  # again: what one call leaves behind must not disturb the next
        out = decode(the_layer, qkv, positions, table, slots)
        torch.testing.assert_close(out, expected[0], equal_nan=True, **CLOSE)
    assert expected[0].isnan().any() == bad
    torch.testing.assert_close(cache.keys, expected[1].keys, equal_nan=True, **CLOSE)
    torch.testing.assert_close(cache.values, expected[1].values, **CLOSE)


def replace_cache(cache: PagedKVCache) -> PagedKVCache:
    twin = object.__new__(PagedKVCache)
    twin.num_pages, twin.page_size = cache.num_pages, cache.page_size
    twin.keys, twin.values = cache.keys.clone(), cache.values.clone()
    return twin


def attend_plainly(
    c: ModelConfig, rope: Tensor, the_layer: Layer, qkv: Tensor, positions: Tensor, tables: Tensor,
    cache: PagedKVCache,
) -> tuple[Tensor, PagedKVCache]:  # fmt: skip
    q, k, v = QKV(c, rope)(the_layer, qkv, positions)
    out = []
    for row, position in enumerate(positions.tolist()):
        page, offset = divmod(position, cache.page_size)
        location = tables[row, page : page + 1].long() * cache.page_size + offset
        cache.store(the_layer.index, k[row : row + 1], v[row : row + 1], location)
        keys, values = (
            x[the_layer.index][tables[row].long()].flatten(0, 1)[: position + 1].transpose(0, 1)
            for x in (cache.keys, cache.values)
        )
        out.append(
            torch.nn.functional.scaled_dot_product_attention(
                q[row].unsqueeze(1).float(), keys.float(), values.float(), enable_gqa=True
            ).flatten()
        )
    return torch.stack(out).to(qkv.dtype), cache
