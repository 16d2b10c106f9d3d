"""Exercises of lesson 1. Fill in the functions, then run, in the repository's root:

    python -m docs.exercises.stage1

Each one says whether it passed. Solutions are in tests/docs/test_exercises.py.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from docs.exercises.checker import run_checks
from minisgl.builtin import PATH
from stages.interface import Request, SamplingParams, TokenOutput
from stages.stage1_naive.attention import QKV, NaiveAttention, rope_table
from stages.stage1_naive.config import ModelConfig
from stages.stage1_naive.engine import NaiveEngine
from stages.stage1_naive.limits import Limits
from stages.stage1_naive.model import Attend, Layer, Ops, Transformer
from stages.stage1_naive.weights import Checkpoint, load_model


def unfused_qkv(layer: Layer, x: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Exercise 1: query, key and value by three products, each with its own part of `layer.qkv`.

    `x` [T, H] -> [T, N * D], [T, K * D], [T, K * D].
    """
    raise NotImplementedError


def positions_computed(prompt: int, answer: int) -> int:
    """Exercise 2: how many positions stage 1 pushes through the model to write `answer` tokens after
    `prompt` tokens. A formula, not a loop."""
    raise NotImplementedError


def score(model: Transformer, attend: Attend, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Exercise 3: the log-probability of `answer` after `prompt`, with one call of `model.hidden`."""
    raise NotImplementedError


class RoundRobin(NaiveEngine):
    """Exercise 4: requests take turns. Every step brings a token to the one that waited longest."""

    def step(self) -> list[TokenOutput]:
        raise NotImplementedError


# --- The checks ----------------------------------------------------------------------------------


def load(path: Path) -> tuple[Transformer, NaiveAttention]:
    """A model in float64, where two right ways to add the same numbers agree."""
    config, cpu = ModelConfig.load(path), torch.device("cpu")
    model = load_model(config, Ops(), Checkpoint(path, config).read, torch.float64, cpu, progress=False)
    return model, NaiveAttention(QKV(config, rope_table(config, config.context_length, cpu)))


def check_unfused_qkv(
    solution: Callable[[Layer, Tensor, ModelConfig], tuple[Tensor, Tensor, Tensor]], path: Path
) -> None:
    model, _ = load(path)
    c, layer = model.config, model.layers[0]
    x = torch.randn(5, c.hidden_size, dtype=torch.float64)
    parts = solution(layer, x, c)
    shapes = [tuple(part.shape) for part in parts]
    expected = [(5, heads * c.head_dim) for heads in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
    assert shapes == expected, f"the shapes are {shapes}, not {expected}"
    torch.testing.assert_close(torch.cat(parts, dim=-1), torch.nn.functional.linear(x, layer.qkv))


def check_positions_computed(solution: Callable[[int, int], int], path: Path) -> None:
    model, attend = load(path)
    seen = []

    def counting(layer: Layer, qkv: Tensor, positions: Tensor) -> Tensor:
        seen.append(len(positions) if layer.index == 0 else 0)
        return attend(layer, qkv, positions)

    for prompt, answer in ((1, 1), (4, 1), (7, 5)):
        seen.clear()
        engine = NaiveEngine(model, counting, Limits.of(model.config, None))
        params = SamplingParams(max_tokens=answer, ignore_eos=True)
        engine.add(Request("count", [5] * prompt, params))
        while engine.has_work:
            engine.step()
        result = solution(prompt, answer)
        assert result == sum(seen), f"{prompt} + {answer} tokens: counted {sum(seen)}, not {result}"


@torch.inference_mode()
def check_score(
    solution: Callable[[Transformer, Attend, Sequence[int], Sequence[int]], float], path: Path
) -> None:
    model, attend = load(path)
    prompt = [5, 6, 7, 8]
    engine = NaiveEngine(model, attend, Limits.of(model.config, None))
    engine.add(Request("score", prompt, SamplingParams(max_tokens=6, logprobs=0, ignore_eos=True), seed=1))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    expected = sum(output.logprobs.chosen for output in outputs if output.logprobs)
    calls = []

    def counting(layer: Layer, qkv: Tensor, positions: Tensor) -> Tensor:
        calls.append(layer.index == 0)
        return attend(layer, qkv, positions)

    result = solution(model, counting, prompt, [output.token_id for output in outputs])
    assert abs(result - expected) < 1e-6, f"the engine's log-probabilities sum to {expected}, not {result}"
    assert sum(calls) == 1, f"the model was called {sum(calls)} times"


def check_round_robin(solution: type[NaiveEngine], path: Path) -> None:
    model, attend = load(path)
    requests = [
        Request(name, [5, 6, token], SamplingParams(max_tokens=length, ignore_eos=True), seed=token)
        for name, token, length in (("a", 7, 3), ("b", 8, 5), ("c", 9, 2))
    ]

    def run(engine: NaiveEngine, several: Sequence[Request]) -> list[TokenOutput]:
        for request in several:
            engine.add(request)
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        return outputs

    limits = Limits.of(model.config, None)
    together = run(solution(model, attend, limits), requests)
    turns = "".join(output.request_id for output in together)
    assert turns == "abcabcabbb", f"the turns were {turns}, not abcabcabbb"
    for request in requests:
        alone = [output.token_id for output in run(NaiveEngine(model, attend, limits), [request])]
        shared = [output.token_id for output in together if output.request_id == request.id]
        assert shared == alone, f"request {request.id} got other tokens than alone"


CHECKS: dict[str, Callable[[], None]] = {
    "1 unfused_qkv": lambda: check_unfused_qkv(unfused_qkv, PATH),
    "2 positions_computed": lambda: check_positions_computed(positions_computed, PATH),
    "3 score": lambda: check_score(score, PATH),
    "4 RoundRobin": lambda: check_round_robin(RoundRobin, PATH),
}


if __name__ == "__main__":
    run_checks(CHECKS)
