"""From a batch to its tokens: upload, forward, sample, and a result that is there when it is waited for."""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from stages.stage1_naive.model import Transformer
from stages.stage1_naive.sampling import Sampled, score_prompt
from stages.stage1_naive.threads import fitting_threads
from stages.stage2_paged.attention.backend import StepAttention
from stages.stage2_paged.batch import Batch, Row
from stages.stage2_paged.inputs import Slots
from stages.stage2_paged.request_table import SampledToken
from stages.stage2_paged.sampler import SampleInputs, Sampler

Scores = list[tuple[Row, list[Sampled]]]  # of the prompts that some rows read


@dataclass(frozen=True)
class Computed:
    """A batch that the model has been through, with S rows to sample from."""

    batch: Batch
    logits: Tensor  # [S, V]
    samples: SampleInputs | None  # None: a CUDA graph has sampled them already,
    tokens: Tensor | None = None  # [S] int64: these
    scores: Scores = field(default_factory=list)


class Pending:
    """The tokens of a batch under way, on their way to the host."""

    def __init__(self, batch: Batch, sampled: Sampled, scores: Scores | None = None) -> None:
        self._batch = batch
        self._sampled = _to_host(sampled)
        self._scores = [(row, [_to_host(piece) for piece in pieces]) for row, pieces in scores or ()]
        self._arrived: torch.cuda.Event | None = None
        if sampled.tokens.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def wait(self) -> list[SampledToken]:
        """One for each row of the batch that samples, in their order. Scores of prompts go to their
        sequences, by position: what is computed again after a preemption replaces what was there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        for row, pieces in self._scores:
            known, wanted = row.sequence.prompt_logprobs, row.sequence.request.params.prompt_logprobs
            if known is not None and wanted is not None:
                new = [score for piece in pieces for score in piece.all_logprobs(wanted)]
                known[row.start : row.start + len(new)] = new
        result = []
        for i, (row, token_id) in enumerate(
            zip(self._batch.sampling, self._sampled.tokens.tolist(), strict=True)
        ):
            wanted = row.sequence.request.params.logprobs
            logprobs = None if wanted is None or token_id < 0 else self._sampled.logprobs(i, wanted)
            result.append(SampledToken(token_id, logprobs))
        return result


def _to_host(sampled: Sampled) -> Sampled:
    """A copy that does not wait."""
    parts = (sampled.chosen, sampled.top_ids, sampled.top_values)
    return Sampled(_copy(sampled.tokens), *(None if part is None else _copy(part) for part in parts))


def _copy(x: Tensor) -> Tensor:
    """On a GPU it goes to pinned memory, else it would wait after all."""
    if not x.is_cuda:
        return x
    return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)


class Runner(Protocol):
    """Computes batches, in the order in which they are launched. Stage 5 swaps it."""

    def launch(self, batch: Batch) -> Pending:
        """Queue a batch on the device and return at once: the two halves below, one after the other."""

    def forward(self, batch: Batch) -> Computed:
        """Queue the model's part of it."""

    def sample(self, computed: Computed) -> Pending:
        """Queue the draw. If the batch is `masked`, all batches before it must be committed."""

    def close(self) -> None:
        """Let go of what libraries count on; nothing is launched afterwards."""


class ModelRunner:
    """Launches the model's operations one by one."""

    def __init__(
        self,
        model: Transformer,
        attention: StepAttention,
        sampler: Sampler,
        slots: Slots,
    ) -> None:
        self._model = model
        self._attention = attention
        self._sampler = sampler
        self._slots = slots

    def launch(self, batch: Batch) -> Pending:
        return self.sample(self.forward(batch))

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Computed:
        step = self._slots.upload(batch)
        self._attention.plan(step)
        with fitting_threads(self._model, len(step.token_ids)):
            hidden = self._model.hidden(step.token_ids, step.positions, self._attention)  # [T, H]
            scores = self._score(batch, hidden)
            logits = self._model.logits(hidden[step.sampled_positions])  # [S, V]
        return Computed(batch, logits, step.samples, scores=scores)

    @torch.inference_mode()
    def sample(self, computed: Computed) -> Pending:
        batch, inputs = computed.batch, computed.samples
        assert inputs is not None, "only a graph samples by itself"
        if batch.masked:
            inputs = self._sampler.mask(batch.sampling, inputs)
        with fitting_threads(self._model, len(computed.logits)):
            sampled = self._sampler.sample(computed.logits, inputs)
        self._slots.remember(inputs.slots, sampled.tokens)
        return Pending(batch, sampled, computed.scores)

    def close(self) -> None:
        pass

    def _score(self, batch: Batch, hidden: Tensor) -> Scores:
        """What `hidden` [T, H] says of the prompts whose log-probabilities are asked for."""
        scores: Scores = []
        first = batch.num_decode  # of each row, among the T positions; those that decode have no prompt left
        for row in batch.rows[batch.num_decode :]:
            if count := row.scored:
                following = row.sequence.tokens[row.start + 1 : row.start + 1 + count]
                tokens = torch.tensor(following, device=hidden.device)
                scores.append((row, score_prompt(self._model.logits, hidden[first : first + count], tokens)))
            first += row.length
        return scores
