"""Stage 3 says what stage 1 says, whatever it finds in its cache."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.interface import Engine, Request, SamplingParams
from stages.stage3_radix.engine import EngineConfig, build
from tests.checkpoints import VOCAB_SIZE
from tests.oracle import assert_same_outputs, run_arriving, run_engine, tokens_of
from tests.stage2.oracle_case import PAGES, LateEngine, oracle, serve_sharing, settings

ROUNDS = int(os.environ.get("STAGE3_ROUNDS", "1"))  # more by hand
ENGINES: dict[str, Callable[[EngineConfig], Engine]] = {
    "at once": build,
    "late": lambda config: LateEngine(build(config)),
}


def config(path: Path, **more: Any) -> EngineConfig:
    return EngineConfig(**settings(path, attention="torch", **more))


@pytest.mark.parametrize("seed", range(ROUNDS))
@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("page_size", PAGES)
def test_tokens_are_those_of_stage_1(
    checkpoint: Callable[[str], Path], preemptions: list[bool], page_size: int, name: str, seed: int
) -> None:
    def make(**settings: Any) -> Engine:
        return ENGINES[name](config(checkpoint("qwen3"), max_rows=6, prefill_budget=50, **settings))

    rng = random.Random(f"{seed} {page_size} {name}")
    counted = serve_sharing(checkpoint("qwen3"), make, page_size, rng)
    if seed == 0:  # the load that always runs meets it all
        assert preemptions
        assert any(preemptions) == (name == "late")
        assert counted.cached_tokens > 0
        assert counted.evicted_pages > 0


@pytest.mark.parametrize("make", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("page_size", [1, 16])
def test_chats_of_many_turns(checkpoint: Callable[[str], Path], page_size: int, make: Any) -> None:
    """Each turn sends the whole conversation; what was said before is found, answers included."""
    rng = random.Random(0)
    engine = make(config(checkpoint("qwen3"), page_size=page_size, num_pages=500))
    talks = [rng.choices(range(VOCAB_SIZE), k=6) for _ in range(4)]
    for turn in range(4):
        params = SamplingParams(temperature=1.0, max_tokens=5, ignore_eos=True)
        requests = [Request(f"{turn} {i}", list(talk), params, seed=i) for i, talk in enumerate(talks)]
        outputs = run_arriving(engine, requests, rng) if turn % 2 else run_engine(engine, requests)
        expected = oracle(checkpoint("qwen3"), requests)
        for talk, request in zip(talks, requests, strict=True):
            assert_same_outputs(expected[request.id], outputs[request.id])
            cached = {output.cached_tokens for output in outputs[request.id]}
            known = len(request.prompt) - 4  # all but the last sampled token and the three that follow it
            assert cached == {0 if turn == 0 else known - known % page_size}
            talk += [*tokens_of(outputs[request.id]), *rng.choices(range(VOCAB_SIZE), k=3)]


def test_the_same_prompt_again_and_again(checkpoint: Callable[[str], Path]) -> None:
    engine = build(config(checkpoint("llama3-rope"), page_size=16, num_pages=8))
    params = SamplingParams(temperature=1.0, max_tokens=9, logprobs=3)
    requests = [Request(str(i), [5] * 33, params, seed=3) for i in range(3)]
    expected = oracle(checkpoint("llama3-rope"), requests)
    for request in requests:
        outputs = run_engine(engine, [request])[request.id]
        assert_same_outputs(expected[request.id], outputs)
        assert outputs[0].cached_tokens == (0 if request.id == "0" else 32)
