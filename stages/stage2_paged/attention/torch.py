"""PyTorch's own attention, row by row: any device, any page size. The one to read, and to compare with."""

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.stage2_paged.inputs import RowInputs
from stages.stage2_paged.kv_cache import PagedKVCache


class TorchAttention:
    """Gathers each row's pages into one piece and attends over it."""

    def __init__(self, cache: PagedKVCache) -> None:
        self._cache = cache
        self._rows: RowInputs | None = None

    def plan(self, rows: RowInputs) -> None:
        self._rows = rows

    def attend(self, layer: int, q: Tensor) -> Tensor:
        rows = self._rows
        assert rows is not None, "plan comes before attend"
        keys, values = self._cache.keys[layer], self._cache.values[layer]  # [pages, page_size, K, D]
        out = []
        for queries, table, length in zip(
            q.split(rows.query_lengths), rows.page_tables, rows.host_kv_lengths, strict=True
        ):
            pages = table[: -(-length // self._cache.page_size)]
            k = keys[pages].flatten(0, 1)[:length].transpose(0, 1)  # [K, length, D]
            v = values[pages].flatten(0, 1)[:length].transpose(0, 1)
            mask = None
            if len(queries) > 1:
                k, mask = _masked(k, len(queries))
            x = F.scaled_dot_product_attention(queries.transpose(0, 1), k, v, attn_mask=mask, enable_gqa=True)
            out.append(x.transpose(0, 1))
        return torch.cat(out)


def _masked(k: Tensor, num_queries: int) -> tuple[Tensor, Tensor]:
    """`k` [K, length, D], and what is added to the scores [queries, length] of the last queries.

    PyTorch adds -inf to what a query may not see, which is no help where a key is NaN. So NaN moves from the
    key to the mask.
    """
    scores = k.mul(0).sum((0, 2)).expand(num_queries, -1)  # 0, or NaN
    visible = _causal(num_queries, k.shape[1], k.device)
    return k.nan_to_num(0.0), scores.masked_fill(~visible, -torch.inf)


def _causal(num_queries: int, length: int, device: torch.device) -> Tensor:
    """[queries, length] bool: the last query sees everything, the one before it a token less."""
    return torch.ones(num_queries, length, dtype=torch.bool, device=device).tril(length - num_queries)
