"""`kernels`: every fused kernel of stage 5 alone, against the PyTorch that it stands for, and its bytes.

PyTorch's column is stage 1's own code. Both are captured in CUDA graphs, `sample` too: none waits for Python.
For decode attention it prepares q, k and v, gathers the pages, and takes `scaled_dot_product_attention`.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minisgl.bench.limits import measure_machine
from minisgl.bench.record import Json, environment, save
from minisgl.bench.shapes import SHAPES, write_config
from minisgl.bench.timing import microseconds
from stages.interface import Request, SamplingParams
from stages.stage1_naive import model as plain
from stages.stage1_naive.attention import QKV, rope_table
from stages.stage1_naive.config import ModelConfig
from stages.stage1_naive.sampling import SamplingBatch, sample
from stages.stage2_paged.kv_cache import PagedKVCache
from stages.stage5_overlap.fused import has_dependent_launch, plain_preparation

_BYTES, _PAGE, _TOKENS = 2, 16, 430  # of a number; in a page; in a row that decodes, with the new one
_COLUMNS = ("kernel", "size", "ours_us", "pytorch_us", "ceiling_us")
Randn = Callable[..., Tensor]
# kernel, size, bytes that it must at least read and write, arguments of each call, our function and PyTorch's
Case = tuple[str, str, int, list[tuple[Any, ...]], Callable[..., object], Callable[..., object]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    rows = "such as 1,8,32,256,16384: each kernel takes those that it is for (default: each has its own)"
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b", help="(default: %(default)s)")
    parser.add_argument("--rows", metavar="LIST", help=rows)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all numbers there, as JSON")


def run(args: argparse.Namespace) -> None:
    """Measure and print kernel by kernel."""
    parts = args.rows.split(",") if args.rows is not None else []
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise ValueError(f"--rows must be numbers such as 1,8,256, not {args.rows!r}")
    device = _device()
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), args.shape)
        config = ModelConfig.load(Path(folder))
    bandwidth = measure_machine(device, torch.bfloat16).bandwidth
    torch.manual_seed(0)
    randn = partial(torch.randn, dtype=torch.bfloat16, device=device)
    with torch.inference_mode():
        results = measure(cases(config, [int(part) for part in parts], randn), bandwidth, device)
    if args.out:
        save(args.out, environment() | {"model": args.shape, "copy_bandwidth": bandwidth, "results": results})


def measure(todo: Iterable[Case], bandwidth: float, device: torch.device) -> list[Json]:
    """The results of `todo`, each printed as it comes."""
    about = f"µs; this machine copies {bandwidth / 1e9:,.0f} GB/s"
    print(f"{about:<56}{'ours':>10}{'PyTorch':>12}{'bytes alone':>14}")
    results = []
    for kernel, size, moved, inputs, *calls in todo:
        times = [microseconds([partial(call, *own) for own in inputs], device) for call in calls]
        times = [round(time, 2) for time in (*times, 1e6 * moved / bandwidth)]
        print("{:<34}{:<22}{:>10,.2f}{:>12,.2f}{:>14,.2f}".format(kernel, size, *times), flush=True)
        results.append(dict(zip(_COLUMNS, (kernel, size, *times), strict=True)))
    return results


def cases(c: ModelConfig, rows: list[int], randn: Randn) -> Iterator[Case]:
    """Every kernel with those of `rows` that are not beyond its own, or with its own if there are none."""
    for make, own in (
        (_elementwise, (1, 8, 32, 256, 16_384)),
        (_preparation, (1, 8, 32, 256, 16_384)),
        (_products, (1, 8, 16)),
        (_draws, (1, 32, 256)),
        (_attention, (1, 8, 32, 128, 256)),
    ):
        for n in [n for n in rows if n <= own[-1]] if rows else own:
            yield from make(c, n, randn, has_dependent_launch())


def _device() -> torch.device:
    if not torch.cuda.is_available() or find_spec("triton") is None:
        raise ValueError("the fused kernels can only be measured on a CUDA GPU, with Triton")
    return torch.device("cuda")


def _copies(size: int, most: int = 28) -> range:
    """So many sets of data of `size` bytes that together they do not fit into the GPU's cache."""
    return range(max(2, min(most, 100_000_000 // size + 1)))


def _elementwise(c: ModelConfig, n: int, randn: Randn, pdl: bool) -> Iterator[Case]:
    from stages.stage5_overlap.kernels.elementwise import add_norm, silu_mul

    size, moved, ours = c.hidden_size, 4 * n * c.hidden_size * _BYTES, partial(add_norm, pdl=pdl)
    inputs: list[Any] = [(randn(n, size), randn(n, size), randn(size), c.norm_eps) for _ in _copies(moved)]
    yield "add + RMSNorm", f"{n:,} x {size:,}", moved, inputs, ours, plain.add_norm
    size, moved = c.intermediate_size, 3 * n * c.intermediate_size * _BYTES
    inputs = [(randn(n, 2 * size),) for _ in _copies(moved)]
    yield "SiLU * mul", f"{n:,} x {size:,}", moved, inputs, partial(silu_mul, pdl=pdl), _silu_mul


def _silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)  # as in stage 1's `mlp`
    return F.silu(gate) * up


def _preparation(c: ModelConfig, n: int, randn: Randn, pdl: bool) -> Iterator[Case]:
    from stages.stage5_overlap.kernels.preparation import Preparation

    width, size = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim, f"{n:,} token{'s' * (n > 1)}"
    moved = n * 2 * (width * _BYTES + c.head_dim * 4)  # the angles are in float32
    cache, layers = _layers(c, -(-n // _PAGE), len(_copies(moved)), randn)
    rope = rope_table(c, n, cache.keys.device)
    where = [torch.randperm(n, device=rope.device) for _ in range(2)]  # positions and locations
    inputs = [(layer, randn(n, width), *where) for layer in layers]
    ours, pytorch = Preparation(cache, c, rope, pdl), plain_preparation(cache, QKV(c, rope))
    yield "q/k-norm + RoPE + KV store", size, moved, inputs, ours, pytorch


def _products(c: ModelConfig, n: int, randn: Randn, pdl: bool) -> Iterator[Case]:
    from stages.stage5_overlap.kernels.linear import linear

    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    for name, size, depth in (
        ("qkv, with RMSNorm", heads + 2 * kv, c.hidden_size),
        ("o, with add", c.hidden_size, heads),
        ("gate-up, with RMSNorm and SiLU", 2 * c.intermediate_size, c.hidden_size),
        ("down, with add", c.hidden_size, c.intermediate_size),
    ):
        moved, inputs = (size + n) * depth * _BYTES, list[tuple[Any, ...]]()  # the result is hardly anything
        for _ in _copies(moved):
            more = (None, randn(n, size)) if "add" in name else ((randn(depth), c.norm_eps), None)
            x, weight = randn(n, depth), randn(size, depth) * depth**-0.5
            inputs.append((x, weight, None, pdl, "SiLU" in name, *more))
        yield name, f"{n} x {size:,} x {depth:,}", moved, inputs, linear, _product


def _product(x: Tensor, weight: Tensor, bias: None, pdl: bool, gated: bool, norm: Any, onto: Any) -> Tensor:
    """What `linear` stands for."""
    product = F.linear(plain.rms_norm(x, *norm) if norm else x, weight, bias)
    product = _silu_mul(product) if gated else product
    return product if onto is None else onto + product


def _draws(c: ModelConfig, n: int, randn: Randn, pdl: bool) -> Iterator[Case]:
    from stages.stage5_overlap.kernels import sampling

    moved, ours = n * c.vocab_size * _BYTES, partial(sampling.sample, pdl=pdl)
    logits = [randn(n, c.vocab_size) * 3 for _ in _copies(moved)]
    hot, cut = SamplingParams(temperature=0.6), SamplingParams(temperature=0.6, top_k=50, top_p=0.9)
    for name, params in (("temperature sampling", hot), ("top-k 50, top-p 0.9 and sampling", cut)):
        rows = [(Request(str(i), [1], params, seed=i << 40), [2]) for i in range(n)]
        inputs = [(own, SamplingBatch.of(rows, c.vocab_size, own.device)) for own in logits]
        yield name, f"{n} x {c.vocab_size:,}", moved, inputs, ours, sample


def _attention(c: ModelConfig, n: int, randn: Randn, pdl: bool) -> Iterator[Case]:
    from stages.stage5_overlap.kernels.attention import DecodeAttention

    heads, kv, last = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, _TOKENS - 1
    moved = n * 2 * (heads + kv * (_TOKENS + 1)) * _BYTES
    copies, pages = len(_copies(moved, most=64)), -(-_TOKENS // _PAGE)  # a step finds no K and V in L2
    cache, layers = _layers(c, n * pages, copies, randn)
    stored, rope = (cache.keys, cache.values), rope_table(c, _TOKENS, cache.keys.device)
    table = torch.randperm(n * pages, device=rope.device).view(n, pages)
    locations = table[:, last // _PAGE] * _PAGE + last % _PAGE
    ours, prepare = DecodeAttention(cache, c, rope, n, pdl), plain_preparation(cache, QKV(c, rope))

    def pytorch(layer: plain.Layer, qkv: Tensor, positions: Tensor, *_: Tensor) -> Tensor:
        q = prepare(layer, qkv, positions, locations).unsqueeze(2)  # [R, N, 1, D]
        k, v = (x[layer.index][table].flatten(1, 2)[:, :_TOKENS].transpose(1, 2) for x in stored)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).flatten(1)

    rows = torch.full_like(locations, last), table.int(), torch.arange(n, device=rope.device).int()
    inputs = [(layer, randn(n, heads + 2 * kv), *rows) for layer in layers]
    yield "decode attention", f"{n} x {_TOKENS} tokens", moved, inputs, ours, pytorch


def _layers(c: ModelConfig, pages: int, count: int, randn: Randn) -> tuple[PagedKVCache, list[plain.Layer]]:
    """Random keys and values, and layers of which only the norms of q and k are there."""
    x = randn(0)
    cache = PagedKVCache(replace(c, num_layers=count), pages, _PAGE, x.dtype, x.device)
    cache.keys.normal_()
    cache.values.normal_()
    norm = partial(randn, c.head_dim) if c.qk_norm else lambda: None
    return cache, [plain.Layer(i, x, x, None, norm(), norm(), x, x, x, x) for i in range(count)]
