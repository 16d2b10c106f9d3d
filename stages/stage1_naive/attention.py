"""What lies inside `attend`: heads, rotary positions, and attention over the whole sequence."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.stage1_naive.config import ModelConfig, RopeScaling
from stages.stage1_naive.model import Layer, rms_norm


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Radians by which each pair of dimensions turns per position, [head_dim / 2], float32.

    RoFormer (Su et al. 2021); the scaling is that of Llama 3.1 (Grattafiori et al. 2024).
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    return _stretch(frequencies, config.rope_scaling) if config.rope_scaling else frequencies


def _stretch(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Divide the low frequencies by `factor`, keep the high ones, and blend in between."""
    turns = scaling.original_context / (2 * math.pi / frequencies)  # full turns in the trained context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)  # 0: slow, stretched; 1: fast, as it was
    return (1.0 - blend) * frequencies / scaling.factor + blend * frequencies


def rope_table(config: ModelConfig, length: int, device: torch.device) -> Tensor:
    """What `rotate` multiplies with at each position: [length, 2, head_dim], float32.

    The cosines are there twice, for both dimensions of a pair, and so are the sines, the first ones negative.
    """
    angles = torch.outer(torch.arange(length, dtype=torch.float32), rope_frequencies(config))
    cos, sin = angles.cos(), angles.sin()  # [length, head_dim / 2]
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)], 1).to(device)


def rotate(x: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """Turn each head's vector by the angles of its position: `x` [T, heads, head_dim], `positions` [T].

    Dimension i is paired with i + head_dim / 2, as in the Hugging Face checkpoints.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = table[positions].to(wide).split(1, dim=1)  # [T, 1, head_dim] each
    x, dtype = x.to(wide), x.dtype
    partners = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, partners, sin).to(dtype)


@dataclass(frozen=True)
class QKV:
    """Splits the fused product into heads, normalises and rotates q and k. Later stages use it as it is."""

    config: ModelConfig
    rope: Tensor  # [context, 2, head_dim]

    def __call__(self, layer: Layer, qkv: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`qkv` [T, (N + 2K) * D] -> q [T, N, D], k [T, K, D], v [T, K, D]."""
        c = self.config
        heads = qkv.view(len(qkv), -1, c.head_dim)  # [T, N + 2K, D]
        qk, v = torch.split(heads, [c.num_heads + c.num_kv_heads, c.num_kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = torch.split(qk, [c.num_heads, c.num_kv_heads], dim=1)
            qk = torch.cat(
                [rms_norm(q, layer.q_norm, c.norm_eps), rms_norm(k, layer.k_norm, c.norm_eps)], dim=1
            )
        q, k = torch.split(rotate(qk, self.rope, positions), [c.num_heads, c.num_kv_heads], dim=1)
        return q, k, v


@dataclass(frozen=True)
class NaiveAttention:
    """Causal attention of one whole sequence with itself; nothing is kept for the next token."""

    prepare: QKV

    def __call__(self, layer: Layer, qkv: Tensor, positions: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1) for x in self.prepare(layer, qkv, positions))  # [heads, T, D]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # [N, T, D]
        return out.transpose(0, 1).flatten(1)  # [T, N * D]
