"""The KV cache in pages, and who owns which page (PagedAttention, Kwon et al. 2023)."""

from collections.abc import Iterable

import torch
from torch import Tensor

from stages.stage1_naive.config import ModelConfig


class PageAllocator:
    """Pages are plain integers from 0. No tensor is needed to take one or to give it back."""

    def __init__(self, num_pages: int) -> None:
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the last given back is taken first

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` pages, which must be free."""
        assert count <= len(self._free), "pages are counted before they are taken"
        return [self._free.pop() for _ in range(count)]

    def give(self, pages: Iterable[int]) -> None:
        """Back to the free ones."""
        self._free.extend(pages)


class PagedKVCache:
    """Keys and values of every layer, `[pages + 1, page_size, kv_heads, head_dim]` each.

    The allocator does not know the last page: the padding of a batch reads and writes it.
    """

    def __init__(
        self, config: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        shape = (config.num_layers, num_pages + 1, page_size, config.num_kv_heads, config.head_dim)
        # zeros, not empty: a kernel may read past a sequence's end and multiply by zero, and 0 * NaN is NaN
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @staticmethod
    def bytes_per_page(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
        """What one page costs over all layers."""
        return 2 * config.num_layers * page_size * config.num_kv_heads * config.head_dim * dtype.itemsize

    def store(self, layer: int, k: Tensor, v: Tensor, locations: Tensor) -> None:
        """Write `k` and `v` [T, K, D] of one layer; a location [T] is page * page_size + offset, int64.

        A token that overflows has NaN in both. Its key keeps that; in its value NaN becomes 0, and inf the
        largest number. So NaN shows wherever that token is seen and nowhere else: a kernel drops the score of
        a key that a query may not see, but it multiplies the value by 0, and 0 * NaN is NaN.
        """
        self.keys[layer].flatten(0, 1).index_copy_(0, locations, k)
        self.values[layer].flatten(0, 1).index_copy_(0, locations, v.nan_to_num(0.0))
