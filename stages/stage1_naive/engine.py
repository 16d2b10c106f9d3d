"""Stage 1, assembled: a model, attention without memory, and a loop that reads everything again."""

from dataclasses import dataclass, field, replace

import torch

from stages.interface import Engine, EngineConfig, Request, Statistics, TokenOutput
from stages.stage1_naive.attention import QKV, NaiveAttention, rope_table
from stages.stage1_naive.config import ModelConfig, find_model
from stages.stage1_naive.limits import Limits
from stages.stage1_naive.mask import RequestMask
from stages.stage1_naive.model import Attend, Ops, Transformer
from stages.stage1_naive.sampling import SamplingBatch, sample, score_prompt
from stages.stage1_naive.threads import fitting_threads
from stages.stage1_naive.weights import Checkpoint, load_model, pick_device, pick_dtype, random_reader

__all__ = ["EngineConfig", "NaiveEngine", "build"]


def build(config: EngineConfig) -> Engine:
    """Load the model and assemble the engine.

    Raises:
        ValueError: the model or the configuration cannot be served; the message says why.
    """
    path = find_model(config.model)
    model_config = ModelConfig.load(path)
    limits = Limits.of(model_config, config.max_context)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, model_config, device)
    if config.random_weights:
        read = random_reader(model_config, device, dtype)
    else:
        read = Checkpoint(path, model_config).read
    model = load_model(model_config, Ops(), read, dtype, device)
    attend = NaiveAttention(QKV(model_config, rope_table(model_config, limits.context_length, device)))
    return NaiveEngine(model, attend, limits)


@dataclass
class _Sequence:
    request: Request
    mask: RequestMask | None
    output: list[int] = field(default_factory=list)


class NaiveEngine:
    """One request after the other, in order of arrival; one forward over its whole sequence a token.

    Nothing is remembered between two tokens, so token number t costs as much as a prompt of t tokens.
    Stage 2 removes that cost; this engine stays as the oracle that all others are compared with.
    """

    def __init__(self, model: Transformer, attend: Attend, limits: Limits) -> None:
        self._model = model
        self._attend = attend
        self._limits = limits
        self._device = model.embedding.device
        self._queue: dict[str, _Sequence] = {}  # by request id, in order of arrival

    @property
    def context_length(self) -> int:
        return self._limits.context_length

    @property
    def has_work(self) -> bool:
        return bool(self._queue)

    @property
    def statistics(self) -> Statistics:
        return Statistics(running=min(1, len(self._queue)), waiting=max(0, len(self._queue) - 1))

    def add(self, request: Request) -> None:
        self._limits.check(request, self._queue)
        self._queue[request.id] = _Sequence(request, self._limits.mask(request.params))

    def abort(self, request_id: str) -> None:
        self._queue.pop(request_id, None)

    def step(self) -> list[TokenOutput]:
        """The next token of the oldest request."""
        if not self._queue:
            return []
        sequence = next(iter(self._queue.values()))
        output = self._next_token(sequence)
        sequence.output.append(output.token_id)
        if output.finish_reason is not None:
            del self._queue[sequence.request.id]
        return [output]

    def close(self) -> None:
        pass

    @torch.inference_mode()
    def _next_token(self, sequence: _Sequence) -> TokenOutput:
        request, params, output = sequence.request, sequence.request.params, sequence.output
        tokens = [*request.prompt, *output]
        token_ids = torch.tensor(tokens, device=self._device)  # [T]
        positions = torch.arange(len(token_ids), device=self._device)  # [T]
        with fitting_threads(self._model, len(tokens)):
            hidden = self._model.hidden(token_ids, positions, self._attend)  # [T, H]
        logits = self._model.logits(hidden[-1:])  # [1, V]: only the last position predicts a new token
        batch = SamplingBatch.of([(request, output)], logits.shape[-1], self._device)
        if sequence.mask is not None and sequence.mask.needed(len(output)):
            bits = torch.from_numpy(sequence.mask.row(tokens, len(request.prompt)))
            batch = replace(batch, mask=bits.unsqueeze(0).to(self._device))
        sampled = sample(logits, batch)
        token_id = int(sampled.tokens[0])
        reason = self._limits.finish_reason(request, len(output) + 1, token_id)
        if reason == "error":
            return TokenOutput(request.id, 0, finish_reason=reason)
        scores = None
        if params.prompt_logprobs is not None and not output:
            pieces = score_prompt(self._model.logits, hidden[:-1], token_ids[1:])
            scores = [score for piece in pieces for score in piece.all_logprobs(params.prompt_logprobs)]
        return TokenOutput(
            request_id=request.id,
            token_id=token_id,
            logprobs=None if params.logprobs is None else sampled.logprobs(0, params.logprobs),
            finish_reason=reason,
            prompt_logprobs=scores,
        )
