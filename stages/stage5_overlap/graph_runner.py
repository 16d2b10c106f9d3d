"""Decode steps as CUDA graphs: hundreds of kernels that one call launches."""

import bisect
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from stages.stage1_naive.model import Layer, Transformer
from stages.stage1_naive.sampling import Sampled
from stages.stage2_paged.batch import Batch, Row
from stages.stage2_paged.inputs import Slots
from stages.stage2_paged.runner import Computed, ModelRunner, Pending
from stages.stage2_paged.sampler import Sampler
from stages.stage5_overlap.fused import Decode, has_dependent_launch, hidden_of_few

logger = logging.getLogger(__name__)

_OWN = 3  # columns of a row before the sampler's: token, new page's index, new page


@dataclass(frozen=True)
class _Graph:
    """A captured step of R rows, the places it reads from and the places it writes to."""

    graph: torch.cuda.CUDAGraph
    packed: Tensor  # [columns, R] int32
    logits: Tensor  # [R, V], or this rank's share of V
    tokens: Tensor  # [R] int64


@dataclass(frozen=True)
class VocabularyShare:
    """The tokens from `first` on that this process has logits of; others have the others. `gather` puts
    [R, n] of each side by side."""

    first: int
    gather: Callable[[Tensor], Tensor]


def graph_sizes(max_rows: int) -> list[int]:
    """The numbers of rows that are captured: a batch is padded to the next, by at most 15 rows of many."""
    return sorted({size for size in (1, 2, 4, 8, *range(16, max_rows, 16)) if size < max_rows} | {max_rows})


class GraphRunner:
    """Replays a graph for batches of decode rows, and leaves the others to `eager`.

    A graph repeats the same kernels on the same addresses, so a batch is padded to a captured size: padding
    rows belong to the slot beyond the last, whose pages are all the cache's padding page.
    """

    def __init__(
        self,
        eager: ModelRunner,
        model: Transformer,
        decode: Decode,
        sampler: Sampler,
        slots: Slots,
        sizes: list[int],
        fused: frozenset[str],
        share: VocabularyShare | None = None,
    ) -> None:
        self._eager = eager
        self._model = model
        self._decode = decode
        self._sampler = sampler
        self._slots = slots
        self._sizes = sizes
        self._fused = fused
        self._share = share if "sampling" in fused else None  # else the model's head gathers
        self._padding = len(slots.newest) - 1
        self._pool = torch.cuda.graph_pool_handle()
        columns = _OWN + sampler.columns
        self._staging = [torch.zeros(columns * sizes[-1], dtype=torch.int32).pin_memory() for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)]
        self._turn = 0
        start = time.perf_counter()
        largest_first = tqdm(sizes[::-1], desc="capturing CUDA graphs", unit="graph")
        self._graphs = {size: self._capture(size) for size in largest_first}
        logger.info("captured %d CUDA graphs in %.1f s", len(sizes), time.perf_counter() - start)

    def launch(self, batch: Batch) -> Pending:
        return self.sample(self.forward(batch))

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Computed:
        rows = batch.rows
        if batch.num_decode < len(rows) or len(rows) > self._sizes[-1]:
            return self._eager.forward(batch)
        graph = self._graphs[self._sizes[bisect.bisect_left(self._sizes, len(rows))]]
        self._upload(rows, graph.packed)
        graph.graph.replay()
        logits = graph.logits[: len(rows)]
        if all(_is_plain(row) for row in rows) and not batch.masked:
            return Computed(batch, logits, None, graph.tokens[: len(rows)])
        inputs = self._sampler.unpack(rows, graph.packed[_OWN:, : len(rows)].reshape(-1))
        if self._share:
            logits = self._share.gather(logits)[:, : self._model.config.vocab_size]  # without padding
        return Computed(batch, logits, inputs)

    def sample(self, computed: Computed) -> Pending:
        if computed.tokens is not None:
            return Pending(computed.batch, Sampled(computed.tokens))
        return self._eager.sample(computed)

    def close(self) -> None:
        """A library whose operations are in a graph may wait for the graph's end, as NCCL does."""
        for graph in self._graphs.values():
            graph.graph.reset()
        self._graphs.clear()

    def _upload(self, rows: list[Row], packed: Tensor) -> None:
        """Pack rows and padding, and copy them to where the graph reads. Waits for the copy before last."""
        self._turn = 1 - self._turn
        self._copied[self._turn].synchronize()
        staged = self._staging[self._turn][: packed.numel()].view(packed.shape)
        self._pack(rows, staged)
        packed.copy_(staged, non_blocking=True)
        self._copied[self._turn].record()

    def _pack(self, rows: list[Row], staged: Tensor) -> None:
        columns, count = staged.numpy(), len(rows)
        columns[:, count:] = 0
        columns[1, count:] = -1
        columns[_OWN, count:] = self._padding
        columns[_OWN + 1, count:] = 1
        for i, row in enumerate(rows):
            tokens, pages, index = row.sequence.tokens, row.sequence.pages, row.first_new_page
            columns[0, i] = tokens[row.start] if row.start < len(tokens) else -1
            columns[1:_OWN, i] = (index, pages[index]) if index < len(pages) else (-1, 0)
        columns[_OWN:, :count] = self._sampler.pack(rows).reshape(self._sampler.columns, count)

    @torch.inference_mode()
    def _capture(self, size: int) -> _Graph:
        packed = self._staging[0][: (_OWN + self._sampler.columns) * size].view(-1, size)
        self._pack([], packed)
        packed = packed.to(self._slots.newest.device)
        self._step(packed)  # compiles what is not compiled
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # What other threads ask of the device meanwhile, as NCCL's do, has no part in it.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits, tokens = self._step(packed)
        return _Graph(graph, packed, logits, tokens)

    def _step(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """One step of as many rows as `packed` [columns, R] has: the graph's logits and tokens."""
        from stages.stage5_overlap.kernels.linear import MOST_ROWS
        from stages.stage5_overlap.kernels.rows import unpack

        slots, rows, pdl = self._slots, packed.shape[1], has_dependent_launch()
        token_ids = packed.new_empty(rows, dtype=torch.int64)
        positions = torch.empty_like(token_ids)
        unpack(packed, slots.page_table, slots.newest, token_ids, positions)

        def attend(layer: Layer, qkv: Tensor, positions: Tensor) -> Tensor:
            return self._decode(layer, qkv, positions, slots.page_table, packed[_OWN])

        most = MOST_ROWS if self._model.config.hidden_size <= 2048 else 1
        if rows <= most and "layer" in self._fused:
            hidden = hidden_of_few(self._model, token_ids, positions, attend, pdl)
        else:
            hidden = self._model.hidden(token_ids, positions, attend)
        share = self._share
        logits = F.linear(hidden, self._model.head) if share else self._model.logits(hidden)
        if share:  # the last ones may be padded, with tokens that there are not
            logits[:, max(0, self._model.config.vocab_size - share.first) :] = -torch.inf
        if "sampling" in self._fused:
            from stages.stage5_overlap.kernels.sampling import draw

            slot, position, low, high, _, heat = packed[_OWN : _OWN + 6]
            tokens = torch.empty_like(token_ids)
            draw(
                logits, heat.view(torch.float32), low, high, position, None, tokens, slots.newest, slot, pdl,
                first=share.first if share else 0, gather=share.gather if share else None,
            )  # fmt: skip
            return logits, tokens
        inputs = self._sampler.unpack([], packed[_OWN:].reshape(-1))
        sampled = self._sampler.sample(logits, inputs)
        slots.remember(inputs.slots, sampled.tokens)
        return logits, sampled.tokens


def _is_plain(row: Row) -> bool:
    """Whether the token that the graph drew is right: it knows temperatures and seeds alone."""
    params = row.sequence.request.params
    return not (params.has_penalties or params.logit_bias or params.has_filters) and params.logprobs is None
