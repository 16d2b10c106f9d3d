"""From a batch to its tokens: upload, forward, sample, and a result that is there when it is waited for."""

from typing import Protocol

import torch
from torch import Tensor

from stages.stage1_naive.model import Transformer
from stages.stage1_naive.sampling import Sampled
from stages.stage2_paged.attention.backend import StepAttention
from stages.stage2_paged.batch import Batch
from stages.stage2_paged.inputs import Slots
from stages.stage2_paged.request_table import SampledToken
from stages.stage2_paged.sampler import Sampler


class Pending:
    """The tokens of a batch under way, on their way to the host."""

    def __init__(self, batch: Batch, sampled: Sampled) -> None:
        self._batch = batch
        parts = (sampled.chosen, sampled.top_ids, sampled.top_values)
        scores = (None if part is None else _to_host(part) for part in parts)
        self._sampled = Sampled(_to_host(sampled.tokens), *scores)
        self._arrived: torch.cuda.Event | None = None
        if sampled.tokens.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def wait(self) -> list[SampledToken]:
        """One for each row of the batch that samples, in their order."""
        if self._arrived is not None:
            self._arrived.synchronize()
        result = []
        for i, (row, token_id) in enumerate(
            zip(self._batch.sampling, self._sampled.tokens.tolist(), strict=True)
        ):
            wanted = row.sequence.request.params.logprobs
            logprobs = None if wanted is None else self._sampled.logprobs(i, wanted)
            result.append(SampledToken(token_id, logprobs))
        return result


def _to_host(x: Tensor) -> Tensor:
    """A copy that does not wait; on a GPU it goes to pinned memory, else it would wait after all."""
    if not x.is_cuda:
        return x
    return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)


class Runner(Protocol):
    """Computes batches, in the order in which they are launched. Stage 5 swaps it."""

    def launch(self, batch: Batch) -> Pending:
        """Queue a batch on the device and return at once."""

    def close(self) -> None:
        """Let go of what libraries count on; nothing is launched afterwards."""


class ModelRunner:
    """Launches the model's operations one by one."""

    def __init__(self, model: Transformer, attention: StepAttention, sampler: Sampler, slots: Slots) -> None:
        self._model = model
        self._attention = attention
        self._sampler = sampler
        self._slots = slots

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Pending:
        step = self._slots.upload(batch)
        self._attention.plan(step)
        hidden = self._model.hidden(step.token_ids, step.positions, self._attention)  # [T, H]
        logits = self._model.logits(hidden[step.sampled_positions])  # [S, V]
        sampled = self._sampler.sample(logits, step.samples)
        self._slots.remember(step.samples.slots, sampled.tokens)
        return Pending(batch, sampled)

    def close(self) -> None:
        pass
