"""Stage 4 says what stage 1 says, wherever prompts are cut."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.interface import Engine, Request, SamplingParams
from stages.stage4_chunked.engine import EngineConfig, build
from tests.checkpoints import VOCAB_SIZE
from tests.oracle import assert_same_outputs, run_engine
from tests.stage2.oracle_case import PAGES, LateEngine, oracle, serve_sharing, settings

ROUNDS = int(os.environ.get("STAGE4_ROUNDS", "1"))  # more by hand
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
        return ENGINES[name](config(checkpoint("qwen3"), max_rows=6, prefill_budget=9, **settings))

    rng = random.Random(f"{seed} {page_size} {name}")
    counted = serve_sharing(checkpoint("qwen3"), make, page_size, rng)
    if seed == 0:  # the load that always runs meets it all
        assert preemptions
        assert any(preemptions) == (name == "late")
        assert counted.cached_tokens > 0
        assert counted.evicted_pages > 0


@pytest.mark.parametrize("make", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("budget", [1, 2, 7, 15, 16, 17, 32, 33, 64])
def test_chunks_that_meet_straddle_and_miss_the_ends_of_pages(
    checkpoint: Callable[[str], Path], budget: int, make: Any
) -> None:
    rows = min(3, budget)
    prompts = [[(7 * i + n) % VOCAB_SIZE for i in range(n)] for n in (1, 15, 16, 17, 31, 32, 33, 48, 50)]
    params = SamplingParams(temperature=1.0, max_tokens=4, ignore_eos=True, logprobs=2)
    requests = [Request(str(i), prompt, params, seed=i) for i, prompt in enumerate(prompts)]
    expected = oracle(checkpoint("llama3-rope"), requests)
    engine = make(
        config(checkpoint("llama3-rope"), page_size=16, num_pages=20, max_rows=rows, prefill_budget=budget)
    )
    outputs = run_engine(engine, requests)
    for request in requests:
        assert_same_outputs(expected[request.id], outputs[request.id])


def test_a_budget_below_the_rows_is_refused(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"prefill_budget \(8\) must be at least max_rows \(9\)"):
        config(checkpoint("qwen3"), max_rows=9, prefill_budget=8)
