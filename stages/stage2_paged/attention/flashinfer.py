"""FlashInfer (Ye et al. 2025): plans on the CPU how rows are spread over the GPU, for all layers at once."""

from typing import Any

import torch
from flashinfer import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper
from torch import Tensor

from stages.stage1_naive.config import ModelConfig
from stages.stage2_paged.inputs import RowInputs
from stages.stage2_paged.kv_cache import PagedKVCache

_WORKSPACE = 256 << 20  # bytes, for partial results of rows that are split over several blocks


class FlashInfer:
    """Prefill, or decode on tensor cores, with FlashInfer's wrappers for a paged cache."""

    def __init__(self, cache: PagedKVCache, config: ModelConfig, decode: bool) -> None:
        self._cache = cache
        self._config = config
        workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=cache.keys.device)
        self._decode = decode
        self._wrapper: Any = (
            BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
            if decode
            else BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        )
        self._planned = torch.cuda.Event()

    def plan(self, rows: RowInputs) -> None:
        # The wrapper copies its plan from a pinned buffer that the next plan overwrites.
        self._planned.synchronize()
        c, page_size = self._config, self._cache.page_size
        lengths = torch.tensor(rows.host_kv_lengths, dtype=torch.int32)
        counts = (lengths + page_size - 1) // page_size  # pages of each row
        starts = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        pages = (starts, _flatten(rows.page_tables, counts), (lengths - 1) % page_size + 1)
        shape = (c.num_heads, c.num_kv_heads, c.head_dim, page_size)
        dtype = self._cache.keys.dtype
        if self._decode:
            self._wrapper.plan(*pages, *shape, q_data_type=dtype, kv_data_type=dtype)
        else:
            queries = torch.tensor([0, *rows.query_lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            self._wrapper.plan(queries, *pages, *shape, causal=True, q_data_type=dtype, kv_data_type=dtype)
        self._planned.record()

    def attend(self, layer: int, q: Tensor) -> Tensor:
        out: Tensor = self._wrapper.run(q.contiguous(), (self._cache.keys[layer], self._cache.values[layer]))
        return out


def _flatten(tables: Tensor, counts: Tensor) -> Tensor:
    """The first `counts[r]` pages of each row r of `tables` [R, W], one row after the other, on the device.

    `counts` is on the host, so that nothing waits for the device to say how many there are.
    """
    used = torch.arange(tables.shape[1]) < counts.unsqueeze(1)  # [R, W]
    where = used.flatten().nonzero().squeeze(1)
    return tables.flatten()[where.to(tables.device, non_blocking=True)]
