"""The Transformer, written once for all six stages.

Everything a later stage does better (fused kernels, sharded matrices, paged attention) it swaps in
through `Ops` and `attend`; no line here changes. Sizes in the comments: T tokens of all sequences of the
batch one after the other, H hidden size, I intermediate size, V vocabulary, D head_dim; N query heads,
K key/value heads.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from stages.stage1_naive.config import ModelConfig


@dataclass(frozen=True)
class Layer:
    """The weights of one block.

    Query, key and value are one matrix, and so are gate and up: one large matrix product reads the
    input once and fills the GPU better than three small ones.
    """

    index: int
    input_norm: Tensor  # [H]
    qkv: Tensor  # [(N + 2K) * D, H]
    qkv_bias: Tensor | None  # [(N + 2K) * D]
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None  # [D]
    o: Tensor  # [H, N * D]
    post_norm: Tensor  # [H]
    gate_up: Tensor  # [2 * I, H]
    down: Tensor  # [H, I]
    o_bias: Tensor | None = None  # [H]
    gate_up_bias: Tensor | None = None  # [2 * I]
    down_bias: Tensor | None = None  # [H]


# (layer, qkv [T, (N + 2K) * D], positions [T]) -> [T, N * D]. It takes the raw product: splitting it,
# normalising and rotating q and k, storing k and v, and attending are one affair of one stage.
Attend = Callable[[Layer, Tensor, Tensor], Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019).

    PyTorch computes it in float32 or wider, whatever the dtype, and on a GPU in one kernel.
    """
    return F.rms_norm(x, weight.shape, weight, eps)


def add_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add `x` to the residual stream and normalise the sum: `(normed, new residual)`, both [T, H].

    `residual` is None for the first layer, where `x` is the stream's beginning. `x` is otherwise the
    output of a row-parallel matrix product, so stage 6 sums over its ranks here.
    """
    residual = x if residual is None else residual + x
    return rms_norm(residual, weight, eps), residual


def mlp(layer: Layer, x: Tensor) -> Tensor:
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x)); `x` [T, H] -> [T, H]."""
    gate, up = F.linear(x, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)  # [T, I] each
    return F.linear(F.silu(gate) * up, layer.down, layer.down_bias)


@dataclass(frozen=True)
class Ops:
    """The functions the model is made of, each replaceable."""

    embed: Callable[[Tensor, Tensor], Tensor] = F.embedding  # (token ids [T], weight [V, H]) -> [T, H]
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear  # (x, weight, bias)
    add_norm: Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]] = add_norm
    mlp: Callable[[Layer, Tensor], Tensor] = mlp
    head: Callable[[Tensor, Tensor], Tensor] = F.linear  # (hidden [R, H], weight [V, H]) -> [R, V] or more


@dataclass(frozen=True)
class Transformer:
    """A decoder-only language model (Vaswani et al. 2017) in the shape that Llama gave it."""

    config: ModelConfig
    ops: Ops
    embedding: Tensor  # [V, H]
    layers: tuple[Layer, ...]
    norm: Tensor  # [H]
    head: Tensor  # [V, H]; the embedding again where they are tied

    def hidden(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """`token_ids` [T] and their `positions` [T], int64 -> the last layer's output [T, H]."""
        ops, eps = self.ops, self.config.norm_eps
        x = ops.embed(token_ids, self.embedding)
        residual = None
        for layer in self.layers:
            x, residual = ops.add_norm(x, residual, layer.input_norm, eps)
            qkv = ops.linear(x, layer.qkv, layer.qkv_bias)
            x = ops.linear(attend(layer, qkv, positions), layer.o, layer.o_bias)
            x, residual = ops.add_norm(x, residual, layer.post_norm, eps)
            x = ops.mlp(layer, x)
        x, _ = ops.add_norm(x, residual, self.norm, eps)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Rows of `hidden` [R, H] that sample -> a score for every token of the vocabulary [R, V].

        A head that is cut into equal shares may be padded: what it says beyond the vocabulary is left out.
        """
        return self.ops.head(hidden, self.head)[:, : self.config.vocab_size]
