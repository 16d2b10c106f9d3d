"""Stage 1's sampling for whole batches: parameters by slot, so that a step packs one row of numbers each."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.stage1_naive.sampling import Filters, Penalties, Sampled, SamplingBatch, count_tokens, sample
from stages.stage2_paged.batch import Row, Sequence

# What crosses for each row that samples: integers, then floats as their bits.
_INTS = ("slot", "position", "seed_low", "seed_high", "top_k")
_FLOATS = ("temperature", "top_p", "min_p", "repetition", "frequency", "presence")
_COLUMNS = len(_INTS) + len(_FLOATS)

Draw = Callable[[Tensor, SamplingBatch], Sampled]  # a token for each row of logits [S, V]


@dataclass(frozen=True)
class SampleInputs:
    """How S rows sample, on the device."""

    slots: Tensor  # [S] int64
    batch: SamplingBatch


class Sampler:
    """Keeps what sampling needs to know of every running request, by slot.

    Tables as wide as the vocabulary exist only from the first request on that asks for a penalty or a bias.
    """

    columns = _COLUMNS

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device, draw: Draw = sample) -> None:
        self._draw = draw
        self._vocab_size = vocab_size
        self._max_rows = max_rows
        self._device = device
        self._params: NDArray[np.int32] = np.zeros((max_rows, _COLUMNS), dtype=np.int32)
        self._counts: Tensor | None = None  # [slots, V] int32, how often each token was generated
        self._in_prompt: Tensor | None = None  # [slots, V] bool
        self._bias: Tensor | None = None  # [slots, V] float32
        self._biased: set[int] = set()  # slots whose row of it is not zero

    def enter(self, slot: int, sequence: Sequence) -> None:
        """A sequence, new or recomputed, takes a slot."""
        request, params = sequence.request, sequence.request.params
        seed = np.array([request.seed], dtype=np.int64).view(np.int32)  # low half, high half
        ints = [slot, 0, *seed, params.top_k or self._vocab_size]
        floats = [params.temperature, params.top_p, params.min_p]
        floats += [params.repetition_penalty, params.frequency_penalty, params.presence_penalty]
        self._params[slot] = [*ints, *np.array(floats, dtype=np.float32).view(np.int32)]
        if params.has_penalties:
            self._counts = self._table(self._counts, torch.int32)
            self._in_prompt = self._table(self._in_prompt, torch.bool)
            self._counts[slot] = count_tokens(sequence.output, self._vocab_size).to(self._device)
            self._in_prompt[slot] = (count_tokens(request.prompt, self._vocab_size) > 0).to(self._device)
        if params.logit_bias:
            self._bias = self._table(self._bias, torch.float32)
        if self._bias is not None and (params.logit_bias or slot in self._biased):
            (self._biased.add if params.logit_bias else self._biased.discard)(slot)
            self._bias[slot] = 0.0
            biases = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
            self._bias[slot, list(params.logit_bias)] = biases.to(self._device)

    def pack(self, rows: list[Row]) -> NDArray[np.int32]:
        """The parameters of S rows that sample, column after column: [columns * S]."""
        packed = self._params[[row.slot for row in rows]]
        packed[:, _INTS.index("position")] = [row.end for row in rows]
        return packed.T.ravel()

    def unpack(self, rows: list[Row], packed: Tensor) -> SampleInputs:
        """What `pack` made of the same rows, on the device."""
        params = [row.sequence.request.params for row in rows]
        columns = packed.view(_COLUMNS, -1)
        slots, position, seed_low, seed_high, top_k = columns[: len(_INTS)].long()
        floats = columns[len(_INTS) :].view(torch.float32)
        temperature, top_p, min_p, repetition, frequency, presence = floats
        penalties = bias = filters = None
        counted = any(p.has_penalties for p in params)
        if counted and self._counts is not None and self._in_prompt is not None:
            seen = self._in_prompt[slots], self._counts[slots]
            penalties = Penalties(*seen, repetition, frequency, presence)
        if self._bias is not None and any(p.logit_bias for p in params):
            bias = self._bias[slots]
        if any(p.has_filters for p in params):
            filters = Filters(top_k, top_p, min_p)
        batch = SamplingBatch(
            temperature=temperature,
            seeds=(seed_high << 32) | (seed_low & 0xFFFFFFFF),
            positions=position,
            penalties=penalties,
            bias=bias,
            filters=filters,
            logprobs=any(p.logprobs is not None for p in params),
        )
        return SampleInputs(slots, batch)

    def mask(self, rows: list[Row], inputs: SampleInputs) -> SampleInputs:
        """The same inputs of S rows, with what each may draw by the tokens that are committed."""
        bits = np.full((len(rows), -(-self._vocab_size // 32)), -1, dtype=np.int32)
        for i, row in enumerate(rows):
            sequence = row.sequence
            if sequence.mask is not None and row.masked:
                bits[i] = sequence.mask.row(sequence.tokens, len(sequence.request.prompt))
        staged = torch.from_numpy(bits)
        if self._device.type == "cuda":
            staged = staged.pin_memory()  # else the copy would wait for all that is under way
        mask = staged.to(self._device, non_blocking=True)
        return replace(inputs, batch=replace(inputs.batch, mask=mask))

    def sample(self, logits: Tensor, inputs: SampleInputs) -> Sampled:
        """One token for each row of `logits` [S, V]."""
        sampled = self._draw(logits, inputs.batch)
        if inputs.batch.penalties is not None and self._counts is not None:
            # A slot appears once, so no two rows write the same. A row that is discarded later counts too:
            # by then its slot is free, and whoever enters it is launched after this. So may a token -1.
            self._counts[inputs.slots, sampled.tokens] += 1
        return sampled

    def _table(self, table: Tensor | None, dtype: torch.dtype) -> Tensor:
        if table is not None:
            return table
        return torch.zeros(self._max_rows, self._vocab_size, dtype=dtype, device=self._device)
