"""FlashAttention over pages (Dao 2023): version 4 on Hopper and newer GPUs, version 2 on Ampere and Ada."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stages.stage2_paged.inputs import RowInputs
from stages.stage2_paged.kv_cache import PagedKVCache


class FlashAttention:
    """One kernel for all rows, whatever their lengths; it serves prefill and decode alike.

    Raises:
        ImportError: the package for this GPU is not installed.
    """

    def __init__(self, cache: PagedKVCache, version: int) -> None:
        self._cache = cache
        self._version = version
        if self._version == 4:
            # Its compiler warns about an unused argument of its own whenever a kernel is compiled.
            warnings.filterwarnings("ignore", message="Argument aux_data", category=UserWarning)
            from flash_attn.cute import flash_attn_varlen_func
        else:
            from flash_attn import flash_attn_varlen_func
        self._kernel: Callable[..., Any] = flash_attn_varlen_func
        self._arguments: dict[str, Any] = {}

    def plan(self, rows: RowInputs) -> None:
        shared = {
            "cu_seqlens_q": rows.query_starts,
            "max_seqlen_q": max(rows.query_lengths),
            "max_seqlen_k": max(rows.host_kv_lengths),
            "causal": True,  # aligned at the end: the last query sees everything
        }
        if self._version == 4:
            self._arguments = {**shared, "seqused_k": rows.kv_lengths, "page_table": rows.page_tables}
        else:
            ends = rows.kv_lengths.cumsum(0, dtype=torch.int32)
            starts = torch.nn.functional.pad(ends, (1, 0))
            self._arguments = {**shared, "cu_seqlens_k": starts, "block_table": rows.page_tables}

    def attend(self, layer: int, q: Tensor) -> Tensor:
        out = self._kernel(q, self._cache.keys[layer], self._cache.values[layer], **self._arguments)
        attended: Tensor = out[0] if isinstance(out, tuple) else out
        return attended
