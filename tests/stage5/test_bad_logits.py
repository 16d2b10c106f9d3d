"""Logits that are NaN or infinite end their own request, in every stage, and nobody else notices."""

import logging
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stages import load_stage
from stages.interface import Engine, Request, SamplingParams
from stages.stage1_naive.config import ModelConfig
from stages.stage2_paged.kv_cache import PagedKVCache
from tests.oracle import assert_same_outputs, run_arriving, run_engine, tokens_of
from tests.stage2.bad_case import BAD, good_and_bad, write_bad
from tests.stage2.oracle_case import oracle, settings

PAGED: dict[str, Any] = {"attention": "torch", "page_size": 1, "max_rows": 5, "prefill_budget": 9}
ENGINES = {
    "1": (1, {}), "2": (2, PAGED), "3": (3, PAGED), "4": (4, PAGED), "5": (5, PAGED),
    "5 at once": (5, {**PAGED, "overlap": False}),
}  # fmt: skip
LENGTHS = [3, 9, 14, 20, 33, 5, 11, 17, 30, 2, 25, 8, 13, 40, 6]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bad(tmp_path_factory.mktemp("bad"), "llama")


def build(model: Path, kind: str, **more: Any) -> Engine:
    number, config = ENGINES[kind]
    if number > 1:
        config = {**config, **more}
    stage = load_stage(number)
    return stage.build(stage.EngineConfig(**settings(model, **config)))


@pytest.mark.parametrize("kind", ENGINES)
def test_it_ends_with_an_error_and_others_do_not_notice(
    model: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With so few pages that those of the failed are used again at once."""
    good, bad = good_and_bad(LENGTHS)
    expected = oracle(model, good)
    engine = build(model, kind, num_pages=90)
    everyone = sorted([*good, *bad], key=lambda request: int(request.id))
    caplog.clear()
    with caplog.at_level(logging.ERROR):
        outputs = run_arriving(engine, everyone, random.Random(kind))
    for request in good:
        assert_same_outputs(expected[request.id], outputs[request.id])
    for request in bad:
        *before, last = outputs[request.id]
        assert (last.token_id, last.finish_reason, last.logprobs) == (0, "error", None)
        assert tokens_of(before) == ([] if BAD in request.prompt else [BAD])
    lines = sorted(record.getMessage().partition(" ends with an error")[0] for record in caplog.records)
    assert lines == sorted(f"request {request.id!r}" for request in bad), "one for each"
    counted = engine.statistics
    assert counted.free_pages + counted.cached_pages == counted.pages, "nobody owns a page any more"


@pytest.mark.parametrize("kind", ["3", "4", "5"])
def test_what_comes_before_a_bad_token_can_be_shared(model: Path, kind: str) -> None:
    """Also of a request that is aborted in the middle of its prompt, before anybody knows that it fails."""
    stem = list(range(8))
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    good = Request("good", [*stem, 1], params)
    engine = build(model, kind, num_pages=64)
    engine.add(Request("aborted", [*stem, *[BAD] * 40], params))
    engine.step()
    engine.abort("aborted")
    found = run_engine(engine, [Request("bad", [*stem, BAD, 2], params), good])
    assert found["bad"][0].finish_reason == "error"
    assert found["good"][0].cached_tokens == 8
    assert_same_outputs(oracle(model, [good])["good"], found["good"])


def test_a_stored_value_is_finite(model: Path) -> None:
    config = ModelConfig.load(model)
    cache = PagedKVCache(config, 1, 16, torch.float32, torch.device("cpu"))
    k = torch.randn(4, config.num_kv_heads, config.head_dim)
    v = torch.randn_like(k)
    k[0, 0, 3], v[0, 0, 2], v[2, 0, 5] = torch.nan, torch.nan, -torch.inf
    cache.store(0, k, v, torch.arange(4))
    torch.testing.assert_close(cache.keys[0, 0, :4], k, equal_nan=True)
    v[0, 0, 2], v[2, 0, 5] = 0.0, torch.finfo(torch.float32).min
    assert torch.equal(cache.values[0, 0, :4], v)


def test_no_token_left_is_an_error_too(model: Path) -> None:
    """After 1 neither of the two allowed tokens may come."""
    params = SamplingParams(allowed_token_ids=[1, 2], bad_words_ids=[[1, 1], [1, 2], [2, 2]], max_tokens=9)
    requests = [Request(str(i), [3, i], params, seed=i) for i in range(9)]
    for kind in ENGINES:
        outputs = run_engine(build(model, kind, num_pages=90), requests)
        assert {(*tokens_of(o), o[-1].finish_reason) for o in outputs.values()} == {
            (1, 0, "error"), (2, 1, 0, "error"),
        }  # fmt: skip


@pytest.mark.parametrize("kind", ENGINES)
def test_scores_of_a_prompt_that_fails_are_not_there(model: Path, kind: str) -> None:
    params = SamplingParams(max_tokens=2, prompt_logprobs=1)
    request = Request("a", [1, 2, BAD, 3], params)
    (output,) = run_engine(build(model, kind), [request])["a"]
    assert (output.finish_reason, output.prompt_logprobs) == ("error", None)
    outputs = run_engine(build(model, kind), [replace(request, prompt=[1, 2, 3])])["a"]
    assert [o.prompt_logprobs is None for o in outputs] == [False, True]
