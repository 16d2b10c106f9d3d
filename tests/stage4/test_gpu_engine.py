"""Batches of decode rows and chunks, each through its own kernel, against the backend to read, on a GPU."""

from pathlib import Path

import pytest

from stages.stage2_paged.engine import EngineConfig as PagedConfig
from stages.stage2_paged.engine import build as build_stage2
from stages.stage4_chunked.engine import EngineConfig, build
from tests.checkpoints import write_checkpoint
from tests.stage2.gpu_case import Scores, assert_alike, available, forced, mixed_lengths, score

pytestmark = pytest.mark.gpu
STEM = 100  # tokens that most prompts share
TIGHT = 30  # pages: hardly more than the longest request needs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("bf16"), "qwen3", head_dim=64, initializer_range=0.1)


@pytest.fixture(scope="module")
def expected(model: Path) -> Scores:
    config = PagedConfig(model=str(model), device="cuda", dtype="bfloat16", attention="torch", num_pages=2000)
    return score(build_stage2(config), forced(mixed_lengths(64), STEM))


@pytest.mark.parametrize(("budget", "num_pages"), [(64, 2000), (100, TIGHT), (1000, 2000)])
@pytest.mark.parametrize("attention", ["torch", "flashinfer", "flash_attn", "flash_attn,flashinfer"])
def test_mixed_batches_score_as_whole_prompts(
    model: Path, expected: Scores, attention: str, budget: int, num_pages: int
) -> None:
    if why := available(attention):
        pytest.skip(why)
    config = EngineConfig(
        model=str(model), device="cuda", dtype="bfloat16", attention=attention, page_size=16,
        num_pages=num_pages, max_rows=32, prefill_budget=budget,
    )  # fmt: skip
    engine = build(config)
    assert_alike(score(engine, forced(mixed_lengths(64), STEM)), expected)
    assert (engine.statistics.preemptions > 0) == (num_pages == TIGHT)
