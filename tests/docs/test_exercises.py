"""The checks of the exercises accept these solutions, and refuse what is almost right."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from docs.exercises import stage1
from stages.interface import TokenOutput
from stages.stage1_naive.config import ModelConfig
from stages.stage1_naive.engine import NaiveEngine
from stages.stage1_naive.model import Attend, Layer, Transformer

Checkpoints = Callable[[str], Path]


def unfused_qkv(layer: Layer, x: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    weights = layer.qkv.split([q, kv, kv])
    return F.linear(x, weights[0]), F.linear(x, weights[1]), F.linear(x, weights[2])


def positions_computed(prompt: int, answer: int) -> int:
    return answer * prompt + answer * (answer - 1) // 2


def score(model: Transformer, attend: Attend, prompt: Sequence[int], answer: Sequence[int]) -> float:
    # A text that exists can be read at once: every position predicts its successor, which is known.
    token_ids = torch.tensor([*prompt, *answer])
    hidden = model.hidden(token_ids, torch.arange(len(token_ids)), attend)
    logprobs = model.logits(hidden[len(prompt) - 1 : -1]).log_softmax(-1)
    return float(logprobs.gather(-1, torch.tensor(answer).unsqueeze(1)).sum())


class RoundRobin(NaiveEngine):
    def step(self) -> list[TokenOutput]:
        outputs = super().step()
        for output in outputs:  # the others waited longer now
            sequence = self._queue.pop(output.request_id, None)
            if sequence is not None:
                self._queue[output.request_id] = sequence
        return outputs


def test_the_stubs_are_to_do() -> None:
    for check in stage1.CHECKS.values():
        with pytest.raises(NotImplementedError):
            check()


def test_the_solutions_pass(checkpoint: Checkpoints) -> None:
    path = checkpoint("qwen3")
    stage1.check_unfused_qkv(unfused_qkv, path)
    stage1.check_positions_computed(positions_computed, path)
    stage1.check_score(score, path)
    stage1.check_round_robin(RoundRobin, path)


def test_mistakes_are_refused(checkpoint: Checkpoints) -> None:
    path = checkpoint("qwen3")
    with pytest.raises(AssertionError, match="shapes"):
        stage1.check_unfused_qkv(lambda layer, x, config: F.linear(x, layer.qkv).chunk(3, -1), path)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="counted"):
        stage1.check_positions_computed(lambda prompt, answer: answer * (prompt + answer) // 2, path)
    with pytest.raises(AssertionError, match="sum to"):
        stage1.check_score(lambda model, attend, prompt, answer: 0.0, path)
    with pytest.raises(AssertionError, match="turns"):
        stage1.check_round_robin(NaiveEngine, path)
