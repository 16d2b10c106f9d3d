"""The model's operations with fused kernels in their places. Which, is a set of names."""

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.stage1_naive import model as plain
from stages.stage1_naive.attention import QKV
from stages.stage1_naive.config import ModelConfig
from stages.stage1_naive.model import Attend, Layer, Ops, Transformer
from stages.stage2_paged.attention.backend import AttentionBackend
from stages.stage2_paged.inputs import StepInputs
from stages.stage2_paged.kv_cache import PagedKVCache

KERNELS = ("norm", "mlp", "linear", "layer", "prepare", "decode", "sampling")


def choose_kernels(
    flag: str, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> frozenset[str]:
    """The kernels of a flag: `all` or `none`, or names from KERNELS, those after a minus left out.

    `all` is what this device and model allow: nothing without a GPU, Triton and 16-bit numbers.

    Raises:
        ValueError: there is no such kernel, or none can run here and some were named.
    """
    possible = device.type == "cuda" and dtype.itemsize == 2 and find_spec("triton") is not None
    names = frozenset(flag.removeprefix("-").split(",")) - {""}
    if flag not in ("all", "none") and (wrong := names - set(KERNELS)):
        raise ValueError(
            f"there is no fused kernel {', '.join(sorted(wrong))}; there are {', '.join(KERNELS)}"
        )
    if flag == "none" or (not possible and (flag == "all" or flag.startswith("-"))):
        return frozenset()
    if not possible:
        raise ValueError("fused kernels need a GPU, Triton, and bfloat16 or float16; leave --fused out")
    found = (
        frozenset(KERNELS) - names if flag.startswith("-") else frozenset(KERNELS) if flag == "all" else names
    )
    power = config.head_dim & (config.head_dim - 1) == 0 and config.head_dim >= 16
    return found if power else found - {"prepare", "decode"}


def has_dependent_launch() -> bool:
    """Whether the GPU lets a kernel wait on the device for the one before it (Hopper and newer)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def make_ops(fused: frozenset[str]) -> Ops:
    """The model's operations, of which those named are fused."""
    if not fused & {"norm", "mlp", "linear"}:
        return Ops()
    from stages.stage5_overlap.kernels import elementwise
    from stages.stage5_overlap.kernels.linear import linear as few_rows
    from stages.stage5_overlap.kernels.linear import wins

    pdl = has_dependent_launch()

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if "linear" in fused and wins(*x.shape):
            return few_rows(x, weight, bias, pdl)
        return F.linear(x, weight, bias)

    def add_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return elementwise.add_norm(x, residual, weight, eps, pdl)

    def mlp(layer: Layer, x: Tensor) -> Tensor:
        if "linear" in fused and wins(*x.shape):
            x = few_rows(x, layer.gate_up, layer.gate_up_bias, pdl, gated=True)
            return few_rows(x, layer.down, layer.down_bias, pdl)
        x = elementwise.silu_mul(F.linear(x, layer.gate_up, layer.gate_up_bias), pdl)
        return F.linear(x, layer.down, layer.down_bias)

    return Ops(
        linear=linear,
        add_norm=add_norm if "norm" in fused else plain.add_norm,
        mlp=mlp if "mlp" in fused else plain.mlp,
    )


def hidden_of_few(
    model: Transformer, token_ids: Tensor, positions: Tensor, attend: Attend, pdl: bool
) -> Tensor:
    """`Transformer.hidden` for a few rows, in five kernels a layer where that is faster: each matrix product
    normalises what it reads, or adds its result to the residual stream."""
    from stages.stage5_overlap.kernels.elementwise import add_norm, silu_mul
    from stages.stage5_overlap.kernels.linear import linear, wins

    eps, stream = model.config.norm_eps, model.ops.embed(token_ids, model.embedding)  # [R, H]

    def normed(norm: Tensor, weight: Tensor, bias: Tensor | None, gated: bool = False) -> Tensor:
        if wins(*stream.shape):
            return linear(stream, weight, bias, pdl, gated, (norm, eps))
        product = F.linear(add_norm(stream, None, norm, eps, pdl)[0], weight, bias)
        return silu_mul(product, pdl) if gated else product

    for layer in model.layers:
        qkv = normed(layer.input_norm, layer.qkv, layer.qkv_bias)
        linear(attend(layer, qkv, positions), layer.o, layer.o_bias, pdl, onto=stream)
        x = normed(layer.post_norm, layer.gate_up, layer.gate_up_bias, gated=True)
        linear(x, layer.down, layer.down_bias, pdl, onto=stream)
    return add_norm(stream, None, model.norm, eps, pdl)[0]


# (layer, qkv [T, (N + 2K) * D], positions [T], locations [T]) -> q [T, N, D]; k and v are stored
Prepare = Callable[[Layer, Tensor, Tensor, Tensor], Tensor]
# (layer, qkv [R, (N + 2K) * D], positions [R], page table [slots, pages], slots [R]) -> [R, N * D]
Decode = Callable[[Layer, Tensor, Tensor, Tensor, Tensor], Tensor]


def plain_preparation(cache: PagedKVCache, qkv: QKV) -> Prepare:
    """`Prepare` in PyTorch."""

    def prepare(layer: Layer, x: Tensor, positions: Tensor, locations: Tensor) -> Tensor:
        q, k, v = qkv(layer, x, positions)
        cache.store(layer.index, k, v, locations)
        return q

    return prepare


class FusedAttention:
    """The model's `attend`. Prefill rows are prepared and go to a library; decode rows do both in one kernel,
    or go the same way to a library of their own."""

    def __init__(
        self, prepare: Prepare, prefill: AttentionBackend, decode: Decode | AttentionBackend
    ) -> None:
        self._prepare = prepare
        self._prefill = prefill
        self._decode = decode
        self._step: StepInputs | None = None

    def plan(self, step: StepInputs) -> None:
        self._step = step
        if step.decode is not None:
            if not callable(self._decode):
                self._decode.plan(step.decode)
            self._rows = torch.arange(step.num_decode, device=step.token_ids.device)
        if step.prefill is not None:
            self._prefill.plan(step.prefill)

    def __call__(self, layer: Layer, qkv: Tensor, positions: Tensor) -> Tensor:
        step = self._step
        assert step is not None, "plan comes before the model"
        d, parts = step.num_decode, list[Tensor]()
        if step.decode is not None:
            if callable(self._decode):
                tables = step.decode.page_tables
                parts.append(self._decode(layer, qkv[:d], positions[:d], tables, self._rows))
            else:
                q = self._prepare(layer, qkv[:d], positions[:d], step.locations[:d])
                parts.append(self._decode.attend(layer.index, q).flatten(1))
        if step.prefill is not None:
            q = self._prepare(layer, qkv[d:], positions[d:], step.locations[d:])
            parts.append(self._prefill.attend(layer.index, q).flatten(1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)
