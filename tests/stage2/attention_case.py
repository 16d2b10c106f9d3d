"""Random queries over random pages, and what attention over them must be. No test library in here."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.stage1_naive.config import ModelConfig
from stages.stage2_paged.inputs import RowInputs
from stages.stage2_paged.kv_cache import PagedKVCache

KV_HEADS = 2


@dataclass(frozen=True)
class AttentionCase:
    config: ModelConfig
    cache: PagedKVCache
    rows: RowInputs
    q: Tensor  # [T, N, D]
    expected: Tensor  # [T, N, D] float64, if asked for


def shapes(page_size: int) -> dict[str, list[tuple[int, int]]]:
    """(queries, tokens in the cache) of each row: 1, and both sides of a page's end."""
    p = page_size
    ends = sorted({1, max(p - 1, 1), p, p + 1, 2 * p, 2 * p + 1, 37})
    return {
        "decode": [(1, length) for length in ends],
        "prefill": [(length, length) for length in ends],
        "extend": [(-(-length // 2), length) for length in ends],  # behind a prefix that is cached
    }


def make_case(
    config: ModelConfig,
    lengths: list[tuple[int, int]],
    page_size: int,
    dtype: torch.dtype,
    device: str,
    dense: bool = True,
) -> AttentionCase:
    """`config` gives heads and head_dim. Pages are scattered, and what no row owns is filled as well."""
    random = torch.Generator().manual_seed(0)
    counts = [-(-length // page_size) for _, length in lengths]
    cache = PagedKVCache(config, sum(counts) + 3, page_size, dtype, torch.device(device))
    for table in (cache.keys, cache.values):
        table.copy_(torch.randn(table.shape, generator=random))
    order = torch.randperm(cache.num_pages, generator=random).int()
    tables = torch.full((len(lengths), max(counts)), cache.num_pages, dtype=torch.int32)
    for row, pages in enumerate(order[: sum(counts)].split(counts)):
        tables[row, : len(pages)] = pages
    queries = [count for count, _ in lengths]
    q = torch.randn(sum(queries), config.num_heads, config.head_dim, generator=random).to(device, dtype)
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    kv = torch.tensor([length for _, length in lengths], dtype=torch.int32)
    rows = RowInputs(tables.to(device), starts.to(device), kv.to(device), queries, kv.tolist())
    return AttentionCase(config, cache, rows, q, _dense(config, cache, rows, q) if dense else q)


def _dense(config: ModelConfig, cache: PagedKVCache, rows: RowInputs, q: Tensor) -> Tensor:
    """Softmax attention of the last layer written out, one query and one head at a time."""
    out = torch.empty(q.shape, dtype=torch.float64)
    group, position = config.num_heads // config.num_kv_heads, 0
    k_all, v_all = (x[-1].double().cpu().flatten(0, 1) for x in (cache.keys, cache.values))  # [slots, K, D]
    for table, count, length in zip(
        rows.page_tables.tolist(), rows.query_lengths, rows.host_kv_lengths, strict=True
    ):
        where = [table[i // cache.page_size] * cache.page_size + i % cache.page_size for i in range(length)]
        for i in range(count):
            seen = where[: length - count + i + 1]
            for head in range(config.num_heads):
                k, v = k_all[seen, head // group], v_all[seen, head // group]
                scores = k @ q[position, head].double().cpu() / config.head_dim**0.5
                out[position, head] = scores.softmax(0) @ v
            position += 1
    return out
