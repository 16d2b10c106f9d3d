"""Every pair of backends serves many requests at once, and scores the same tokens alike, on a GPU."""

from itertools import product
from pathlib import Path

import pytest
import torch

from stages.interface import Request, SamplingParams
from stages.stage2_paged.attention.choice import page_sizes
from stages.stage2_paged.engine import EngineConfig, build
from tests.checkpoints import write_checkpoint
from tests.oracle import run_engine
from tests.stage2.bad_case import write_bad
from tests.stage2.gpu_case import (
    Scores,
    assert_alike,
    assert_bad_neighbours_do_no_harm,
    available,
    forced,
    mixed_lengths,
    score,
    with_mask,
)

pytestmark = pytest.mark.gpu
NAMES = ("torch", "flash_attn", "flashinfer")
TIGHT = 40  # pages: too few for two long requests and many short ones


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("bf16"), "qwen3", head_dim=64, initializer_range=0.1)


def scores(model: Path, attention: str, page_size: int, num_pages: int) -> Scores:
    config = EngineConfig(
        model=str(model), device="cuda", dtype="bfloat16", attention=attention, page_size=page_size,
        num_pages=num_pages,
    )  # fmt: skip
    engine = build(config)
    found = score(engine, forced(mixed_lengths(64)))
    assert (engine.statistics.preemptions > 0) == (num_pages == TIGHT)
    return found


@pytest.fixture(scope="module")
def expected(model: Path) -> Scores:
    return scores(model, "torch", 256, 200)


@pytest.mark.parametrize(("page_size", "num_pages"), [(256, 200), (16, TIGHT)], ids=["room", "tight"])
@pytest.mark.parametrize("pair", list(product(NAMES, NAMES)), ids=",".join)
def test_every_pair_scores_alike(
    model: Path, expected: Scores, pair: tuple[str, str], page_size: int, num_pages: int
) -> None:
    if why := available(",".join(pair)):
        pytest.skip(why)
    if page_size not in page_sizes(pair):
        pytest.skip(f"{pair} does not take pages of {page_size}")
    assert_alike(scores(model, ",".join(pair), page_size, num_pages), expected)
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def bad_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bad(tmp_path_factory.mktemp("bad"), "qwen3", head_dim=64, initializer_range=0.1)


@pytest.mark.parametrize("page_size", [1, 16, 128, 256])
@pytest.mark.parametrize("name", NAMES)
def test_nan_beside_does_no_harm(bad_model: Path, name: str, page_size: int) -> None:
    if (why := available(name)) or page_size not in page_sizes((name, name)):
        pytest.skip(why or f"{name} does not take pages of {page_size}")

    config = EngineConfig(
        model=str(bad_model), device="cuda", dtype="bfloat16", attention=name, page_size=page_size,
        num_pages=max(4, 1200 // page_size), max_rows=24,
    )  # fmt: skip
    assert_bad_neighbours_do_no_harm(build(config), build(config), mixed_lengths(48), 0)


def test_a_mask_and_the_scores_of_a_prompt(model: Path, expected: Scores) -> None:
    """What a mask forces is what a bias does; scores of a prompt are those of the tokens drawn."""
    engine = build(
        EngineConfig(model=str(model), device="cuda", dtype="bfloat16", num_pages=600, page_size=16)
    )
    assert_alike(score(engine, map(with_mask, forced(mixed_lengths(64)))), expected)
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, logprobs=2)
    drawn = run_engine(engine, [Request("a", [1, 2, 3], params)])["a"]
    again = [1, 2, 3, *(output.token_id for output in drawn)]
    scored = SamplingParams(max_tokens=1, prompt_logprobs=2)
    found = run_engine(engine, [Request("b", again, scored)])["b"][0].prompt_logprobs
    assert found is not None
    assert len(found) == 42
    for output, score_ in zip(drawn, found[2:], strict=True):
        assert output.logprobs is not None
        assert score_.chosen == pytest.approx(output.logprobs.chosen, abs=0.25)
