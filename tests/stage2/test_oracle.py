"""Stage 2 says what stage 1 says, token for token: any page size, too little memory, late commits."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.interface import Engine, Request, SamplingParams
from stages.stage2_paged.engine import EngineConfig, build
from tests.oracle import assert_same_outputs, run_arriving, run_engine
from tests.stage2.oracle_case import CONTEXT, LateEngine, oracle, requests_for, settings

ROUNDS = int(os.environ.get("STAGE2_ROUNDS", "1"))  # more by hand
# page size: so few pages that requests run out of them, and prompt lengths around a page's end
TIGHT = {1: (70, range(1, 36)), 16: (5, [1, 15, 16, 17, 31, 32, 33]), 64: (1, [1, 20, 40]), 256: (1, [1, 40])}


def config(path: Path, **more: Any) -> EngineConfig:
    return EngineConfig(**settings(path, attention="torch", **more))


ENGINES: dict[str, Callable[[EngineConfig], Engine]] = {
    "at once": build,
    "late": lambda config: LateEngine(build(config)),
}


@pytest.mark.parametrize("seed", range(ROUNDS))
@pytest.mark.parametrize("family", ["qwen3", "llama3-rope"])
@pytest.mark.parametrize("page_size", TIGHT)
def test_tokens_are_those_of_stage_1(
    checkpoint: Callable[[str], Path], preemptions: list[bool], page_size: int, family: str, seed: int
) -> None:
    pages, lengths = TIGHT[page_size]
    rng = random.Random(f"{seed} {page_size} {family}")
    requests = requests_for(rng, lengths, 24 if page_size == 16 else 14, min(CONTEXT, pages * page_size))
    expected = oracle(checkpoint(family), requests)
    for name, make in ENGINES.items():
        preemptions.clear()
        made = make(
            config(checkpoint(family), page_size=page_size, num_pages=pages, max_rows=5, prefill_budget=40)
        )
        outputs = run_arriving(made, requests, rng)
        for request in requests:
            assert_same_outputs(expected[request.id], outputs[request.id])
        if page_size <= 16:  # one page holds a whole request: there is nothing to preempt for
            assert preemptions, f"{name}: this load was to be too much"
            assert any(preemptions) == (name == "late")


@pytest.mark.parametrize("make", ENGINES.values(), ids=ENGINES)
def test_much_room_and_one_row_say_the_same(checkpoint: Callable[[str], Path], make: Any) -> None:
    rng = random.Random(1)
    requests = requests_for(rng, range(1, 40), 10, CONTEXT)
    wide = make(config(checkpoint("qwen3"), page_size=16, num_pages=100))
    narrow = make(config(checkpoint("qwen3"), page_size=64, num_pages=2, max_rows=1, prefill_budget=1))
    expected = run_engine(wide, requests)
    alone = run_arriving(narrow, requests, rng)
    for request in requests:
        assert_same_outputs(expected[request.id], alone[request.id])


def test_a_request_without_max_tokens_is_capped_by_the_cache(checkpoint: Callable[[str], Path]) -> None:
    engine = build(config(checkpoint("qwen3"), page_size=16, num_pages=2))
    assert engine.context_length == 32
    endless = SamplingParams(temperature=0.0, ignore_eos=True)
    outputs = run_engine(engine, [Request("a", [1] * 5, endless), Request("b", [2] * 31, endless)])
    assert [len(outputs[name]) for name in "ab"] == [27, 1]
    assert outputs["a"][-1].finish_reason == "length"
    with pytest.raises(ValueError, match="31 tokens and max_tokens 2 together exceed the context of 32"):
        engine.add(Request("c", [1] * 31, SamplingParams(max_tokens=2)))
    assert not engine.has_work


def test_whole_numbers_may_bias(checkpoint: Callable[[str], Path]) -> None:
    engine = build(config(checkpoint("qwen3"), page_size=16, num_pages=2))
    params = SamplingParams(temperature=0.0, max_tokens=2, logit_bias={5: 100})
    outputs = run_engine(engine, [Request("a", [1], params)])
    assert [output.token_id for output in outputs["a"]] == [5, 5]
