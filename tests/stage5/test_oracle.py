"""Stage 5 says what stage 1 says, though it commits each batch after the next was launched."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.interface import Engine, Request, SamplingParams
from stages.stage5_overlap.engine import EngineConfig, OverlapEngine, build
from tests.oracle import assert_same_outputs, run_engine
from tests.stage2.oracle_case import PAGES, oracle, serve_sharing, settings

ROUNDS = int(os.environ.get("STAGE5_ROUNDS", "1"))  # more by hand


def make(path: Path, **more: Any) -> Engine:
    return build(EngineConfig(**settings(path, attention="torch", **more)))


@pytest.mark.parametrize("seed", range(ROUNDS))
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("page_size", PAGES)
def test_tokens_are_those_of_stage_1(
    checkpoint: Callable[[str], Path], preemptions: list[bool], page_size: int, overlap: bool, seed: int
) -> None:
    def engine(**more: Any) -> Engine:
        return make(checkpoint("qwen3"), max_rows=6, prefill_budget=9, overlap=overlap, **more)

    rng = random.Random(f"{seed} {page_size} {overlap}")
    counted = serve_sharing(checkpoint("qwen3"), engine, page_size, rng)
    if seed == 0:  # the load that always runs meets it all
        assert preemptions
        assert any(preemptions) == overlap, "rows in flight are preempted"
        assert counted.cached_tokens > 0
        assert counted.evicted_pages > 0


@pytest.mark.parametrize("budget", [3, 16, 17, 64])
def test_a_stop_token_at_every_position(checkpoint: Callable[[str], Path], budget: int) -> None:
    """It is found one step late, wherever pages end; the row launched meanwhile brings nothing."""
    prompts = [[(7 * i + n) % 50 for i in range(n)] for n in (1, 15, 16, 17, 31, 33)]
    free = [
        Request(str(i), prompt, SamplingParams(temperature=1.0, max_tokens=18, ignore_eos=True), seed=i)
        for i, prompt in enumerate(prompts)
    ]
    said = oracle(checkpoint("llama3-rope"), free)
    requests = []
    for request in free:
        for position, output in enumerate(said[request.id]):
            params = SamplingParams(
                temperature=1.0, max_tokens=18, ignore_eos=True, stop_token_ids=[output.token_id]
            )
            requests.append(Request(f"{request.id} {position}", request.prompt, params, request.seed))
    expected = oracle(checkpoint("llama3-rope"), requests)
    assert {len(outputs) for outputs in expected.values()} >= set(range(1, 15))
    engine = make(checkpoint("llama3-rope"), page_size=16, num_pages=20, max_rows=3, prefill_budget=budget)
    outputs = run_engine(engine, requests)
    for request in requests:
        assert_same_outputs(expected[request.id], outputs[request.id])
    assert not engine.has_work
    assert engine.statistics.free_pages + engine.statistics.cached_pages == engine.statistics.pages


@pytest.mark.parametrize("steps", range(1, 7))
def test_an_abort_while_its_row_is_in_flight(checkpoint: Callable[[str], Path], steps: int) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True)
    kept, gone = Request("kept", [1, 2, 3], params, seed=1), Request("gone", [4, 5], params, seed=2)
    expected = oracle(checkpoint("qwen3"), [kept])
    engine = make(checkpoint("qwen3"), page_size=1, num_pages=30, max_rows=2, prefill_budget=2)
    engine.add(kept)
    engine.add(gone)
    outputs = [output for _ in range(steps) for output in engine.step()]
    engine.abort("gone")
    engine.add(Request("gone", [6, 7, 8], params, seed=3))  # its slot and pages, at once
    again = oracle(checkpoint("qwen3"), [Request("gone", [6, 7, 8], params, seed=3)])
    before = len([output for output in outputs if output.request_id == "gone"])
    while engine.has_work:
        outputs += engine.step()
    assert_same_outputs(expected["kept"], [output for output in outputs if output.request_id == "kept"])
    of_gone = [output for output in outputs if output.request_id == "gone"]
    assert_same_outputs(again["gone"], of_gone[before:])


def test_the_next_batch_is_launched_before_this_one_is_read(checkpoint: Callable[[str], Path]) -> None:
    engine = make(checkpoint("qwen3"), num_pages=30, page_size=1, max_rows=2, prefill_budget=8)
    assert isinstance(engine, OverlapEngine)
    engine.add(Request("one", [1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True)))
    assert engine.step() == []  # launched, not read
    assert [output.finish_reason for output in engine.step()] == [None]
    assert [output.finish_reason for output in engine.step()] == ["length"]
    assert not engine.has_work
    assert engine.step() == []
