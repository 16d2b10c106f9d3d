"""A batch as the device sees it. All of it is packed into one buffer and crosses in one copy."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.stage2_paged.batch import Batch, Row
from stages.stage2_paged.sampler import SampleInputs, Sampler

Ints = NDArray[np.int32]
_UNKNOWN = -1  # a token that only the device knows yet: it is read from the slot


@dataclass(frozen=True)
class RowInputs:
    """What attention needs to know of R rows. Tensors are on the device, lists on the host."""

    page_tables: Tensor  # [R, W] int32; W pages, as many as the longest row has
    query_starts: Tensor  # [R + 1] int32, where each row's queries begin among those of these rows
    kv_lengths: Tensor  # [R] int32, tokens in the cache, those of this step included
    query_lengths: list[int]
    host_kv_lengths: list[int]


@dataclass(frozen=True)
class StepInputs:
    """A step of T positions, of which S are sampled from."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    locations: Tensor  # [T] int64, page * page_size + offset of each position in the cache
    num_decode: int  # the first positions, one a row, are decode rows'
    decode: RowInputs | None
    prefill: RowInputs | None
    sampled_positions: Tensor  # [S] int64, indices among the T
    samples: SampleInputs


class Slots:
    """The device's tables by slot: every running request's pages and its newest token.

    One row more than there are slots is for padding; its pages are all the cache's padding page.
    """

    def __init__(
        self,
        max_rows: int,
        max_pages: int,
        page_size: int,
        padding_page: int,
        sampler: Sampler,
        device: torch.device,
    ) -> None:
        self._page_size = page_size
        self._sampler = sampler
        self._staging = _Staging(device)
        shape = (max_rows + 1, max_pages)
        self.page_table = torch.full(shape, padding_page, dtype=torch.int32, device=device)
        self.newest = torch.zeros(max_rows + 1, dtype=torch.int64, device=device)

    def upload(self, batch: Batch) -> StepInputs:
        """Pack and copy one batch. Only a request that enters with penalties or a bias makes it wait."""
        rows = batch.rows
        for row in rows:
            if row.enters:
                self._sampler.enter(row.slot, row.sequence)
        sampling = batch.sampling
        slots, lengths = _ints([row.slot for row in rows]), _ints([row.length for row in rows])
        ends = np.cumsum(lengths, dtype=np.int32)  # of each row, among all T positions
        firsts = _ints([row.start for row in rows]) - (ends - lengths)  # position minus index, in each row
        decode_end = int(ends[batch.num_decode - 1]) if batch.num_decode else 0
        parts: list[Ints] = [
            _ints([token for row in rows for token in _tokens(row)]),  # [T]
            np.repeat(firsts, lengths) + np.arange(ends[-1], dtype=np.int32),  # [T]
            np.repeat(slots, lengths),  # [T]
            slots,  # [R]
            _ints([row.end for row in rows]),  # [R]
            _ints([0, *ends[: batch.num_decode]]),
            _ints([0, *(ends[batch.num_decode :] - decode_end)]),
            ends[[row.samples for row in rows]] - 1,  # [S]
            self._sampler.pack(sampling),  # [S * columns]
            *self._new_pages(rows),  # [U], [U]
        ]
        (tokens, positions, token_slots, row_slots, kv_lengths, decode_starts, prefill_starts, sampled,
         samples, where, pages) = self._staging.copy(parts)  # fmt: skip
        self.page_table.view(-1).index_copy_(0, where.long(), pages)
        token_slots, positions = token_slots.long(), positions.long()
        page = self.page_table[token_slots, positions // self._page_size]
        tables = self.page_table[row_slots.long(), : max(len(row.sequence.pages) for row in rows)]
        d = batch.num_decode
        return StepInputs(
            token_ids=torch.where(tokens == _UNKNOWN, self.newest[token_slots], tokens.long()),
            positions=positions,
            locations=page.long() * self._page_size + positions % self._page_size,
            num_decode=d,
            decode=_row_inputs(rows[:d], tables[:d], decode_starts, kv_lengths[:d]),
            prefill=_row_inputs(rows[d:], tables[d:], prefill_starts, kv_lengths[d:]),
            sampled_positions=sampled.long(),
            samples=self._sampler.unpack(sampling, samples),
        )

    def remember(self, slots: Tensor, tokens: Tensor) -> None:
        """The newest tokens [S] of `slots` [S]. The next batch finds them there if the host is behind, and 0
        for -1: where no token could be drawn, one more row may be under way, and is dropped."""
        self.newest.index_copy_(0, slots, tokens.clamp(min=0))

    def _new_pages(self, rows: list[Row]) -> tuple[Ints, Ints]:
        """Where in the flat page table something changes, and the pages that go there."""
        width = self.page_table.shape[1]
        changes = [
            (row.slot * width + i, row.sequence.pages[i])
            for row in rows
            for i in range(row.first_new_page, len(row.sequence.pages))
        ]
        return _ints([where for where, _ in changes]), _ints([page for _, page in changes])


def _ints(values: list[int]) -> Ints:
    return np.array(values, dtype=np.int32)


def _tokens(row: Row) -> list[int]:
    tokens = row.sequence.tokens[row.start : row.end]
    return tokens + [_UNKNOWN] * (row.length - len(tokens))


def _row_inputs(rows: list[Row], tables: Tensor, starts: Tensor, kv_lengths: Tensor) -> RowInputs | None:
    if not rows:
        return None
    return RowInputs(tables, starts, kv_lengths, [row.length for row in rows], [row.end for row in rows])


class _Staging:
    """Copies arrays to the device as one. On a GPU the copy is asynchronous, from one of two pinned buffers;
    an event tells when a buffer has been read and may be filled again."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers = [torch.empty(0, dtype=torch.int32)] * 2
        self._read = [torch.cuda.Event() for _ in range(2)] if device.type == "cuda" else []
        self._turn = 0

    def copy(self, parts: list[Ints]) -> tuple[Tensor, ...]:
        """The same arrays on the device, views of one buffer."""
        packed = torch.from_numpy(np.concatenate(parts))
        sizes = [len(part) for part in parts]
        if self._device.type != "cuda":
            return torch.split(packed.to(self._device), sizes)
        self._turn = 1 - self._turn
        self._read[self._turn].synchronize()
        if len(self._buffers[self._turn]) < len(packed):
            self._buffers[self._turn] = torch.empty(2 * len(packed), dtype=torch.int32, pin_memory=True)
        staged = self._buffers[self._turn][: len(packed)].copy_(packed)
        on_device = staged.to(self._device, non_blocking=True)
        self._read[self._turn].record()
        return torch.split(on_device, sizes)
