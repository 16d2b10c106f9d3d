"""What an attention backend is, and how the model attends through two of them."""

from typing import Protocol

import torch
from torch import Tensor

from stages.stage1_naive.attention import QKV
from stages.stage1_naive.model import Layer
from stages.stage2_paged.inputs import RowInputs, StepInputs
from stages.stage2_paged.kv_cache import PagedKVCache


class AttentionBackend(Protocol):
    """Causal attention of some rows over a paged cache, with one kernel library."""

    def plan(self, rows: RowInputs) -> None:
        """Once a step, before any layer."""

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Queries [T, N, D] of the planned rows, one after the other -> [T, N, D]. A row's last query sees
        all of its cache, the one before it a token less."""


class StepAttention(Protocol):
    """The model's `attend`, once it knows the step."""

    def plan(self, step: StepInputs) -> None:
        """Once a step, before the model runs."""

    def __call__(self, layer: Layer, qkv: Tensor, positions: Tensor) -> Tensor:
        """`qkv` [T, (N + 2K) * D] -> [T, N * D]."""


class PagedAttention:
    """The model's `attend`: prepare q, k and v, store k and v in their pages, attend over the pages.

    Every row stores before any row attends, so rows of one batch may share pages.
    """

    def __init__(
        self, cache: PagedKVCache, prefill: AttentionBackend, decode: AttentionBackend, prepare: QKV
    ) -> None:
        self._cache = cache
        self._prefill = prefill
        self._decode = decode
        self._prepare = prepare
        self._step: StepInputs | None = None

    def plan(self, step: StepInputs) -> None:
        self._step = step
        if step.decode is not None:
            self._decode.plan(step.decode)
        if step.prefill is not None:
            self._prefill.plan(step.prefill)

    def __call__(self, layer: Layer, qkv: Tensor, positions: Tensor) -> Tensor:
        step = self._step
        assert step is not None, "plan comes before the model"
        q, k, v = self._prepare(layer, qkv, positions)
        self._cache.store(layer.index, k, v, step.locations)
        if step.prefill is None:
            return self._decode.attend(layer.index, q).flatten(1)
        if step.decode is None:
            return self._prefill.attend(layer.index, q).flatten(1)
        d = step.num_decode
        parts = self._decode.attend(layer.index, q[:d]), self._prefill.attend(layer.index, q[d:])
        return torch.cat(parts).flatten(1)
